"""A session in this process: one trainer, and messages that are answered as they are sent, without Flower and Ray.

For sweeps of many short runs (``fedlora sweep --in-process``), in which messages between processes take longer than
the training. A run, its rounds and its folder are those of any session, and so are the numbers, to the bit; Flower's
records are made and read as under Flower, so that bytes are counted alike.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, final
from uuid import uuid4

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import evaluate_reply, train_reply
from clients.machines import gpu_bytes
from clients.pool import TrainerPool
from clients.pool_state import PoolState, Standing
from clients.ray_site import RaySite
from clients.shards import Machine, Pack, Shard, deal
from clients.site import Job
from fedlora.config import Config, ConfigError
from fedlora.wire import read_instruction
from simulations.cluster import shards_of_a_run
from simulations.launch import SUPERNODES
from simulations.session import Session

if TYPE_CHECKING:
    from clients.resident import Resident
    from clients.trainer import TrainPack
    from clients.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")


def local_session(
    threads: int, rows: Path, train: TrainPack | None = None, resident: Resident | None = None
) -> Session:
    """Return a session whose trainer is this process.

    Args:
        threads: CPU threads that it may use.
        rows: Where it keeps the rows that it has tokenized, for the other processes of a sweep.
        train: Trains a pack; None: the model does.
        resident: What loads the model, where it is other sessions', too; None: one of its own.
    """
    trainer = LocalPool(threads, rows, train, resident)
    return Session(LocalGrid(RaySite(trainer)), SUPERNODES, trainer.begun, partial(_shards, threads))


def _shards(threads: int, config: Config) -> list[Shard]:
    """Return the one shard of this process: all of its threads, and as many of its GPUs as the base model takes.

    Raises:
        ConfigError: A run asks for several trainers.
    """
    wanted = config.engine.trainers
    if wanted > 1:
        raise ConfigError(f"engine.trainers = {wanted}: one process holds one trainer; leave out --in-process.")
    alone = replace(config, engine=replace(config.engine, trainers=1))
    return shards_of_a_run(alone, [_machine(threads)])


@cache  # a run of a sweep asks again, and a driver's command answers
def _machine(threads: int) -> Machine:
    """Return this machine, as far as this process may use it."""
    import torch

    gpus = torch.cuda.device_count()
    return Machine("", "", threads, gpus, gpu_bytes() if gpus else 0)


@final
class LocalPool(TrainerPool):
    """A pool of one trainer, which works in the thread that asks it to.

    Args:
        threads: CPU threads to use.
        rows: Where it keeps tokenized rows.
        train: Trains a pack; None: the model does.
        resident: What loads the model; None: one of its own.
    """

    def __init__(
        self, threads: int, rows: Path, train: TrainPack | None = None, resident: Resident | None = None
    ) -> None:
        super().__init__([None])
        self._threads, self._rows, self._cards = threads, rows, 0
        self._train, self._resident = train, resident
        self._known: PoolState | None = None
        self._worker: Worker | None = None

    def begun(self, shards: Sequence[Shard], job: Job) -> LocalPool:
        """Return the pool, at work on a job with a shard of its own.

        Raises:
            ConfigError: The base model takes several GPUs, and other sessions use it, too.
        """
        self._cards = shards[0].cards
        if self._resident is not None and self._cards > 1:
            raise ConfigError(f"the base model takes {self._cards} GPUs: leave out --together.")
        self.assign(job)
        return self

    def assign(self, job: Job) -> None:
        """Give the trainer a new job."""
        self._known = PoolState(job, 1)
        self._own.renew()

    def standings(self) -> list[Standing]:
        """Return how the trainer stands: it is there."""
        return [Standing(1, True, host=socket.gethostname(), pid=os.getpid())]

    def deal(self, packs: Sequence[Pack]) -> None:
        """Say which clients train together."""
        self._state.deal(packs)

    def packs(self, clients: Sequence[int], pack: int) -> list[Pack]:
        """Return the packs of these clients as they were dealt."""
        return self._state.dealt(clients) or deal(clients, pack, self.shares())

    def trained(self, known: int = 0) -> list[dict[str, Any]]:
        """Return what each pack took, but for so many of the first ones."""
        return self._state.trained(known)

    def outcomes(
        self,
        work: Callable[[Worker, Item], Result],
        items: Sequence[Item],
        *,
        packs: Sequence[Pack] = (),
        server_round: int = 0,
    ) -> Iterator[Result | Exception]:
        """Work on the items, one after the other; see :meth:`clients.pool.TrainerPool.outcomes`."""
        for place, item in enumerate(items):
            started = time.perf_counter()
            try:
                outcome: Result | Exception = work(self._own, item)
            except Exception as error:
                outcome = error
            else:
                pack = packs[place] if packs else None
                if pack is not None and server_round and pack.work:
                    took = time.perf_counter() - started
                    self._state.measured(0, server_round, len(pack.clients), pack.work, took)
            yield outcome

    def everywhere(self, work: Callable[[Worker, None], Result], *, timeout: float | None = None) -> list[Result]:
        """Do a piece of work; see :meth:`clients.pool.TrainerPool.everywhere`."""
        return [work(self._own, None)]

    def stop(self) -> None:
        """Let go of the base model."""
        self._worker = None

    @property
    def _state(self) -> PoolState:
        assert self._known is not None, "a job is given before any work"
        return self._known

    @property
    def _own(self) -> Worker:
        """The worker; a new one after :meth:`stop`."""
        if self._worker is None:
            from clients.shared_rows import SharedRows  # and with it torch
            from clients.worker import Worker

            self._worker = Worker(
                lambda: self._state.job(),
                self._threads,
                self._train,
                shared=SharedRows(self._rows),
                cards=self._cards,
                resident=self._resident,
            )
        return self._worker


@final
class LocalGrid(Grid):
    """A way to nodes that are this process: a message is answered when it is sent.

    Args:
        site: What answers.
    """

    def __init__(self, site: RaySite) -> None:
        # Flower's messages ask their process which run it is part of.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self._site = site
        self._replies: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, as many as Flower starts by itself."""
        return range(1, SUPERNODES + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages, and return their numbers."""
        numbers = []
        for message in messages:
            number = str(uuid4())
            message.metadata.__dict__["_message_id"] = number  # Flower's own grids set it so, too
            answer = train_reply if message.metadata.message_type == MessageType.TRAIN else evaluate_reply
            self._replies[number] = answer(self._site, read_instruction(message.content), message)
            numbers.append(number)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages, once."""
        return [self._replies.pop(number) for number in message_ids if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Answer messages, and return the replies."""
        return self.pull_messages(self.push_messages(messages))

    # -- what a run has under Flower only -------------------------------------------------------------------

    def set_run(self, run: object) -> NoReturn:
        """Raise: there is no run of Flower's."""
        raise NotImplementedError("a session in this process has no run of Flower's")

    @property
    def run(self) -> NoReturn:
        """Raise, as :meth:`set_run` does."""
        raise NotImplementedError("a session in this process has no run of Flower's")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> NoReturn:
        """Raise: messages are made by their own constructor."""
        raise NotImplementedError("make messages with flwr.app.Message")
