"""The trainers of a run, wherever Ray put them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import list_named_actors

from clients.trainer import Trainer
from fedlora.config import Scalar
from fedlora.data import FederatedData

_NAMESPACE = "fedlora"
_RESTARTS = 3


@dataclass(frozen=True)
class Shard:
    """What one trainer owns.

    Attributes:
        threads: CPU threads.
        gpus: Share of a GPU; 0 on a machine without one.
    """

    threads: int
    gpus: float


def split_packs(clients: Sequence[int], pack: int, trainers: int) -> list[tuple[int, ...]]:
    """Cut a node's clients, ascending, into packs.

    Args:
        clients: The clients.
        pack: Clients a pack (``engine.pack``); 0: as many as give every trainer one pack, 64 at most.
        trainers: Number of trainers.
    """
    ordered = sorted(clients)
    size = pack or max(1, min(64, -(-len(ordered) // trainers)))
    return [tuple(ordered[at : at + size]) for at in range(0, len(ordered), size)]


class TrainerPool:
    """Named Ray actors, one a shard.

    A trainer that dies is restarted, with a fresh base model, and the packs it was given are repeated; one
    that dies over and over fails its packs.

    Args:
        actors: Handles of :class:`clients.trainer.Trainer` actors, in order of their names.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)

    @classmethod
    def start(
        cls, run_id: int, shards: Sequence[Shard], flat: Mapping[str, Scalar], data: FederatedData, private_folder: str
    ) -> TrainerPool:
        """Start one trainer for each shard on the Ray cluster that this process is connected to."""
        stored = ray.put(data)
        remote = ray.remote(Trainer)
        return cls(
            [
                remote.options(
                    name=f"{run_id}/trainer-{number:04d}",
                    namespace=_NAMESPACE,
                    num_cpus=0,  # Flower's own actors reserve all CPUs; threads are what a shard limits
                    num_gpus=shard.gpus,
                    max_restarts=_RESTARTS,
                    max_task_retries=_RESTARTS,
                ).remote(dict(flat), stored, shard.threads, private_folder)
                for number, shard in enumerate(shards)
            ]
        )

    @classmethod
    def connect(cls, run_id: int) -> TrainerPool:
        """Return the trainers that the server of this run started.

        Raises:
            RuntimeError: There are none.
        """
        names = sorted(
            entry["name"]
            for entry in list_named_actors(all_namespaces=True)
            if entry["namespace"] == _NAMESPACE and entry["name"].startswith(f"{run_id}/")
        )
        if not names:
            raise RuntimeError(f"run {run_id} has no trainers on this Ray cluster; was its server stopped?")
        return cls([ray.get_actor(name, namespace=_NAMESPACE) for name in names])

    def __len__(self) -> int:
        """Return the number of trainers."""
        return len(self.actors)

    def call(self, method: str, arguments: Sequence[Any], *, first: int = 0) -> list[Any]:
        """Call a trainer's method once for each of ``arguments``, side by side.

        Args:
            method: Name of a method of :class:`clients.trainer.Trainer`.
            arguments: Tuples of positional arguments.
            first: The trainer that gets the first of them.

        Returns:
            For each argument the result, or the exception that it ended with.
        """
        calls = [
            getattr(self.actors[(first + number) % len(self.actors)], method).remote(*argument)
            for number, argument in enumerate(arguments)
        ]
        return [_outcome(call) for call in calls]

    def stop(self) -> None:
        """End the trainers; on a cluster that outlives the run they would stay otherwise."""
        for actor in self.actors:
            try:
                ray.kill(actor, no_restart=True)
            except ray.exceptions.RayError as error:
                logging.getLogger(__name__).debug("a trainer was gone already: %s", error)


def _outcome(call: Any) -> Any:
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.RayError as error:
        return RuntimeError(f"the trainer died {_RESTARTS + 1} times ({type(error).__name__})")
