"""A site whose work is done by trainers on Ray: named actors that outlive Flower's processes and are restarted.

Flower's processes, which start trainers and hand them work, import this file and never torch. So the actor is a class
of two lines that imports the worker where it runs, and the work that is handed to it is a function of a worker: typed,
where a method's name would be a string.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

import ray
from ray.util import list_named_actors

from clients.errors import WITHHELD, SiteError
from clients.shards import Shard, split_packs
from clients.site import Description, Job
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.reduce import Reduction, fold

if TYPE_CHECKING:
    from clients.worker import Worker

_logger = logging.getLogger(__name__)
_NAMESPACE = "fedlora"
_RESTARTS = 3
_LEAVE_S = 10.0  # for which trainers that are ended may clear up; one that hangs is ended all the same

Item = TypeVar("Item")
Result = TypeVar("Result")


class TrainerLostError(RuntimeError):
    """A trainer is gone, or never came; the message may leave the site."""


@final
class JobHolder:
    """The actor that holds the job, so that a trainer which was restarted, and remembers nothing, finds it.

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


@final
class TrainerProcess:
    """The actor that works: a :class:`clients.worker.Worker` in a process of its own.

    Args:
        job: Returns the job.
        threads: CPU threads to use.
        shared: What the trainers of one machine know their tokenized rows by; empty: each has its own.
    """

    def __init__(self, job: Callable[[], Job], threads: int, shared: str = "") -> None:
        from clients.shared_rows import SharedRows  # and with it torch, in no other process
        from clients.worker import Worker

        self._worker = Worker(job, threads, shared=SharedRows(_ray_folder() / shared) if shared else None)

    def do(self, work: Callable[[Worker, Any], Any], item: Any) -> Any:
        """Do a piece of work and return its result."""
        return work(self._worker, item)


class TrainerPool:
    """The trainers of a run, wherever Ray put them.

    A trainer that dies is restarted, with a fresh base model, and the packs it was given are repeated; one
    that dies over and over fails its packs.

    Args:
        actors: Handles of the trainers, in order of their names.
        holder: Handle of the :class:`JobHolder` actor, with the pool that started them.
    """

    def __init__(self, actors: Sequence[Any], holder: Any = None) -> None:
        self.actors = list(actors)
        self.holder = holder

    @classmethod
    def start(
        cls, run_id: int, shards: Sequence[Shard], job: Job, process: type = TrainerProcess, *, share: bool = False
    ) -> TrainerPool:
        """Start one trainer for each shard on the Ray cluster that this process is connected to.

        Args:
            run_id: The run; by it the trainers are found.
            shards: What each trainer owns.
            job: What they work on.
            process: The actor that works.
            share: Whether tokenized rows may lie on the disk of each machine, so that its trainers share them.
        """
        holder = ray.remote(JobHolder).options(num_cpus=0).remote(job)
        remote = ray.remote(process)
        actors = [
            remote.options(
                name=f"{run_id}/trainer-{number:04d}",
                namespace=_NAMESPACE,
                num_cpus=0,  # Flower's own actors reserve all CPUs; threads are what a shard limits
                num_gpus=shard.gpus,
                max_restarts=_RESTARTS,
                max_task_retries=_RESTARTS,
            ).remote(partial(_job_of, holder), shard.threads, f"fedlora-rows-{run_id}" if share else "")
            for number, shard in enumerate(shards)
        ]
        return cls(actors, holder)

    @classmethod
    def connect(cls, run_id: int) -> TrainerPool:
        """Return the trainers that the server of this run started.

        Raises:
            TrainerLostError: There are none.
        """
        names = sorted(
            entry["name"]
            for entry in list_named_actors(all_namespaces=True)
            if entry["namespace"] == _NAMESPACE and entry["name"].startswith(f"{run_id}/")
        )
        if not names:
            raise TrainerLostError(f"run {run_id} has no trainers on this Ray cluster; was its server stopped?")
        return cls([ray.get_actor(name, namespace=_NAMESPACE) for name in names])

    def __len__(self) -> int:
        """Return the number of trainers."""
        return len(self.actors)

    def assign(self, job: Job) -> None:
        """Give all trainers a new job."""
        ray.get(self.holder.put.remote(job))
        self.everywhere(lambda worker, _: worker.renew())

    def outcomes(
        self,
        work: Callable[[Worker, Item], Result],
        items: Sequence[Item],
        *,
        first: int = 0,
        timeout: float | None = None,
    ) -> Iterator[Result | Exception]:
        """Have the trainers work on all items side by side; yield what became of each, in order.

        Args:
            work: What a trainer does with an item. It is sent to another process, with all that it refers to.
            items: The items.
            first: The trainer that gets the first of them.
            timeout: Seconds to wait for each; None: as long as it takes.

        Yields:
            The result, or the exception that it ended with. What a trainer could not do because it died for good is
            done by another.
        """
        count = len(self.actors)
        places = [(first + number) % count for number in range(len(items))]
        calls = deque(self.actors[place].do.remote(work, item) for place, item in zip(places, items, strict=True))
        for item, place in zip(items, places, strict=True):
            outcome = _outcome(calls.popleft(), timeout)  # nothing holds a result longer than its reader
            for other in range(place + 1, place + count):
                if not isinstance(outcome, TrainerLostError):
                    break
                outcome = _outcome(self.actors[other % count].do.remote(work, item), timeout)
            yield outcome

    def results(
        self, work: Callable[[Worker, Item], Result], items: Sequence[Item], *, timeout: float | None = None
    ) -> list[Result]:
        """Like :meth:`outcomes`, but raise the first exception among them."""
        results: list[Result] = []
        for outcome in self.outcomes(work, items, timeout=timeout):
            if isinstance(outcome, Exception):
                raise outcome
            results.append(outcome)
        return results

    def everywhere(self, work: Callable[[Worker, None], Result], *, timeout: float | None = None) -> list[Result]:
        """Have each trainer do the same; raise the first exception among the outcomes."""
        return self.results(work, [None] * len(self), timeout=timeout)

    def stop(self) -> None:
        """End the trainers; on a cluster that outlives the run they would stay otherwise, and their files with them."""
        if self.holder is not None:
            leaving = [actor.do.remote(lambda worker, _: worker.leave(), None) for actor in self.actors]
            ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE_S)
        for actor in [*self.actors, *([self.holder] if self.holder is not None else [])]:
            try:
                ray.kill(actor, no_restart=True)
            except ray.exceptions.RayError as error:
                _logger.debug("a trainer was gone already: %s", error)


@final
class RaySite:
    """A :class:`clients.site.Site` on a pool of trainers.

    Args:
        pool: The trainers.
        first: The trainer that gets the first pack, so that nodes of one simulation do not all begin with the same.
    """

    def __init__(self, pool: TrainerPool, first: int = 0) -> None:
        self._pool = pool
        self._first = first

    def describe(self) -> Description:
        """Return the description of a trainer; see :meth:`clients.site.Site.describe`."""
        (outcome,) = self._pool.outcomes(lambda worker, _: worker.describe(), [None], first=self._first)
        if isinstance(outcome, Exception):
            raise SiteError(_reason(outcome)) from None
        return outcome

    def train(self, instruction: Instruction) -> Iterator[Update]:
        """Train the clients in packs; see :meth:`clients.site.Site.train`."""
        parts = self._packs(instruction)
        outcomes = self._pool.outcomes(lambda worker, part: worker.train(part), parts, first=self._first)
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                yield from (Update(ClientReport.failed(client, _reason(outcome))) for client in part.clients)
            else:
                yield from outcome

    def reduce(self, instruction: Instruction) -> tuple[list[ClientReport], Reduction]:
        """Train the clients in packs, each reduced by its trainer; see :meth:`clients.site.Site.reduce`."""
        parts = self._packs(instruction)
        outcomes = self._pool.outcomes(lambda worker, part: worker.reduce(part), parts, first=self._first)
        reports, total = fold(instruction, ())
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                reports += [ClientReport.failed(client, _reason(outcome)) for client in part.clients]
                continue
            own, reduction = outcome
            try:
                total.merge(reduction)
            except OverflowError as error:  # of the sum of packs, each of which was not too large
                own = [_refused(report, str(error)) for report in own]
            reports += own
        return reports, total

    def evaluate(self, instruction: Instruction) -> Iterator[ClientReport]:
        """Evaluate the clients in packs; see :meth:`clients.site.Site.evaluate`."""
        parts = self._packs(instruction)
        outcomes = self._pool.outcomes(lambda worker, part: worker.report(part), parts, first=self._first)
        for part, outcome in zip(parts, outcomes, strict=True):
            if isinstance(outcome, Exception):
                yield from (ClientReport.failed(client, _reason(outcome)) for client in part.clients)
            else:
                yield from outcome

    def _packs(self, instruction: Instruction) -> list[Instruction]:
        packs = split_packs(instruction.clients, instruction.pack, len(self._pool))
        return [instruction.part(pack) for pack in packs]


def _refused(report: ClientReport, reason: str) -> ClientReport:
    return replace(report, outcome=Outcome.FAILED, reason=reason) if report.outcome is Outcome.OK else report


def _reason(error: Exception) -> str:
    """Return what may leave of an error: words that were written for the server, and of any other none."""
    if isinstance(error, SiteError | TrainerLostError):
        return str(error)
    _logger.error("a trainer failed", exc_info=error)
    return WITHHELD


def _ray_folder() -> Path:
    """Return the folder of this machine's Ray, which goes when Ray does, or its folder is cleared."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / str(context.get_session_name())


def _job_of(holder: Any) -> Job:
    job: Job = ray.get(holder.job.remote())
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
