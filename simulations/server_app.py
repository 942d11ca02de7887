"""The Flower ServerApp: one federated run in a simulation, from configuration to run folder."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import ray
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from rich.console import Console

from clients.pool import TrainerLostError, TrainerPool
from clients.trainer import Description
from fedlora.config import Config
from fedlora.data import FederatedData, load_federated
from fedlora.fingerprint import CLIENT_PACKAGES, code_fingerprint
from fedlora.methods import initial_tensors, tensors_digest
from fedlora.runs.card import model_card
from fedlora.runs.folder import RunFolder, environment, run_path
from fedlora.runs.report import Run, clients_table, human_bytes, metrics_table, plot_partition, write_report
from fedlora.seeded import Seeded
from fedlora.wire import from_named_arrays, named_arrays
from simulations.setup import build_strategy, plan_shards, resolve
from strategies import FederationError, RoleStrategy

_START_TIMEOUT_S = 600.0  # a large base model takes minutes to load
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run configuration describes."""
    console = Console(width=100, highlight=False, soft_wrap=True)
    try:
        simulate(grid, context, console)
    except (ValueError, FederationError, TrainerLostError) as error:
        console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        raise


def simulate(grid: Grid, context: Context, console: Console) -> None:
    """Run a simulation and fill its run folder.

    Raises:
        ValueError: The configuration, the data or the model cannot work.
        FederationError: Too many clients failed.
    """
    started = time.monotonic()
    config = resolve(context.run_config)
    nodes = _wait_for_nodes(grid)
    if config.federation.num_clients == 0:
        # Checks federation.clients-per-round against the number of nodes, too.
        config = replace(config, federation=replace(config.federation, num_clients=nodes))
    data = load_federated(config, config.federation.num_clients)
    console.print(clients_table(list(data.corpus.classes), data.label_counts().tolist()))

    shards = plan_shards(ray.cluster_resources(), config.engine.trainers)
    pool = TrainerPool.start(context.run_id, shards, config.to_flat(), data, str(run_path(config) / "private"))
    try:
        description = check_trainers(pool, config)
        folder = RunFolder.create(config)  # not before: a model that is not there should not take the run's name
        Simulation(config, data, folder, pool, console, started).run(grid, description)
    finally:
        pool.stop()


def check_trainers(pool: TrainerPool, config: Config) -> Description:
    """Return a trainer's description, having compared all of them with each other and the server.

    Raises:
        ValueError: The model cannot be loaded or adapted, or the trainers run other code or hold other tensors.
        TrainerLostError: A trainer did not start.
    """
    described: list[Description] = call_all(pool, "describe", [()] * len(pool), timeout=_START_TIMEOUT_S)
    own, folders = code_fingerprint()
    first = described[0]
    initial_digest = tensors_digest(initial_tensors(first.specs, Seeded(config.seed), config.engine.tensor_dtype))
    for other in described:
        digest, elsewhere = other.fingerprint
        if digest != own:
            raise ValueError(
                f"the server runs the code in {folders}, but the trainers imported {elsewhere}: a SuperLink that was "
                "started in another checkout lends them its working directory. End that flower-superlink process and "
                "start the run again from here."
            )
        if other.digest != first.digest or other.initial_digest != initial_digest:
            raise ValueError(
                "the trainers do not hold the same base model, tokenizer or seeded tensors as the server: "
                f"model.name = {config.model.name!r} must be the same files on every machine."
            )
    return first


def call_all(
    pool: TrainerPool, method: str, arguments: list[tuple[Any, ...]], *, timeout: float | None = None
) -> list[Any]:
    """Call trainers and raise the first exception among their outcomes."""
    outcomes = pool.call(method, arguments, timeout=timeout)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


class Simulation:
    """One run: its parts, and what happens around the strategy's rounds.

    Args:
        config: The resolved configuration.
        data: The federated data.
        folder: The run folder.
        pool: The trainers.
        console: Where progress goes.
        started: When the run started, by ``time.monotonic``.
    """

    def __init__(
        self,
        config: Config,
        data: FederatedData,
        folder: RunFolder,
        pool: TrainerPool,
        console: Console,
        started: float,
    ) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.pool = pool
        self.console = console
        self.started = started
        self.round_started = started
        self.metrics: list[dict[str, Any]] = []

    def run(self, grid: Grid, description: Description) -> None:
        """Run the rounds and write the run's files."""
        strategy = build_strategy(self.config, description.specs)
        self._write_start(strategy, description)
        initial = initial_tensors(description.specs, Seeded(self.config.seed), self.config.engine.tensor_dtype)
        exchanged = strategy.exchanged(1)

        def on_round(server_round: int, arrays: ArrayRecord, result: Result) -> None:
            self._on_round(strategy, server_round, arrays, result)

        self.round_started = time.monotonic()
        result = strategy.start(
            grid,
            named_arrays({name: initial[name] for name in exchanged}),
            num_rounds=self.config.rounds,
            timeout=self.config.federation.timeout,
            evaluate_fn=self._evaluate,
            on_round=on_round,
        )
        self._finish(result)

    def _call(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        return call_all(self.pool, method, arguments)

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate the server's tensors on the test rows, all trainers side by side."""
        if server_round == 0 or self.config.method.head == "private":
            return None
        tensors = from_named_arrays(arrays)
        rows = len(self.data.corpus.test)
        shares = [list(range(first, rows, len(self.pool))) for first in range(len(self.pool))]
        sums: dict[str, float] = {}
        for part in self._call("evaluate", [(tensors, share) for share in shares if share]):
            for name, value in part.items():
                sums[name] = sums.get(name, 0.0) + value
        examples = sums.pop("examples")
        return MetricRecord({f"test_{name}": value / examples for name, value in sums.items()})

    def _on_round(self, strategy: RoleStrategy, server_round: int, arrays: ArrayRecord, result: Result) -> None:
        """Write a round's line, checkpoint and progress."""
        if server_round == 0:
            return
        now = time.monotonic()
        tally = strategy.tally
        assert tally is not None, "a round leaves a tally"
        test = result.evaluate_metrics_serverapp.get(server_round, MetricRecord())
        personal = result.evaluate_metrics_clientapp.get(server_round, MetricRecord())
        train = result.train_metrics_clientapp[server_round]
        line: dict[str, Any] = {
            "round": server_round,
            "test_accuracy": test.get("test_accuracy"),
            "test_loss": test.get("test_loss"),
            "personal_accuracy": personal.get("personal_accuracy"),
            "personal_loss": personal.get("personal_loss"),
            "personal_clients": personal.get("personal_clients"),
            "head": self.config.method.head,
            "train_loss": train["train_loss"],
            "clients_ok": train["clients_ok"],
            "clients_refused": train["clients_refused"],
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "message_bytes_up": tally.message_bytes_up,
            "message_bytes_down": tally.message_bytes_down,
            "seconds": now - self.round_started,
        }
        self.round_started = now
        self.metrics.append(line)
        self.folder.append("metrics.jsonl", line)
        for client, facts in sorted(tally.facts.items()):
            self.folder.append(
                "clients.jsonl",
                {"round": server_round, "client": client, **facts, "refused": tally.refused.get(client)},
            )
        self.folder.checkpoint(server_round, from_named_arrays(arrays), {"strategy": strategy.name})
        measure = self.config.method.measure
        accuracy = line[measure]
        self.console.print(
            f"round {server_round}/{self.config.rounds}  {measure.replace('_', ' ')} "
            f"{'-' if accuracy is None else f'{accuracy:.4f}'}  train loss {line['train_loss']:.4f}  "
            f"{line['clients_ok']} ok, {line['clients_refused']} refused  up {human_bytes(line['bytes_up'])}  "
            f"down {human_bytes(line['bytes_down'])}  {line['seconds']:.1f} s"
        )

    def _write_start(self, strategy: RoleStrategy, description: Description) -> None:
        """Write what is known before the first round."""
        roles = strategy.all_roles(1)
        counts = self.data.label_counts().tolist()
        self.folder.write_json("partition.json", {"classes": list(self.data.corpus.classes), "counts": counts})
        plot_partition(Run.read(self.folder.path))
        self.folder.write_json(
            "privacy.json",
            {"mode": "none", "guarantee": "none: what clients send is not protected by differential privacy"},
        )
        self.folder.write_json("environment.json", environment(code_fingerprint((*CLIENT_PACKAGES, "strategies"))[0]))
        self.console.print(
            f"{self.config.strategy.name} / {self.config.method.name} on {self.config.model.name} "
            f"({description.num_parameters:,} parameters) "
            f"with {len(self.pool)} trainer(s) of {description.threads} thread(s) on {description.device}; "
            + ", ".join(f"{kind} {role}" for kind, role in roles.items())
        )

    def _finish(self, result: Result) -> None:
        """Write adapter, result, summary and plots, and print the closing table."""
        arrays = result.arrays
        assert arrays is not None, "a run has a result"
        files = self._call("export", [(from_named_arrays(arrays),)])[0]
        last = self.metrics[-1]
        outcome: dict[str, Any] = {
            "head": self.config.method.head,
            **{name: last[name] for name in ("test_accuracy", "personal_accuracy") if last[name] is not None},
            "majority_share": self.data.corpus.majority_share(),
            "rounds": self.config.rounds,
            "bytes_up": int(np.sum([line["bytes_up"] for line in self.metrics])),
            "bytes_down": int(np.sum([line["bytes_down"] for line in self.metrics])),
            "seconds": time.monotonic() - self.started,
        }
        card = model_card(
            self.config, self.data.corpus.classes, [f"- {key}: {value}" for key, value in outcome.items()]
        )
        for name, content in {**files, "README.md": card.encode()}.items():
            self.folder.write_bytes(f"adapter/{name}", content)
        trainers = [asdict(described) for described in self._call("describe", [()] * len(self.pool))]
        kept = ("device", "threads", "pid", "base_loads", "digest")
        self.folder.write_json("trainers.json", [{key: trainer[key] for key in kept} for trainer in trainers])
        self.folder.write_json("result.json", outcome)
        run = Run.read(self.folder.path)
        write_report(run)
        self.console.print(metrics_table(run))
        self.console.print(f"run folder: {self.folder.path}", markup=False)
        self.console.print(f"next: fedlora report {self.folder.path}", markup=False)
        # A smaller rate than FFA-LoRA's: with both factors trained a step moves the product by more.
        other = {"ffa-lora": "'fedavg' train.learning-rate=0.005"}.get(self.config.strategy.name, "'ffa-lora'")
        self.console.print(f'      fedlora run -c "strategy.name={other}"', markup=False)


def _wait_for_nodes(grid: Grid) -> int:
    """Wait until Ray runs; return the number of SuperNodes, which Flower registers, all of them, before."""
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        nodes = len(list(grid.get_node_ids()))
        if nodes and ray.is_initialized():
            return nodes
        time.sleep(0.1)
    raise FederationError(f"no SuperNode or no Ray after {_START_TIMEOUT_S:.0f} s")
