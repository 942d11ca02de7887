"""The trainers of a run, wherever Ray put them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.util import list_named_actors

from clients.trainer import Job, Trainer

_logger = logging.getLogger(__name__)
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


class TrainerLostError(RuntimeError):
    """A trainer is gone, or never came."""


class JobHolder:
    """Where a trainer finds its job, also one that was restarted and remembers nothing.

    Args:
        job: What the trainers work on.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def put(self, job: Job) -> None:
        """Take a new job."""
        self._job = job

    def job(self) -> Job:
        """Return the job."""
        return self._job


class TrainerPool:
    """Named Ray actors, one a shard.

    A trainer that dies is restarted, with a fresh base model, and the packs it was given are repeated; one
    that dies over and over fails its packs.

    Args:
        actors: Handles of :class:`clients.trainer.Trainer` actors, in order of their names.
        desk: Handle of the :class:`JobHolder` actor, with the pool that started them.
    """

    def __init__(self, actors: Sequence[Any], desk: Any = None) -> None:
        self.actors = list(actors)
        self.desk = desk

    @classmethod
    def start(cls, run_id: int, shards: Sequence[Shard], job: Job) -> TrainerPool:
        """Start one trainer for each shard on the Ray cluster that this process is connected to."""
        desk = ray.remote(JobHolder).options(num_cpus=0).remote(job)
        remote = ray.remote(Trainer)
        actors = [
            remote.options(
                name=f"{run_id}/trainer-{number:04d}",
                namespace=_NAMESPACE,
                num_cpus=0,  # Flower's own actors reserve all CPUs; threads are what a shard limits
                num_gpus=shard.gpus,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
            ).remote(partial(_job_at, desk), shard.threads)
            for number, shard in enumerate(shards)
        ]
        return cls(actors, desk)

    def assign(self, job: Job) -> None:
        """Give all trainers a new job."""
        ray.get(self.desk.put.remote(job))
        self.call_all("renew", [()] * len(self))

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

    def call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], *, first: int = 0, timeout: float | None = None
    ) -> list[Any]:
        """Call a trainer's method once for each of ``arguments``, side by side.

        Args:
            method: Name of a method of :class:`clients.trainer.Trainer`.
            arguments: Tuples of positional arguments.
            first: The trainer that gets the first of them.
            timeout: Seconds to wait for all of them; None: as long as it takes.

        Returns:
            For each argument the result, or the exception that it ended with. What a trainer could not do because
            it died for good is done by another.
        """
        count = len(self.actors)
        places = [(first + number) % count for number in range(len(arguments))]
        calls = [self._submit(place, method, argument) for place, argument in zip(places, arguments, strict=True)]
        outcomes = [_outcome(call, timeout) for call in calls]
        for number, place in enumerate(places):
            for other in range(place + 1, place + count):
                if not isinstance(outcomes[number], TrainerLostError):
                    break
                outcomes[number] = _outcome(self._submit(other % count, method, arguments[number]), timeout)
        return outcomes

    def call_all(self, method: str, arguments: Sequence[tuple[Any, ...]], *, timeout: float | None = None) -> list[Any]:
        """Like :meth:`call`, but raise the first exception among the outcomes."""
        outcomes = self.call(method, arguments, timeout=timeout)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return outcomes

    def _submit(self, place: int, method: str, argument: tuple[Any, ...]) -> Any:
        return getattr(self.actors[place], method).remote(*argument)

    def stop(self) -> None:
        """End the trainers; on a cluster that outlives the run they would stay otherwise."""
        for actor in [*self.actors, *([self.desk] if self.desk is not None else [])]:
            try:
                ray.kill(actor, no_restart=True)
            except ray.exceptions.RayError as error:
                _logger.debug("a trainer was gone already: %s", error)


def _job_at(desk: Any) -> Job:
    job: Job = ray.get(desk.job.remote())
    return job


def _outcome(call: Any, timeout: float | None) -> Any:
    try:
        return ray.get(call, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.GetTimeoutError:
        return TrainerLostError(
            f"a trainer did not start within {timeout:.0f} s: its share of a GPU may be taken. engine.trainers must "
            "fit the GPUs, and --federation-config must leave them alone: Flower's own actors need none."
        )
    except ray.exceptions.RayError as error:
        _logger.error("a trainer died: %s", error)  # Ray quotes what a process said last, so it stays in this log
        return TrainerLostError("a trainer died and was not to be restarted; the site's log says why")
