"""One run of a simulation: start or resume, the rounds with their observers, and the finished folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from rich.console import Console

from clients.accounts import Accounts
from clients.site import Description, Speed
from fedlora.fingerprint import CLIENT_PACKAGES, code_fingerprint
from fedlora.reports.format import human_time
from fedlora.reports.plots import plot_partition
from fedlora.reports.run import Run as Report
from fedlora.runs.folder import Checkpoint, RunFolder, environment, read_lines
from fedlora.server import FlowerStrategy
from fedlora.server.observers import (
    Checkpoints,
    MetricsFile,
    Observer,
    PersonalMetrics,
    Progress,
    RoundEnd,
    ServerEvaluation,
    Trackers,
    train_loss,
)
from fedlora.server.personal import Sums
from fedlora.state import ServerState
from fedlora.tasks import TASKS
from fedlora.wire import named_arrays
from simulations.dealing import DealtNodes
from simulations.losses import TrainerLosses
from simulations.pack_times import PackTimes
from simulations.plan import Plan
from simulations.plan_words import show
from simulations.researcher import PrivacyFile, SiteNotes, epsilon_spent
from simulations.shard_plan import busiest
from simulations.trainers import TrainerEvaluator

Baselines = Callable[["Run"], Mapping[str, float]]


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        plan: What it is going to do.
        folder: Its folder.
        evaluator: The trainers, at work on it.
        description: What a trainer reports of itself.
        accounts: The clients' privacy accounts, which are on this machine; None without DP.
        console: Where progress goes.
    """

    plan: Plan
    folder: RunFolder
    evaluator: TrainerEvaluator
    description: Description
    accounts: Accounts | None
    console: Console


@final
class Run:
    """A run between its start and its last round.

    Args:
        parts: What it is made of.
        started: When it started, by ``time.monotonic``.

    Attributes:
        flower: The strategy under Flower, with the server's state.
        lines: The lines of ``metrics.jsonl``.
        before: Metrics before the first round, by column.
        sums: Each client's sums of its own rows' facts under its own model, after the last round.
    """

    def __init__(self, parts: Parts, started: float) -> None:
        self.parts, self.plan, self.started = parts, parts.plan, started
        self.task = TASKS[parts.plan.config.task]
        self.flower = FlowerStrategy(parts.plan.strategy, parts.plan.federation, nodes=_nodes(parts))
        self.lines: list[dict[str, Any]] = []
        self.before: dict[str, float] = {}
        self.sums: Mapping[int, Sums] = {}
        self.privacy = PrivacyFile(parts.plan, parts.folder, parts.accounts, parts.description.device)
        self._losses = TrainerLosses(parts.evaluator.pool, parts.folder, parts.console)
        self._trackers: Trackers | None = None

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The server's tensors."""
        return self.flower.state.tensors

    @property
    def evaluator(self) -> TrainerEvaluator:
        """The trainers, for clients with the ranks and experts that they have now."""
        return self.parts.evaluator.at(self.flower.strategy)

    def rounds(self, grid: Grid) -> None:
        """Run the rounds that are left."""
        completed = self._start()
        observers = self._observers()
        try:
            self.flower.start(
                grid,
                named_arrays(self.flower.state.tensors),
                num_rounds=self.plan.config.rounds,
                timeout=self.plan.config.federation.timeout,
                evaluate_fn=self._measure_start,
                on_round=lambda number, result: self._observe(observers, number, result),
                completed=completed,
            )
        finally:
            self.privacy.write(self.flower.state.clients)  # what a round that did not end has cost, too
            self._losses.write()
        personal = self.flower.personal
        if personal is not None and not self.sums:
            self.sums = personal.sums  # of a run that was continued after its last round

    def close(self, outcome: Mapping[str, Any] | None) -> None:
        """Tell the trackers what the run came to; None: it failed."""
        if self._trackers is not None:
            self._trackers.close(outcome)

    # -- the start ----------------------------------------------------------------------------------------

    def _start(self) -> int:
        """Restore or make the server's state, show and write what is known, and return the rounds behind it."""
        parts, config = self.parts, self.plan.config
        checkpoint = parts.folder.read_checkpoint(parts.description.resumed) if config.run.resume else None
        if checkpoint is None:
            # By one trainer, since others round differently: it is for the server to send.
            (own,) = parts.evaluator.pool.results(lambda worker, _: worker.start(), [None])
            self.flower.state = self.plan.strategy.initial({**parts.description.initial(config), **own})
        else:
            self._restore(checkpoint)
        completed = checkpoint.round if checkpoint is not None else 0
        show(self.plan, parts.console)
        if checkpoint is not None:
            parts.console.print(f"resumed after round {completed}")
            if checkpoint.state["packing"] != self._packing():
                parts.console.print(
                    f"note: packs were made with {checkpoint.state['packing']} and are now with {self._packing()}: the "
                    "rest agrees with an undisturbed run within rounding, not to the bit"
                )
        self._write_start()
        if not parts.console.quiet and completed < config.rounds:
            parts.folder.write_json("plan.json", self.plan.record(self._estimate(completed)))
        return completed

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.flower.state = ServerState.read(checkpoint.arrays, checkpoint.state["clients"])
        self.lines = read_lines(self.parts.folder.path / "metrics.jsonl")
        self.before = checkpoint.state["before"]
        self.started -= checkpoint.state["seconds"]

    def _packing(self) -> dict[str, int]:
        """What decides, beside the configuration, which clients are packed together."""
        return {"trainers": self.plan.trainers}

    def _write_start(self) -> None:
        folder, data = self.parts.folder, self.plan.data
        folder.write_json(
            "partition.json",
            {
                "classes": list(data.categories),
                "counts": data.label_counts().tolist(),
                "names": list(data.names),
            },
        )
        folder.write_json("plan.json", self.plan.record())
        self.privacy.write(self.flower.state.clients)
        if not self.parts.console.quiet:  # of a cell of a sweep `fedlora report` draws figures
            plot_partition(Report.read(folder.path))
        folder.write_json("environment.json", environment(code_fingerprint((*CLIENT_PACKAGES, "strategies"))[0]))
        described = self.parts.description
        self.parts.console.print(
            f"{self.plan.trainers} trainer(s) of {described.threads} thread(s) on {described.device}"
        )

    def _estimate(self, completed: int) -> Speed:
        """Print how long the rounds will take, by a short probe, and return what it measured."""
        plan, number = self.plan, completed + 1
        cohort, roles = plan.federation.cohort(number), plan.strategy.all_roles(number)
        speed = self.evaluator.probe(self.tensors, roles, number, cohort)
        rounds = plan.config.rounds - completed
        train_s = plan.examples(rounds) * speed.row_tokens * speed.train_s
        measured = rounds * speed.measured_tokens
        if plan.strategy.has_personal:
            measured = int(rounds * sum(map(len, plan.data.holdout)) * speed.row_tokens)
        total_s = (train_s + measured * speed.evaluate_s) / plan.trainers
        self.parts.console.print(
            f"estimate from a probe: {human_time(total_s)} for {rounds} round(s), at {1 / speed.train_s:,.0f} tokens/s "
            f"in training and {1 / speed.evaluate_s:,.0f} in evaluation on each trainer"
        )
        for line in busiest(plan.shards, plan.packs, speed):
            self.parts.console.print(line, markup=False)
        return speed

    # -- rounds -------------------------------------------------------------------------------------------

    def _observers(self) -> list[Observer]:
        """Return what watches the rounds, in order."""
        parts, plan, personal = self.parts, self.plan, self.plan.strategy.has_personal
        metrics = MetricsFile(parts.folder, plan.strategy, self.task.metric_names, self.lines)
        beside = train_loss if plan.privacy is None else epsilon_spent(plan)
        notes = [] if parts.accounts is None else [SiteNotes(parts.accounts, parts.console, plan.federation.cohort)]
        self._trackers = Trackers(plan.config, parts.folder, self.lines)
        measuring = PersonalMetrics(self.task, self._personal_sums) if personal else self._evaluation()
        return [
            measuring,
            self.privacy,
            metrics,
            self._trackers,
            Checkpoints(parts.folder, self._checkpoint_facts),
            Progress(parts.console, plan.config.rounds, plan.measure, beside),
            self._losses,
            PackTimes(parts.evaluator.pool, parts.folder),
            *notes,
        ]

    def _evaluation(self) -> ServerEvaluation:
        split = self.plan.measured
        return ServerEvaluation(self.evaluator, self.task, split, len(self.plan.data.corpus.splits[split]))

    def _observe(self, observers: list[Observer], server_round: int, result: Result) -> None:
        if server_round == 0:
            return
        replies = self.flower.replies
        assert replies is not None, "a round leaves its replies"
        end = RoundEnd(server_round, self.flower.state, replies, result.train_metrics_clientapp[server_round])
        for observer in observers:
            observer.on_round(end)

    def _measure_start(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Measure a language model before the first round; an untrained head has nothing to show."""
        if server_round or self.plan.strategy.has_personal or self.task.has_head:
            return None
        metrics = self._evaluation().measure(self.flower.state)
        self.before = {f"before_{name}": value for name, value in metrics.items()}
        value = metrics[self.task.measure.name]
        self.parts.console.print(f"before training: {self.plan.measure.replace('_', ' ')} {value:.4f}")
        return None

    def _personal_sums(self, end: RoundEnd) -> Mapping[int, Sums]:
        """Return what clients reported of their own rows; under DP, where they do not, what the researcher may see."""
        if self.plan.privacy is None:
            assert self.flower.personal is not None, "clients were asked after the round"
            self.sums = self.flower.personal.sums
        else:
            self.sums = self.evaluate_clients(end.round)
        return self.sums

    def evaluate_clients(self, server_round: int) -> Mapping[int, Sums]:
        """Return the sums of clients' rows under their own models after a round, by the trainers themselves."""
        state, roles = self.flower.state, self.plan.strategy.all_roles(server_round + 1)
        return self.evaluator.personal(state.tensors, roles, server_round + 1, sorted(state.clients.trained))

    def _checkpoint_facts(self) -> dict[str, Any]:
        return {
            "strategy": self.plan.strategy.name,
            **self.parts.description.resumed,
            "packing": self._packing(),
            "before": self.before,
            "seconds": time.monotonic() - self.started,
        }


def _nodes(parts: Parts) -> DealtNodes:
    plan = parts.plan
    return DealtNodes(parts.evaluator.pool, plan.config.engine.pack, plan.work, plan.most_clients)
