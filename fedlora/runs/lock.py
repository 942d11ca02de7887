"""The lock of a folder that one process writes at a time: a run's, a sweep's; it names the process that holds it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import psutil
from filelock import FileLock, Timeout

from fedlora.storage import write_whole, writing

COMMAND = "FEDLORA_COMMAND"
"""Environment variable of all that a command starts: the command's own process, as :func:`this_command` gives it."""

LOCK_FILES = (".lock", ".holder")
_SAME_START_S = 5.0  # by how much two readings of a process's start may differ, where the clock was set between them
_SHORT_S = 1.0  # for which others may hold a lock, to see whether somebody does
_LEAVING_S = 60.0  # until a process whose command is gone has ended
_PAUSE_S = 0.1


def this_command() -> str:
    """Return the ``fedlora`` command that this process belongs to, by its number and start."""
    return os.environ.get(COMMAND) or _identity(psutil.Process())


def _identity(process: psutil.Process) -> str:
    return f"{process.pid}@{process.create_time():.1f}"


def _pid(identity: str) -> int:
    return int(identity.partition("@")[0])


def _runs(identity: str) -> bool:
    """Return whether a process is still there, and not another one with its number."""
    number, _, start = identity.partition("@")
    try:
        process = psutil.Process(int(number))
        there = process.status() != psutil.STATUS_ZOMBIE
        return there and abs(process.create_time() - float(start)) < _SAME_START_S
    except psutil.Error:
        return False


@final
@dataclass(frozen=True)
class Holder:
    """The process that holds a folder.

    Attributes:
        process: The process, by number and start.
        command: The command that it belongs to, by number and start: itself where it is none of ``fedlora``'s.
        host: The machine.
        since: When it took the folder.
    """

    process: str
    command: str
    host: str
    since: str

    @classmethod
    def current(cls) -> Holder:
        """Return this process as a holder."""
        own = _identity(psutil.Process())
        return cls(own, this_command(), platform.node(), time.strftime("%Y-%m-%d %H:%M:%S"))

    @classmethod
    def of(cls, folder: Path) -> Holder | None:
        """Return who took a folder last; None where that is not known."""
        try:
            return cls(**json.loads((folder / ".holder").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @property
    def abandoned(self) -> bool:
        """Whether the command was killed, on this machine, and the process goes on for nobody."""
        return self.host == platform.node() and not _runs(self.command)

    @property
    def pid(self) -> int:
        """The number of the process to end: the command's, which ends all that is its, unless it is gone."""
        return _pid(self.process if self.abandoned else self.command)

    def __str__(self) -> str:
        """Return it in words, with what to do about it."""
        if self.host != platform.node():
            return f"process {_pid(self.process)} on {self.host}, since {self.since}"
        return f"process {self.pid}, since {self.since}; wait until it is finished, or end it with `kill {self.pid}`"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other process from writing a folder, which must be there, for the time of the block.

    A process whose command was killed is on its way out, and is waited for.

    Raises:
        ValueError: Another process writes it.
        StorageError: The lock cannot be written.
    """
    lock = FileLock(folder / ".lock")
    with writing(folder / ".lock"):
        _take(lock, folder)
    try:
        write_whole(folder / ".holder", json.dumps(asdict(Holder.current())).encode())
        yield
    finally:
        (folder / ".holder").unlink(missing_ok=True)
        lock.release()


def _take(lock: FileLock, folder: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            lock.acquire(timeout=0)
            return
        except Timeout:
            holder, waited = Holder.of(folder), time.monotonic() - started
            limit = _LEAVING_S if holder is not None and holder.abandoned else _SHORT_S
            if waited > limit:
                raise _taken(folder, holder) from None
            time.sleep(_PAUSE_S)


def _taken(folder: Path, holder: Holder | None) -> ValueError:
    return ValueError(f"{folder} is being written by {holder or 'another process'}.")


def refuse_held(folder: Path) -> None:
    """Refuse a folder that another process writes, unless that process was abandoned and is on its way out.

    Raises:
        ValueError: One writes it.
    """
    started = time.monotonic()
    while is_held(folder):
        holder = Holder.of(folder)
        if holder is not None and holder.abandoned:
            return
        if time.monotonic() - started > _SHORT_S:
            raise _taken(folder, holder)
        time.sleep(_PAUSE_S)


def is_held(folder: Path) -> bool:
    """Return whether a process holds a folder now."""
    if not (folder / ".lock").is_file():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return False  # what cannot be locked cannot be written either, and is refused for that
