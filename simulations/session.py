"""A session: the nodes and trainers that outlive a single run, so that a run need not pay for their start."""

from __future__ import annotations

import time
from typing import Any

import ray
from flwr.app import Context
from flwr.serverapp import Grid
from rich.console import Console

from clients.pool import Shard, TrainerPool
from clients.trainer import Description, Job
from fedlora import plugins
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.methods import initial_tensors, tensors_digest
from fedlora.runs.folder import RunFolder, run_path
from fedlora.seeded import Seeded
from simulations.plan import Plan
from simulations.setup import build_strategy, plan_shards, settle
from simulations.simulation import Simulation
from strategies import FederationError

_START_TIMEOUT_S = 600.0  # a large base model takes minutes to load


class Session:
    """Runs one configuration after another on the same nodes and trainers.

    Args:
        grid: The way to the SuperNodes.
        context: Of the ServerApp.
    """

    def __init__(self, grid: Grid, context: Context) -> None:
        self.grid = grid
        self.run_id = context.run_id
        self.nodes = _wait_for_nodes(grid)
        self._pool: TrainerPool | None = None
        self._shards: list[Shard] = []

    def run(
        self,
        config: Config,
        console: Console,
        data: FederatedData | None = None,
        frozen: frozenset[str] = frozenset(),
    ) -> dict[str, Any]:
        """Run a configuration and fill its run folder.

        Args:
            config: The resolved configuration.
            console: Where progress goes.
            data: The federated data, where they are not what the configuration would load.
            frozen: Kinds of tensors that stay as the seed gives them, whatever the strategy does with them.

        Returns:
            What ``result.json`` holds.

        Raises:
            ValueError: The configuration, the data or the model cannot work.
            FederationError: Too many clients failed.
            TrainerLostError: Trainers died for good.
        """
        started = time.monotonic()
        config, data = settle(config, self.nodes, data)
        pool = self.assigned(config, data)
        description = check_trainers(pool, config)
        strategy = build_strategy(config, description.specs, frozen)
        plan = Plan(
            config=config,
            data=data,
            strategy=strategy,
            family=description.family,
            num_parameters=description.num_parameters,
            num_layers=description.num_layers,
            nodes=self.nodes,
            trainers=len(pool),
        )
        # Not before: a model that is not there should not take the run's name.
        folder = RunFolder.resume(config) if config.run.resume else RunFolder.create(config)
        with folder.held():
            return Simulation(plan, folder, pool, description, console, self, started).run(self.grid)

    def stop(self) -> None:
        """End the trainers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def assigned(self, config: Config, data: FederatedData) -> TrainerPool:
        """Return trainers at work on a run: those that are there, or new ones where they should be others."""
        job = Job(config.to_flat(), data, str(run_path(config) / "sites"))
        shards = plan_shards(ray.cluster_resources(), config.engine.trainers)
        if self._pool is not None and self._shards == shards:
            self._pool.assign(job)
            return self._pool
        self.stop()
        self._shards = shards
        self._pool = TrainerPool.start(self.run_id, shards, job)
        return self._pool


def check_trainers(pool: TrainerPool, config: Config) -> Description:
    """Return a trainer's description, having compared all of them with each other and the server.

    Raises:
        ValueError: The model cannot be loaded or adapted, or the trainers run other code or hold other tensors.
        TrainerLostError: A trainer did not start.
    """
    described: list[Description] = pool.call_all("describe", [()] * len(pool), timeout=_START_TIMEOUT_S)
    own, folders = plugins.fingerprint(config.run.plugins)
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
        if (other.initial_digest, other.constants_digest) != (initial_digest, first.constants_digest):
            raise ValueError(
                "the trainers do not draw the same seeded tensors or indices as the server: seed and the method's keys "
                "must be the same on every machine, and nothing may change what they give."
            )
        if other.digest != first.digest:
            raise ValueError(
                "the trainers do not hold the same base model and tokenizer: "
                f"model.name = {config.model.name!r} must be the same files on every machine."
            )
    return first


def _wait_for_nodes(grid: Grid) -> int:
    """Wait until Ray runs; return the number of SuperNodes, which Flower registers, all of them, before."""
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        nodes = len(list(grid.get_node_ids()))
        if nodes and ray.is_initialized():
            return nodes
        time.sleep(0.1)
    raise FederationError(f"no SuperNode or no Ray after {_START_TIMEOUT_S:.0f} s")
