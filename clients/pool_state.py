"""What all processes of a pool of trainers must agree on: the job, who is there and how fast, who trains whom.

One actor holds it, on the machine of whoever started the trainers: a trainer that was restarted, and remembers nothing,
finds its job there, whichever machine it came back on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from clients.shards import Pack
from clients.site import Job


@final
@dataclass(frozen=True)
class Standing:
    """How a trainer stands.

    Attributes:
        starts: How often its process has started; 0: it has not come yet.
        up: Whether nobody has found it lost since then, and one that came back has answered.
        node: Ray's number of the machine that it is on.
        host: That machine's name.
        pid: Its process there.
        speed: Predicted work that it did in a second of its own clock, in the last round that it trained in. The first
            one of a job or since it started does not count, in which kernels are compiled and memory is taken: then it
            is that of before, on the same machine. 0: it was not measured.
    """

    starts: int = 0
    up: bool = False
    node: str = ""
    host: str = ""
    pid: int = 0
    speed: float = 0.0

    @property
    def lost(self) -> bool:
        """Whether it was there, and is gone: one that has not come yet is waited for."""
        return self.starts > 0 and not self.up


@final
@dataclass
class Loss:
    """A trainer that was lost, and what became of its work.

    Attributes:
        round: The round of that work; 0: it was none of a round.
        trainer: The trainer's number.
        node: Ray's number of the machine that it was on.
        host: That machine's name.
        pid: Its process there.
        cause: How it ended.
        packs: The clients of each of its packs that was repeated.
        repeated_on: The trainer that repeated each.
    """

    round: int
    trainer: int
    node: str
    host: str
    pid: int
    cause: str
    packs: list[list[int]] = field(default_factory=list)
    repeated_on: list[int] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return it as plain values, for a run's records."""
        return asdict(self)


@final
class PoolState:
    """The actor that holds the state of a pool.

    Args:
        job: What the trainers work on.
        trainers: How many there are.
    """

    def __init__(self, job: Job, trainers: int) -> None:
        self._job = job
        self._standings = [Standing() for _ in range(trainers)]
        self._handles: list[Any] = []
        self._dealt: list[Pack] = []
        self._places: dict[tuple[int, int], tuple[str, str, int]] = {}
        self._measured: dict[int, tuple[int, float, float]] = {}
        self._warm: dict[int, int] = {}  # the first round of the job that each trainer trained in since it started
        self._trained: list[dict[str, Any]] = []
        self._losses: dict[tuple[int, int, int, str], Loss] = {}

    def enlist(self, trainers: Sequence[Any]) -> None:
        """Take the handles of the trainers, for those who connect."""
        self._handles = list(trainers)

    def handles(self) -> list[Any]:
        """Return the handles of the trainers."""
        return self._handles

    def begin(self, job: Job) -> None:
        """Take a new job, whose rounds begin anew."""
        self.put(job)
        self._warm.clear()
        self._measured.clear()

    def put(self, job: Job) -> None:
        """Take the job as it is now, for trainers that are started from now on."""
        self._job = job

    def job(self) -> Job:
        """Return the job."""
        return self._job

    def arrived(self, trainer: int, node: str, host: str, pid: int) -> None:
        """Take note that a trainer's process has started; one that comes back is lost until it answers.

        Between the two Ray says of it that it is restarting, and refuses its work.
        """
        before = self._standings[trainer]
        starts, speed = before.starts + 1, before.speed if before.node == node else 0.0
        self._warm.pop(trainer, None)
        self._standings[trainer] = Standing(starts, starts == 1, node, host, pid, speed)
        self._places[trainer, starts] = (node, host, pid)

    def back(self, trainer: int) -> Standing:
        """Take note that a trainer that was lost answers, and return how it stands."""
        self._standings[trainer] = replace(self._standings[trainer], up=True)
        return self._standings[trainer]

    def standings(self) -> list[Standing]:
        """Return how each trainer stands."""
        return list(self._standings)

    def deal(self, packs: Sequence[Pack]) -> None:
        """Take who trains whom, until it is dealt anew."""
        self._dealt = list(packs)

    def dealt(self, clients: Sequence[int]) -> list[Pack]:
        """Return the packs of these clients; empty where they were not dealt."""
        asked = set(clients)
        packs = [pack for pack in self._dealt if asked.issuperset(pack.clients)]
        return packs if sum(len(pack.clients) for pack in packs) == len(asked) else []

    def measured(self, trainer: int, server_round: int, clients: int, work: float, seconds: float) -> None:
        """Take note of what a pack took, by the trainer's own clock; packs of one round count together.

        Its first round says nothing of its speed: of two equal GPUs one was taken for half as fast.
        """
        pack = {"round": server_round, "trainer": trainer, "clients": clients, "work": work, "seconds": seconds}
        self._trained.append(pack)
        if self._warm.setdefault(trainer, server_round) == server_round:
            return
        number, worked, took = self._measured.get(trainer, (server_round, 0.0, 0.0))
        if number == server_round:
            work, seconds = work + worked, seconds + took
        self._measured[trainer] = server_round, work, seconds
        self._standings[trainer] = replace(self._standings[trainer], speed=work / max(seconds, 1e-9))

    def trained(self, known: int) -> list[dict[str, Any]]:
        """Return the packs that were measured, but for so many of the first ones, as plain values."""
        return self._trained[known:]

    def lost(self, trainer: int, starts: int, server_round: int, cause: str, *, gone: bool = True) -> None:
        """Take note that a trainer's process is gone, or could not do a pack.

        Args:
            trainer: The trainer.
            starts: What its standing said when it was given the work: it may have come back since.
            server_round: The round of the work; 0: it was none of a round.
            cause: How it ended.
            gone: Whether it can do no more work until it has started again.
        """
        self._loss(trainer, starts, server_round, cause)
        now = self._standings[trainer]
        if gone and now.starts == starts:
            self._standings[trainer] = replace(now, up=False)

    def repeated(self, trainer: int, starts: int, server_round: int, cause: str, pack: Sequence[int], on: int) -> None:
        """Take note that a pack of a lost trainer (see :meth:`lost`) is repeated, and on which."""
        loss = self._loss(trainer, starts, server_round, cause)
        loss.packs.append(list(pack))
        loss.repeated_on.append(on)

    def _loss(self, trainer: int, starts: int, server_round: int, cause: str) -> Loss:
        place = self._places.get((trainer, starts), ("", "", 0))
        key = (trainer, starts, server_round, cause)
        return self._losses.setdefault(key, Loss(server_round, trainer, *place, cause))

    def losses(self) -> list[Loss]:
        """Return what was lost so far, in order."""
        return list(self._losses.values())
