"""A pool of trainers on Ray: named actors that outlive Flower's processes, on one machine or on those of a cluster.

Flower's processes, which start trainers and hand them work, import this file and never torch
(:mod:`clients.trainer_process`). The work that is handed to a trainer is a function of a worker: typed, where a
method's name would be a string.

A trainer that is lost with its process or its machine is started again by Ray, on its machine or on another one. What
it was working on is not left to Ray, which would wait for it: another trainer repeats it at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clients.dispatch import NONE_LEFT, Dispatch, cause_of
from clients.errors import TrainerLostError
from clients.machines import gpu_bytes
from clients.pool_state import Loss, PoolState, Standing
from clients.shards import Machine, Pack, Shard, deal, weights
from clients.site import Job
from clients.trainer_process import TrainerProcess

if TYPE_CHECKING:
    from clients.trainer import TrainPack
    from clients.worker import Worker

_logger = logging.getLogger(__name__)
_NAMESPACE = "fedlora"
_RESTARTS = 3
_GLANCE_S = 0.05
_ASK_S = 30.0
_LEAVE_S = 10.0  # for which trainers that are ended may clear up; one that hangs is ended all the same

Item = TypeVar("Item")
Result = TypeVar("Result")


def machines() -> list[Machine]:
    """Return the machines of the Ray cluster that this process is connected to."""
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: str(node["NodeID"]))
    gpus = {str(node["NodeID"]): int(node["Resources"].get("GPU", 0)) for node in alive}
    sizes = _gpu_bytes(tuple(name for name, count in gpus.items() if count))
    return [
        Machine(
            node["NodeID"],
            str(node["NodeManagerHostname"]),
            int(node["Resources"].get("CPU", 0)),
            gpus[node["NodeID"]],
            sizes.get(node["NodeID"], 0),
        )
        for node in alive
    ]


@cache  # a run of a sweep asks again
def _gpu_bytes(nodes: tuple[str, ...]) -> dict[str, int]:
    """Return the memory of the smallest GPU of each of these nodes; what one does not say in time is left out."""
    ask = ray.remote(gpu_bytes)
    calls = {
        ask.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    done, late = ray.wait(list(calls), num_returns=len(calls), timeout=_ASK_S) if calls else ([], [])
    for call in late:
        _logger.warning("node %s has not said in %.0f s what its GPUs hold", calls[call], _ASK_S)
    found: dict[str, int] = {}
    for call in done:
        try:
            found[calls[call]] = ray.get(call)
        except ray.exceptions.RayError as error:
            _logger.warning("node %s does not say what its GPUs hold: %s", calls[call], error)
    return found


class TrainerPool:
    """The trainers of a run, wherever Ray put them.

    A trainer that dies is started again, with a fresh base model, and what it was working on is repeated by another;
    one that dies over and over stays away.

    Args:
        actors: Handles of the trainers, by their numbers.
        state: Handle of the :class:`clients.pool_state.PoolState` actor; None: there is none, all are there.
    """

    def __init__(self, actors: Sequence[Any], state: Any = None) -> None:
        self.actors = list(actors)
        self.state = state

    @classmethod
    def start(
        cls,
        run_id: int,
        shards: Sequence[Shard],
        job: Job,
        *,
        share: bool = False,
        train: TrainPack | None = None,
    ) -> TrainerPool:
        """Start one trainer for each shard on the Ray cluster that this process is connected to.

        Args:
            run_id: The run; by it the trainers are found.
            shards: What each trainer owns.
            job: What they work on.
            share: Whether tokenized rows may lie on the disk of each machine, so that its trainers share them.
            train: Trains a pack; None: :func:`fedlora.engine.train_pack`.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        state = (
            ray.remote(PoolState)
            .options(name=f"{run_id}/pool", namespace=_NAMESPACE, num_cpus=0, scheduling_strategy=here)
            .remote(job, len(shards))
        )
        remote = ray.remote(TrainerProcess)
        actors = [
            remote.options(
                name=f"{run_id}/trainer-{number:04d}",
                namespace=_NAMESPACE,
                num_cpus=0,  # Flower's own actors reserve all CPUs; threads are what a shard limits
                num_gpus=shard.gpus,
                memory=1,  # a byte: Ray puts an actor that asks for nothing anywhere, whatever machine is named
                max_restarts=_RESTARTS,
                # Soft: where the machine is lost, another may take the trainer.
                scheduling_strategy=NodeAffinitySchedulingStrategy(shard.node, soft=True) if shard.node else "DEFAULT",
            ).remote(state, number, shard.threads, f"fedlora-rows-{run_id}" if share else "", train, shard.cards)
            for number, shard in enumerate(shards)
        ]
        ray.get(state.enlist.remote(actors))
        return cls(actors, state)

    @classmethod
    def connect(cls, run_id: int) -> TrainerPool:
        """Return the trainers that the server of this run started.

        Raises:
            TrainerLostError: There are none.
        """
        try:
            state = ray.get_actor(f"{run_id}/pool", namespace=_NAMESPACE)
            handles = ray.get(state.handles.remote())
        except (ValueError, ray.exceptions.RayActorError):
            raise TrainerLostError(
                f"run {run_id} has no trainers on this Ray cluster; was its server stopped?"
            ) from None
        return cls(handles, state)

    def __len__(self) -> int:
        """Return the number of trainers, lost ones included."""
        return len(self.actors)

    def assign(self, job: Job) -> None:
        """Give all trainers a new job."""
        ray.get(self.state.begin.remote(job))
        self.everywhere(lambda worker, _: worker.renew())

    def expect(self, job: Job) -> None:
        """Give the job, with what it asks of them, to trainers that are started from now on; the others have it."""
        if self.state is not None:
            ray.get(self.state.put.remote(job))

    # -- who is there, and who trains whom ----------------------------------------------------------------

    def standings(self) -> list[Standing]:
        """Return how each trainer stands; a lost one that answers is taken back."""
        if self.state is None:
            return [Standing(1, True) for _ in self.actors]
        standings: list[Standing] = ray.get(self.state.standings.remote())
        for trainer, standing in enumerate(standings):
            if standing.lost and _answers(self.actors[trainer]):
                standings[trainer] = ray.get(self.state.back.remote(trainer))
        return standings

    def shares(self) -> list[float]:
        """Return the weight of each trainer when work is dealt; see :func:`clients.shards.weights`."""
        return weights([-1.0 if standing.lost else standing.speed for standing in self.standings()])

    def deal(self, packs: Sequence[Pack]) -> None:
        """Say who trains whom, for the processes that :meth:`connect`."""
        if self.state is not None:
            ray.get(self.state.deal.remote(packs))

    def packs(self, clients: Sequence[int], pack: int) -> list[Pack]:
        """Return the packs of these clients as they were dealt; where they were not, as many as give everybody one."""
        dealt = ray.get(self.state.dealt.remote(clients)) if self.state is not None else []
        return dealt or deal(clients, pack, self.shares())

    def losses(self) -> list[Loss]:
        """Return which trainers were lost so far, and what became of their work."""
        return ray.get(self.state.losses.remote()) if self.state is not None else []

    def trained(self, known: int = 0) -> list[dict[str, Any]]:
        """Return what each pack took, but for so many of the first ones."""
        return ray.get(self.state.trained.remote(known)) if self.state is not None else []

    def memory_short(self, trainer: int, server_round: int, halves: Sequence[Pack]) -> None:
        """Take note that a trainer had too little memory for a pack, which it repeats in halves."""
        if self.state is None:
            return
        starts, cause = self.standings()[trainer].starts, "too little memory for the pack"
        self.state.lost.remote(trainer, starts, server_round, cause, gone=False)
        for half in halves:
            self.state.repeated.remote(trainer, starts, server_round, cause, half.clients, trainer)

    # -- work ---------------------------------------------------------------------------------------------

    def outcomes(
        self,
        work: Callable[[Worker, Item], Result],
        items: Sequence[Item],
        *,
        packs: Sequence[Pack] = (),
        server_round: int = 0,
    ) -> Iterator[Result | Exception]:
        """Have the trainers work on all items side by side; yield what became of each, in order.

        Args:
            work: What a trainer does with an item. It is sent to another process, with all that it refers to.
            items: The items.
            packs: For each item who does it, and what of: trainers are measured by it; empty: in turn.
            server_round: The round of the packs.

        Yields:
            The result, or the exception that it ended with. What a trainer could not do because it died is repeated by
            another.
        """
        if not packs:
            able = [trainer for trainer, share in enumerate(self.shares()) if share]
            packs = [Pack(able[number % len(able)], ()) for number in range(len(items))]
        dispatch = Dispatch(self, work, items, packs, server_round)
        for number in range(len(items)):
            while number not in dispatch.outcomes:
                dispatch.step()
            yield dispatch.outcomes.pop(number)

    def results(
        self, work: Callable[[Worker, Item], Result], items: Sequence[Item], *, packs: Sequence[Pack] = ()
    ) -> list[Result]:
        """Like :meth:`outcomes`, but raise the first exception among them."""
        results: list[Result] = []
        for outcome in self.outcomes(work, items, packs=packs):
            if isinstance(outcome, Exception):
                raise outcome
            results.append(outcome)
        return results

    def everywhere(self, work: Callable[[Worker, None], Result], *, timeout: float | None = None) -> list[Result]:
        """Have each trainer that is there do the same, and return the results of those that live to tell.

        Args:
            work: What each does.
            timeout: Seconds to wait for each; None: as long as it takes.

        Raises:
            TrainerLostError: One did not come, or none is left.
            Exception: The first of those that the work ended with.
        """
        standings = self.standings()
        asked = [number for number, standing in enumerate(standings) if not standing.lost] or range(len(standings))
        calls = {number: self.actors[number].do.remote(work, None) for number in asked}
        results: list[Result] = []
        for number, call in calls.items():
            try:
                results.append(ray.get(call, timeout=timeout).result)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.GetTimeoutError:
                raise TrainerLostError(
                    f"a trainer did not start within {timeout:.0f} s: its share of a GPU may be taken. "
                    "engine.trainers must fit the GPUs, and --federation-config must leave them alone: Flower's own "
                    "actors need none."
                ) from None
            except ray.exceptions.RayError as error:
                _logger.error("trainer %d died: %s", number, error)  # with what it said last, which stays here
                if not standings[number].starts and isinstance(error, ray.exceptions.ActorDiedError):
                    raise TrainerLostError(
                        f"trainer {number} could not start; this process's log says why. On a Ray cluster the same "
                        "fedlora must be installed on every machine, with its libraries."
                    ) from None
                self.state.lost.remote(number, standings[number].starts, 0, cause_of(error))
        if not results:
            raise TrainerLostError(NONE_LEFT)
        return results

    def stop(self) -> None:
        """End the trainers; on a cluster that outlives the run they would stay otherwise, and their files with them."""
        there = [actor for actor, one in zip(self.actors, self.standings(), strict=True) if not one.lost]
        leaving = [actor.do.remote(lambda worker, _: worker.leave(), None) for actor in there]
        if leaving:
            ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE_S)
        for actor in [*self.actors, *([self.state] if self.state is not None else [])]:
            try:
                ray.kill(actor, no_restart=True)
            except ray.exceptions.RayError as error:
                _logger.debug("a trainer was gone already: %s", error)


def _answers(actor: Any) -> bool:
    """Whether a trainer that was lost is there all the same, and has nothing to do."""
    call = actor.here.remote()
    done, _ = ray.wait([call], timeout=_GLANCE_S)
    try:
        return bool(done) and ray.get(call) is None
    except ray.exceptions.RayError:
        return False
