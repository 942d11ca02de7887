"""The process of a trainer: the Ray actor around a :class:`clients.worker.Worker`.

Whoever starts trainers imports this file and never torch: the actor imports the worker where it runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import ray

from clients.dispatch import Done
from clients.site import Job

if TYPE_CHECKING:
    from clients.trainer import TrainPack
    from clients.worker import Worker


@final
class TrainerProcess:
    """The actor that works: a :class:`clients.worker.Worker` in a process of its own.

    Args:
        state: The pool's :class:`clients.pool_state.PoolState` actor.
        number: The trainer's number.
        threads: CPU threads to use.
        shared: What the trainers of one machine know their tokenized rows by; empty: each has its own.
        train: Trains a pack; None: the model does, on all threads.
        cards: GPUs that the base model is spread over.
    """

    def __init__(
        self,
        state: Any,
        number: int,
        threads: int,
        shared: str = "",
        train: TrainPack | None = None,
        cards: int = 1,
    ) -> None:
        from clients.shared_rows import SharedRows  # and with it torch, in no other process
        from clients.worker import Worker

        rows = SharedRows(_ray_folder() / shared) if shared else None
        self._worker = Worker(partial(_job_of, state), threads, train, shared=rows, cards=cards)
        node = ray.get_runtime_context().get_node_id()
        ray.get(state.arrived.remote(number, node, socket.gethostname(), os.getpid()))

    def here(self) -> None:
        """Answer, once it has started and whatever it does is done."""

    def do(self, work: Callable[[Worker, Any], Any], item: Any) -> Done:
        """Do a piece of work."""
        started = time.perf_counter()
        result = work(self._worker, item)
        return Done(result, time.perf_counter() - started)


def _ray_folder() -> Path:
    """Return the folder of this machine's Ray, which goes when Ray does, or its folder is cleared."""
    context = ray.get_runtime_context()
    return Path(context.get_temp_dir()) / str(context.get_session_name())


def _job_of(state: Any) -> Job:
    job: Job = ray.get(state.job.remote())
    return job
