"""Ends a command's processes when it is over, however it ended: done, interrupted, killed, or its terminal gone.

Flower and Ray start processes in sessions of their own, which outlive whoever started them. :func:`kept` therefore
starts this file as a program beside them. It does nothing but wait for the end of a pipe whose other end the command
holds: the kernel closes it whichever way the command ends, ``kill -9`` included. Then it ends every process that has
the command's mark in its environment.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

_KEEPER = "FEDLORA_KEEPER"  # in the environment of keepers: no keeper ends another one before its work is done
_GRACE_S = 5.0
_LOOKS = 5  # for processes that others have started meanwhile


@contextmanager
def kept(value: Path | str, variable: str = "FLWR_HOME", folders: Sequence[Path] = ()) -> Iterator[None]:
    """End every process that has this value of an environment variable when the block ends, or when this process does.

    SIGTERM and SIGHUP interrupt the block as Ctrl-C does.

    Args:
        value: The variable's value.
        variable: The variable, which the block puts in the environment of what it starts.
        folders: What is removed afterwards.
    """
    environment = {key: one for key, one in os.environ.items() if key != variable} | {_KEEPER: "1"}
    command = [sys.executable, "-P", str(Path(__file__).resolve()), variable, str(value), *map(str, folders)]
    keeper = subprocess.Popen(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # who reads what the command prints need not wait for its keeper
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def end() -> None:
        assert keeper.stdin is not None
        keeper.stdin.close()
        if keeper.wait() != 0:  # it was killed itself
            _clear(str(value), variable, folders)

    with _interruptible(end):
        yield


@contextmanager
def _interruptible(end: Callable[[], None]) -> Iterator[None]:
    """Call ``end`` whichever way the block ends; SIGTERM and SIGHUP interrupt it as Ctrl-C does.

    A signal that is ignored stays ignored: under ``nohup`` a run goes on when its terminal is closed.
    """
    numbers = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        previous[signal.SIGINT] = signal.getsignal(signal.SIGINT)
        for number in previous:  # nothing may cut the cleaning short
            signal.signal(number, signal.SIG_IGN)
        end()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def end_processes(value: Path | str, variable: str = "FLWR_HOME") -> None:
    """End every process that has this value of an environment variable, and its descendants."""
    alive = _processes(str(value), variable)
    _signal(alive, signal.SIGTERM)
    alive = _wait(alive)
    for _ in range(_LOOKS):
        alive = [*{*alive, *_processes(str(value), variable)}]
        if not alive:
            return
        _signal(alive, signal.SIGKILL)
        alive = _wait(alive)


def _processes(value: str, variable: str) -> list[psutil.Process]:
    """Return the processes started with this value of an environment variable, and their descendants.

    Ray's agents write their titles over their environment, so only their parents show whose they are.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value:
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
        except psutil.Error:  # gone, or somebody else's
            continue
    found.pop(os.getpid(), None)
    return [process for process in found.values() if _is_alive(process) and not _is_keeper(process)]


def _is_keeper(process: psutil.Process) -> bool:
    try:
        return _KEEPER in process.environ()
    except psutil.Error:
        return False


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; one that only waits for its parent to take note of its end does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _signal(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def _wait(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Wait for processes to end, and return those that do not."""
    end, alive = time.monotonic() + _GRACE_S, list(processes)
    while (alive := [process for process in alive if _is_alive(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def _clear(value: str, variable: str, folders: Iterable[Path]) -> None:
    end_processes(value, variable)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _keep(variable: str, value: str, *folders: str) -> None:
    """Wait for the end of standard input, then end the processes; what ends other processes does not end this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _clear(value, variable, map(Path, folders))


if __name__ == "__main__":
    _keep(*sys.argv[1:])
