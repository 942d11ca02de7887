"""A session: the nodes and trainers that outlive a single run, so that a run need not pay for their start."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from flwr.app import Context
from flwr.serverapp import Grid
from rich.console import Console

from clients.accounts import Accounts
from clients.errors import RefusedError
from clients.limits import SiteLimits
from clients.own_disk import check_folder, folder_id
from clients.pool import TrainerPool, machines
from clients.shards import Shard
from clients.site import Description, Job
from fedlora import plugins
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.methods import tensors_digest
from fedlora.runs.folder import RunFolder, run_path
from fedlora.server import FederationError
from simulations.baselines import Federated, run_baselines
from simulations.cluster import shards_of_a_run
from simulations.finish import finish
from simulations.plan import Plan
from simulations.run import Parts, Run
from simulations.scores import score
from simulations.setup import federation_of, settle
from simulations.trainers import TrainerEvaluator
from strategies import STRATEGIES
from strategies.build import build_strategy

_START_TIMEOUT_S = 600.0  # a large base model takes minutes to load


class Session:
    """Runs one configuration after another on the same nodes and trainers.

    Args:
        grid: The way to the SuperNodes.
        nodes: How many there are.
        start: Starts trainers, one for each of some shards, at work on a job.
        shards: Returns the shards that a run is to have.
    """

    def __init__(
        self,
        grid: Grid,
        nodes: int,
        start: Callable[[Sequence[Shard], Job], TrainerPool],
        shards: Callable[[Config], list[Shard]],
    ) -> None:
        self.grid, self.nodes = grid, nodes
        self._start, self._cut = start, shards
        self._pool: TrainerPool | None = None
        self._shards: list[Shard] = []

    @classmethod
    def under_flower(cls, grid: Grid, context: Context) -> Session:
        """Return the session of a ServerApp, whose trainers are on the Ray cluster that Flower has started or joined.

        Raises:
            FederationError: There is no SuperNode, or no Ray.
        """
        nodes = _wait_for_nodes(grid)

        def start(shards: Sequence[Shard], job: Job) -> TrainerPool:
            return TrainerPool.start(context.run_id, shards, job, share=True)

        return cls(grid, nodes, start, lambda config: shards_of_a_run(config, machines()))

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
        (row_tokens,) = pool.results(lambda worker, _: worker.row_tokens(), [None])
        plan = Plan(
            config=config,
            data=data,
            strategy=strategy,
            federation=federation_of(config),
            family=description.family,
            num_parameters=description.num_parameters,
            num_layers=description.num_layers,
            nodes=self.nodes,
            trainers=len(pool),
            remarks=description.remarks,
            shards=tuple(self._shards),
            base_bytes=description.base_bytes,
            row_tokens=tuple(row_tokens),
        )
        # Not before: a model that is not there should not take the run's name.
        with RunFolder.opened(config, STRATEGIES[config.strategy.name].laid_out(config)) as folder:
            apart = len({shard.node for shard in self._shards}) > 1 and plan.keeps_at_clients
            known = check_disk(pool, config) if apart else ""
            job = Job(config.to_flat(), data, _limits(config), folder_id=known, agreed=description.agreed)
            pool.expect(job)
            evaluator = TrainerEvaluator(pool, config.engine.pack, strategy, plan.most_clients)
            accounts = Accounts(_limits(config), config) if config.privacy.mode == "dp" else None
            run = Run(Parts(plan, folder, evaluator, description, accounts, console), started)
            outcome: dict[str, Any] | None = None
            try:
                run.rounds(self.grid)
                outcome = finish(run, lambda: self._baselines(run))
            finally:
                run.close(outcome)
            return outcome

    def _baselines(self, run: Run) -> dict[str, float]:
        """Run what a run is compared with, and return its numbers."""
        plan, rounds = run.plan, run.lines[-1]["round"]
        federated = Federated(
            config=plan.config,
            data=plan.data,
            folder=run.parts.folder.path,
            rounds=rounds,
            examples=plan.examples(rounds),
            steps=plan.privacy.mechanism.steps if plan.privacy is not None else None,
            frozen=frozenset(plan.strategy.all_roles(1)) - plan.strategy.trained_kinds,
        )

        def run_one(config: Config, data: FederatedData, frozen: frozenset[str]) -> dict[str, Any]:
            return self.run(config, Console(quiet=True), data, frozen)

        def score_alone(
            config: Config, frozen: frozenset[str], clients: Sequence[int], split: str
        ) -> list[dict[str, Any]]:
            strategy = build_strategy(config, run.parts.description.specs, frozen)
            evaluator = TrainerEvaluator(self.assigned(config, plan.data), config.engine.pack, strategy)
            sums = evaluator.personal({}, strategy.all_roles(1), config.rounds + 1, clients, split)
            return [score(run.task, client, one) for client, one in sums.items()]

        return run_baselines(federated, run_one, score_alone, run.parts.console)

    def stop(self) -> None:
        """End the trainers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool = None

    def assigned(self, config: Config, data: FederatedData) -> TrainerPool:
        """Return trainers at work on a run: those that are there, or new ones where they should be others."""
        job = Job(config.to_flat(), data, _limits(config))
        shards = self._cut(config)
        if self._pool is not None and self._shards == shards:
            self._pool.assign(job)
            return self._pool
        self.stop()
        self._shards = shards
        self._pool = self._start(shards, job)
        return self._pool


def _limits(config: Config) -> SiteLimits:
    """Return the limits of a simulation's sites: none, but for where their clients' folders are."""
    return SiteLimits(str(run_path(config) / "sites"))


def check_trainers(pool: TrainerPool, config: Config) -> Description:
    """Return a trainer's description, having compared all of them with each other and the server.

    Raises:
        ValueError: The model cannot be loaded or adapted, or the trainers run other code or hold other tensors.
        TrainerLostError: A trainer did not start.
    """
    pool.everywhere(lambda worker, _: worker.load(), timeout=_START_TIMEOUT_S)
    described = pool.everywhere(lambda worker, _: worker.describe())
    own, folders = plugins.fingerprint(config.run.plugins)
    first = described[0]
    initial_digest = tensors_digest(first.initial(config))
    for other in described:
        digest, elsewhere = other.fingerprint
        if digest != own:
            raise ValueError(
                f"the server runs the code in {folders}, but a trainer on {other.host} imported {elsewhere}: on a "
                "machine of a Ray cluster the same commit of fedlora must be installed; on this one, a SuperLink that "
                "was started in another checkout lends trainers its working directory: end that flower-superlink "
                "process and start the run again from here."
            )
        if other.digest != first.digest:
            raise ValueError(
                "the trainers do not hold the same base model, quantised alike, and tokenizer: "
                f"model.name = {config.model.name!r} must be the same files on every machine, and so must the versions "
                "of transformers and bitsandbytes."
            )
        if (other.initial_digest, other.constants_digest) != (initial_digest, first.constants_digest):
            raise ValueError(
                "the trainers do not draw the same seeded tensors or indices as the server: seed and the method's keys "
                "must be the same on every machine, and nothing may change what they give."
            )
    return first


def check_disk(pool: TrainerPool, config: Config) -> str:
    """Return what the folder of what clients keep is known by; refuse machines that do not share it.

    What a client kept on one machine's disk would be missing where it is dealt to another machine: a ledger that
    began anew there would be a new budget.

    Raises:
        ValueError: They do not.
    """
    limits = _limits(config)
    known = folder_id(Path(limits.folder))
    try:
        pool.everywhere(lambda worker, _: check_folder(Path(limits.folder), known))
    except RefusedError:
        raise ValueError(
            f"run.dir = {config.run.dir!r}: not every machine of the Ray cluster sees {limits.folder}, where "
            "clients keep their privacy ledgers and what they do not send; set run.dir to storage that all of them "
            "share."
        ) from None
    return known


def _wait_for_nodes(grid: Grid) -> int:
    """Wait until Ray runs; return the number of SuperNodes, which Flower registers, all of them, before."""
    end = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < end:
        nodes = len(list(grid.get_node_ids()))
        if nodes and ray.is_initialized():
            return nodes
        time.sleep(0.1)
    raise FederationError(f"no SuperNode or no Ray after {_START_TIMEOUT_S:.0f} s")
