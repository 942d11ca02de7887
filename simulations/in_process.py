"""A federation in this process: a strategy's rounds on one worker, without Flower and without Ray.

For what tries many short runs of one model, such as :mod:`simulations.tune`. Instructions, training, reduction and the
server's rule are those of a run under Flower, and so are the numbers, to the bit; what is missing is what a run has
beside them: messages, a run folder, a checkpoint, several trainers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray

from clients.limits import SiteLimits
from clients.shards import deal
from clients.site import Job
from clients.worker import Worker
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.exchange import Instruction, Outcome, Update
from fedlora.reduce import fold
from fedlora.server import Core
from fedlora.server.personal import personal_means
from fedlora.tasks import TASKS
from simulations.scores import sums_of
from simulations.setup import federation_of
from strategies.build import build_strategy


@final
class Resident:
    """A worker that stays from one federation to the next, with what the next has in common with the last.

    Args:
        threads: CPU threads to use.
        cards: GPUs that the base model is spread over.
    """

    def __init__(self, threads: int, cards: int = 1) -> None:
        self._job: Job | None = None
        self._worker = Worker(self._fetch, threads, cards=cards)

    def federation(self, config: Config, data: FederatedData, folder: str) -> InProcess:
        """Return a federation before its first round; the one before it is over.

        Args:
            config: The settled configuration.
            data: Its data.
            folder: Where clients keep what is theirs.

        Raises:
            ValueError: The model cannot be loaded or adapted.
        """
        self._job = Job(config.to_flat(), data, SiteLimits(folder))
        self._worker.renew()
        self._worker.load()
        return InProcess(config, data, self._worker)

    def _fetch(self) -> Job:
        assert self._job is not None, "federation() gives the worker its job"
        return self._job


@final
class InProcess:
    """A federation whose clients one worker trains.

    Args:
        config: The settled configuration.
        data: Its data.
        worker: The worker, at work on them.

    Attributes:
        core: The strategy at the server, with the server's state.
    """

    def __init__(self, config: Config, data: FederatedData, worker: Worker) -> None:
        self.config, self._data, self._worker = config, data, worker
        model = worker.loaded.model
        strategy = build_strategy(config, model.specs)
        self.core = Core(strategy, federation_of(config), strategy.initial({**model.initial, **worker.start()}))

    def train(self, server_round: int) -> None:
        """Train the round's clients, and apply the strategy to their updates.

        Raises:
            FederationError: Too many clients failed, or have no budget left.
        """
        core, federation = self.core, self.core.federation
        clients = core.state.clients
        federation.check_budgets(server_round, clients.spent)
        cohort = [client for client in federation.cohort(server_round) if client not in clients.spent]
        told = core.instruction(server_round, cohort)
        updates = (update for part in self._packs(told) for update in self._worker.train(part))
        reports, total = fold(told, updates)
        heads = {report.client: report.ledger_head for report in reports if report.ledger_head}
        spent = {report.client for report in reports if report.outcome is Outcome.BUDGET_SPENT}
        core.remember(ledger_heads={**clients.ledger_heads, **heads}, spent=clients.spent | spent)
        failed = {report.client: report.reason for report in reports if report.outcome is not Outcome.OK}
        federation.check_failures(server_round, cohort, failed, core.state.clients.spent, good=total.count)
        core.apply(server_round, total, set(cohort) - set(failed))

    def released(self, server_round: int) -> list[Update]:
        """Return what each of a round's clients would send; the server stays as it is.

        Raises:
            RuntimeError: A client did not train.
        """
        told = self.core.instruction(server_round, self.core.federation.cohort(server_round))
        updates = [update for part in self._packs(told) for update in self._worker.train(part)]
        for update in updates:
            if update.report.reason:
                raise RuntimeError(f"client {update.client} did not train: {update.report.reason}")
        return sorted(updates, key=lambda update: update.client)

    def facts(self, updates: Sequence[Update], rows: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Return facts of training rows under what each client has sent, [clients, rows] by name."""
        model = self._worker.loaded.model
        own = [update.tensors for update in updates]
        held = {**model.initial, **self.core.state.tensors}
        common = {name: value for name, value in held.items() if name not in own[0]}
        group = np.repeat(np.arange(len(own)), len(rows))
        facts = model.parallel.evaluate(common, model.examples["train"], [*rows] * len(own), own=own, group=group)
        return {name: values.reshape(len(own), len(rows)) for name, values in facts.items()}

    def measure(self, server_round: int) -> dict[str, float]:
        """Return the metrics after a round, by plain name: on dev rows, or for personal models on clients' own rows."""
        task, core = TASKS[self.config.task], self.core
        if core.strategy.has_personal:
            told = core.instruction(server_round + 1, sorted(core.state.clients.trained), train=False)
            reports = [report for part in self._packs(told) for report in self._worker.evaluate_personal(part)]
            means = personal_means({report.client: sums_of(report) for report in reports if report.examples})
            means.pop("personal_clients")
            return task.metrics({name.removeprefix("personal_"): float(value) for name, value in means.items()})
        split = self._worker.loaded.model.measured
        rows = len(self._data.corpus.splits[split])
        facts = self._worker.evaluate(core.state.tensors, split, range(rows))
        return task.metrics({name: value / rows for name, value in task.sums(facts).items()})

    def _packs(self, told: Instruction) -> Sequence[Instruction]:
        return [told.part(pack.clients) for pack in deal(told.clients, told.pack, [1.0])]
