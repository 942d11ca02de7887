"""Pieces of work on their way to trainers and back; what a trainer that is lost had in hand is repeated by another.

Ray would repeat it by itself, on the same trainer and once that is back; where its machine is lost, that may be never.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import ray

from clients.errors import MemoryShortError, TrainerDiffersError, TrainerLostError
from clients.pool_state import Standing
from clients.shards import Pack

_logger = logging.getLogger(__name__)
_REPEATS = 3  # of a piece of work
_AHEAD = 2  # pieces of work at a trainer: one that it does, and one that it need not wait for
_RETURN_S = 600.0  # that a piece of work waits for a trainer to come back, where there is no other
_LOOK_S = 2.0
NONE_LEFT: Final = "a trainer died and was not to be restarted; the site's log says why"


@dataclass(frozen=True)
class Done:
    """A piece of work that a trainer has done.

    Attributes:
        result: What came of it.
        seconds: How long it took by the trainer's own clock.
    """

    result: Any
    seconds: float


class Trainers(Protocol):
    """What is needed of a pool (:class:`clients.pool.TrainerPool`)."""

    actors: list[Any]
    state: Any

    def standings(self) -> list[Standing]:
        """Return how each trainer stands."""


@final
class Dispatch:
    """Pieces of work on their way to trainers and back.

    Args:
        trainers: The trainers.
        work: What is done with each item.
        items: The items.
        packs: Who does each.
        server_round: The round.

    Attributes:
        outcomes: What became of the items that are done, by their place.
    """

    def __init__(
        self, trainers: Trainers, work: Any, items: Sequence[Any], packs: Sequence[Pack], server_round: int
    ) -> None:
        self._trainers, self._work, self._items, self._packs, self._round = trainers, work, items, packs, server_round
        self._waiting: list[deque[int]] = [deque() for _ in trainers.actors]
        for place, pack in enumerate(packs):
            self._waiting[pack.trainer].append(place)
        self._tries = [0] * len(items)
        self._running: dict[Any, tuple[int, int, int]] = {}
        self._starts = [standing.starts for standing in trainers.standings()]
        self.outcomes: dict[int, Any] = {}

    def step(self) -> None:
        """Hand out what trainers have room for, and wait for one piece of work."""
        at = Counter(trainer for _, trainer, _ in self._running.values())
        for trainer, waiting in enumerate(self._waiting):
            while waiting and at[trainer] < _AHEAD:
                place = waiting.popleft()
                call = self._trainers.actors[trainer].do.remote(self._work, self._items[place])
                self._running[call] = place, trainer, self._starts[trainer]
                at[trainer] += 1
        (call, *_), _ = ray.wait(list(self._running), num_returns=1)
        place, trainer, starts = self._running.pop(call)
        try:
            done: Done = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            self.outcomes[place] = error.cause
            if isinstance(error.cause, MemoryShortError):
                error.cause.trainer = trainer
            if isinstance(error.cause, TrainerDiffersError):
                ray.kill(self._trainers.actors[trainer], no_restart=True)
                self._repeat(place, trainer, starts, str(error.cause))
        except ray.exceptions.RayError as error:
            _logger.error("trainer %d died: %s", trainer, error)  # with what it said last, which stays here
            self._repeat(place, trainer, starts, cause_of(error))
        else:
            self.outcomes[place] = done.result
            pack = self._packs[place]
            if self._round and pack.work:
                clients = len(pack.clients)
                self._trainers.state.measured.remote(trainer, self._round, clients, pack.work, done.seconds)

    def _repeat(self, place: int, trainer: int, starts: int, cause: str) -> None:
        """Give a lost trainer's work to another, or to itself once it is back."""
        self._trainers.state.lost.remote(trainer, starts, self._round, cause)
        self._tries[place] += 1
        other = self._another(trainer) if self._tries[place] <= _REPEATS else None
        if other is None:
            many = f"each of the {self._tries[place]} trainers that worked on it died"
            self.outcomes[place] = TrainerLostError(NONE_LEFT if self._tries[place] <= _REPEATS else many)
            return
        self.outcomes.pop(place, None)
        self._trainers.state.repeated.remote(trainer, starts, self._round, cause, self._packs[place].clients, other)
        self._waiting[other].appendleft(place)
        while self._waiting[trainer] and other != trainer:  # what had not reached it is only moved
            left = self._another(trainer)
            self._waiting[other if left is None else left].append(self._waiting[trainer].popleft())

    def _another(self, lost: int) -> int | None:
        """Return the trainer with the least to do that is there, this one last; None: none comes back."""
        end, dead = time.monotonic() + _RETURN_S, set[int]()
        while len(dead) < len(self._waiting) and time.monotonic() < end:
            standings = self._trainers.standings()
            self._starts = [standing.starts for standing in standings]
            able = [number for number, standing in enumerate(standings) if not standing.lost and number not in dead]
            if able:
                busy = Counter(trainer for _, trainer, _ in self._running.values())
                near = [standing.node == standings[lost].node for standing in standings]  # perhaps lost with it
                return min(able, key=lambda one: (one == lost, near[one], busy[one] + len(self._waiting[one]), one))
            for number in set(range(len(standings))) - dead:
                try:
                    ray.get(self._trainers.actors[number].here.remote(), timeout=_LOOK_S)
                except ray.exceptions.ActorDiedError:  # for good; one that is on its way back is only unavailable
                    dead.add(number)
                except ray.exceptions.RayError:
                    continue
        return None


def cause_of(error: Exception) -> str:
    """Return in a few words how a trainer was lost; nothing of what its process said."""
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process or its machine died"
    return "its machine died"  # with what it had done already
