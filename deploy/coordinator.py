"""A run of deployed sites, in the coordinator's ServerApp: start or resume, the rounds, and the signed adapter."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from numpy.typing import NDArray
from rich.console import Console

from clients.limits import SiteLimits
from clients.site import Description, Job
from clients.worker import Worker
from deploy.coordinator_file import SIGNING_KEY
from deploy.manifest import sign
from deploy.records import SitesPrivacy
from fedlora.config import Config, ConfigError
from fedlora.data import FederatedData, load_corpus
from fedlora.exchange import Tensors
from fedlora.generated import Answer, drawn_rows, scores
from fedlora.joining import JoinRequest
from fedlora.metrics import TRAFFIC
from fedlora.reports.card import model_card
from fedlora.reports.run import Run as Report
from fedlora.reports.summary import write_report
from fedlora.reports.tables import metrics_table, outcome_table
from fedlora.roles import Role
from fedlora.runs.folder import RunFolder, environment, read_lines, run_path
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
from fedlora.server.sites import Sites
from fedlora.state import ServerState
from fedlora.tasks import TASKS
from fedlora.wire import named_arrays
from simulations.plan import Plan
from simulations.plan_words import tensors_table
from simulations.privacy import settle_privacy
from simulations.rates import settle_rate
from simulations.researcher import epsilon_spent
from simulations.setup import federation_of
from strategies import STRATEGIES
from strategies.build import build_strategy


def run(grid: Grid, config: Config, console: Console) -> dict[str, Any]:
    """Run a configuration with deployed sites, from its last finished round if it has any.

    Args:
        grid: The way to the SuperNodes.
        config: The resolved configuration, with ``federation.sites``.
        console: Where progress goes.

    Returns:
        What ``result.json`` holds.

    Raises:
        ValueError: The configuration, the model or the server's own rows cannot work.
        FederationError: Too few sites came, or too many failed.
    """
    started = time.monotonic()
    names = config.federation.site_names
    roster = read_roster(config)
    config = settle_rate(settle_privacy(config, [config.privacy.client_size] * len(names)))
    corpus = load_corpus(config)
    nobody = tuple(np.zeros(0, dtype=np.int64) for _ in names)
    data = FederatedData(corpus, nobody, nobody, names)
    worker = Worker(lambda: Job(config.to_flat(), data, SiteLimits(str(run_path(config)))), os.cpu_count() or 1)
    worker.load()
    described = worker.describe()
    strategy = build_strategy(config, described.specs)
    plan = Plan(
        config=config,
        data=data,
        strategy=strategy,
        federation=federation_of(config),
        family=described.family,
        num_parameters=described.num_parameters,
        num_layers=described.num_layers,
        nodes=len(names),
        trainers=len(names),
        remarks=described.remarks,
    )
    own = described.join_report("")
    flat = config.to_flat()
    sites = Sites(
        roster,
        lambda name, client: JoinRequest(name, client, len(names), flat),
        own,
        needed=config.federation.min_replies,
        wait=config.federation.wait,
        grace=config.federation.grace,
        timeout=config.federation.timeout,
        say=lambda text: console.print(text, markup=False),
    )
    with RunFolder.opened(config, STRATEGIES[config.strategy.name].laid_out(config)) as folder:
        return _Deployment(plan, folder, OwnModel(worker), described, sites, console, started).run(grid)


def read_roster(config: Config) -> dict[str, int]:
    """Return each site's SuperNode, in the order of ``federation.sites``.

    Raises:
        ConfigError: The file cannot be read, or lacks a site.
    """
    path = config.federation.roster
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"federation.roster = {path!r}: cannot be read ({error}); `fedlora deploy superlink` writes it when it has "
            "registered the sites of coordinator.toml."
        ) from error
    missing = [name for name in config.federation.site_names if name not in known]
    if missing:
        raise ConfigError(
            f"federation.sites = {config.federation.sites!r}: {missing[0]!r} is not in {path}, which has "
            f"{', '.join(known)}; enter its public key in coordinator.toml, and start the SuperLink again."
        )
    return {name: int(known[name]) for name in config.federation.site_names}


@final
class OwnModel:
    """The coordinator's own model, for :class:`fedlora.server.evaluator.Evaluator`.

    Args:
        worker: Has it loaded.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def facts(self, tensors: Tensors, split: str, rows: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Return facts of each of these rows under the server's tensors, by name, [rows] each."""
        return self._worker.evaluate(tensors, split, list(rows))

    def answers(self, tensors: Tensors, split: str, rows: Sequence[int]) -> list[Answer]:
        """Return what the server's model writes for each of these rows."""
        return self._worker.answers(tensors, split, list(rows))

    def export(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int] = ()
    ) -> list[dict[str, bytes]]:
        """Return the files of a PEFT adapter for the server's tensors; those of sites are not here."""
        assert not clients, "sites' own tensors never leave them"
        return [self._worker.export(tensors)]


@final
class _Deployment:
    """A run between its start and its end."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        model: OwnModel,
        described: Description,
        sites: Sites,
        console: Console,
        started: float,
    ) -> None:
        self._plan, self._folder, self._model, self._described = plan, folder, model, described
        self._sites, self._console, self._started = sites, console, started
        self._task = TASKS[plan.config.task]
        self._flower = FlowerStrategy(plan.strategy, plan.federation, nodes=sites)
        self._privacy = SitesPrivacy(plan, folder, plan.data.names, self._device)
        self._lines: list[dict[str, Any]] = []

    def run(self, grid: Grid) -> dict[str, Any]:
        """Run the rounds that are left, and write what they came to."""
        config = self._plan.config
        completed = self._start()
        trackers = Trackers(config, self._folder, self._lines)
        observers = [*self._observers(), trackers]
        outcome: dict[str, Any] | None = None
        try:
            self._flower.start(
                grid,
                named_arrays(self._flower.state.tensors),
                num_rounds=config.rounds,
                timeout=config.federation.timeout,
                on_round=lambda number, result: self._observe(observers, number, result),
                completed=completed,
            )
            outcome = self._finish()
        finally:
            trackers.close(outcome)
        return outcome

    def _start(self) -> int:
        """Restore or make the server's state, say what will happen, and return the rounds behind it."""
        plan, config, folder, console = self._plan, self._plan.config, self._folder, self._console
        checkpoint = folder.read_checkpoint(self._described.resumed) if config.run.resume else None
        if checkpoint is None:
            self._flower.state = plan.strategy.initial(self._described.initial(config))
        else:
            self._flower.state = ServerState.read(checkpoint.arrays, checkpoint.state["clients"])
            self._lines = read_lines(folder.path / "metrics.jsonl")
            self._started -= checkpoint.state["seconds"]
            console.print(f"resumed after round {checkpoint.round}")
        classes = list(plan.data.corpus.classes)
        folder.write_json("partition.json", {"classes": classes, "counts": [], "names": list(plan.data.names)})
        folder.write_json("plan.json", plan.record())
        folder.write_json("environment.json", environment(self._described.fingerprint[0]))
        self._privacy.write()
        console.print(tensors_table(plan))
        for line in plan.remarks:
            console.print(line, markup=False)
        console.print(f"sites: {', '.join(plan.data.names)}; rounds: {config.rounds}; reported: {plan.measure}")
        console.print(f"privacy: {self._privacy.record['guarantee']}", markup=False)
        return checkpoint.round if checkpoint is not None else 0

    def _observers(self) -> list[Observer]:
        plan, folder = self._plan, self._folder
        own: list[Observer] = [PersonalMetrics(self._task, self._sums)]
        if plan.measured == "test":
            rows = len(plan.data.corpus.test)
            own = [ServerEvaluation(self._model, self._task, "test", rows)]
        return [
            *own,
            self._privacy,
            MetricsFile(folder, plan.strategy, self._task.metric_names, self._lines),
            Checkpoints(folder, self._checkpoint_facts),
            Progress(
                self._console, plan.config.rounds, plan.measure, epsilon_spent(plan) if plan.privacy else train_loss
            ),
        ]

    def _device(self) -> str:
        """Where the sites that have joined compute; under DP it decides where noise comes from."""
        devices = {report.device for report in self._sites.reports.values()}
        return "cuda" if devices - {"cpu"} else "cpu"

    def _sums(self, _: RoundEnd) -> Mapping[int, Mapping[str, float]]:
        """Return what sites reported of the rows that they hold out; under DP, nothing."""
        return self._flower.personal.sums if self._flower.personal is not None else {}

    def _observe(self, observers: Sequence[Observer], server_round: int, result: Result) -> None:
        if server_round == 0:
            return
        replies = self._flower.replies
        assert replies is not None, "a round leaves its replies"
        end = RoundEnd(server_round, self._flower.state, replies, result.train_metrics_clientapp[server_round])
        for observer in observers:
            observer.on_round(end)
        joined = {name: report.header() for name, report in self._sites.reports.items()}
        self._folder.write_json("sites.json", joined)

    def _checkpoint_facts(self) -> dict[str, Any]:
        return {
            "strategy": self._plan.strategy.name,
            **self._described.resumed,
            "seconds": time.monotonic() - self._started,
        }

    def _finish(self) -> dict[str, Any]:
        """Write the adapter, signed, and what the run came to."""
        plan, folder, console, last = self._plan, self._folder, self._console, self._lines[-1]
        config, tensors = plan.config, self._flower.state.tensors
        own = ("test_", "personal_")
        outcome: dict[str, Any] = {"head": last["head"], "rounds": last["round"]}
        outcome |= {name: value for name, value in last.items() if name.startswith(own) and value is not None}
        if config.eval.generate:
            rows = drawn_rows(config, len(plan.data.corpus.test))
            outcome |= scores(self._model.answers(tensors, "test", rows), "test")
        if plan.privacy is not None:
            outcome |= {**self._privacy.spent(), "delta": config.privacy.delta}
            outcome["guarantee"] = self._privacy.record["guarantee"]
        outcome |= {name: int(np.sum([line[name] for line in self._lines])) for name in TRAFFIC}
        outcome["seconds"] = time.monotonic() - self._started
        roles = plan.strategy.all_roles(config.rounds + 1)
        if any(role is Role.PERSONAL for kind, role in roles.items() if kind != "head"):
            console.print("no adapter is written: a part of each site's is personal, and never leaves it")
        else:
            (files,) = self._model.export(tensors, roles, config.rounds + 1)
            card = model_card(config, plan.data.corpus.classes, outcome, roles, self._privacy.record, last["round"], ())
            for name, content in {**files, "README.md": card.encode()}.items():
                folder.write_bytes(f"adapter/{name}", content)
            self._sign(last["round"])
        folder.write_json("result.json", outcome)
        report = Report.read(folder.path)
        write_report(report)
        console.print(metrics_table(report))
        console.print(outcome_table(report))
        console.print(f"run folder: {folder.path}", markup=False)
        return outcome

    def _sign(self, rounds: int) -> None:
        """Sign the adapter with the coordinator's key, where the SuperLink was given one."""
        named = os.environ.get(SIGNING_KEY, "")
        if not named:
            self._console.print(f"the adapter is not signed: {SIGNING_KEY} names no key")
            return
        config = self._plan.config
        sign(
            self._folder.path / "adapter",
            Path(named),
            run=config.run.name,
            rounds=rounds,
            base_model=config.model.name,
            base_digest=self._described.digest,
            guarantee=str(self._privacy.record["guarantee"]),
        )
        command = ["fedlora", "verify", str(self._folder.path / "adapter"), "--key", "adapter.pub"]
        self._console.print(f"signed: {shlex.join(command)}", markup=False)
