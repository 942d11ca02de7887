"""Starts whole runs as a user starts them, and watches which processes they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import psutil
import pytest
from safetensors.numpy import load_file

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from tests.support.trainers import tiny_flat

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_MARK = "FEDLORA_TEST"


def environment(**more: str) -> dict[str, str]:
    """The environment of a command that must run this checkout, whichever one is installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def fedlora(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``fedlora`` to its end."""
    command = [str(BIN / "fedlora"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@final
class Family:
    """The processes that descend from one run.

    They are found by a variable in their environment; and because some of Ray's write their titles over it, by their
    parents, for which :meth:`meet` must have been called while those were alive. Nobody else's process is ever in it.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._met: dict[int, psutil.Process] = {}

    def environment(self) -> dict[str, str]:
        """What a run is started with, so that its descendants can be found."""
        return environment(**{_MARK: self.mark})

    def meet(self) -> list[psutil.Process]:
        """Return the processes that run now, and remember them."""
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark:
                    self._met |= {one.pid: one for one in (process, *process.children(recursive=True))}
            except psutil.Error:
                continue
        return [process for process in self._met.values() if _alive(process)]

    def trainers(self) -> list[psutil.Process]:
        """Return the trainers that run now."""
        return [process for process in self.meet() if "".join(_command(process)).startswith("ray::Trainer")]

    def kill(self) -> None:
        """kill -9 of all of them, those included that others start meanwhile."""
        end = time.monotonic() + 30
        while (running := self.meet()) and time.monotonic() < end:
            for process in running:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            time.sleep(0.1)

    def left(self, within_s: float = 0.0) -> list[str]:
        """Return the commands of those that still run after a time, or as soon as none does."""
        end = time.monotonic() + within_s
        while (running := self.meet()) and time.monotonic() < end:
            time.sleep(0.1)
        return [" ".join(_command(process)) or str(process.pid) for process in running]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@dataclass
class Finished:
    """A run that is over: its exit code, output, folder, and what it left running."""

    code: int
    output: str
    folder: Path
    left: list[str]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def checkpoint(self) -> dict[str, Any]:
        """The arrays of the last checkpoint."""
        return load_file(self.folder / "checkpoint" / self.json("checkpoint/state.json")["tensors"])


OnRound = Callable[[int, Family], bool]
"""What is done after a round; returns whether to go on reading."""


def started(family: Family, *arguments: str, before: Callable[[], Any] | None = None) -> subprocess.Popen[str]:
    """Start ``fedlora`` in a session of its own, with all it prints in one pipe; ``before`` is called in the child."""
    return subprocess.Popen(
        [str(BIN / "fedlora"), *arguments],
        cwd=ROOT,
        env=family.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=before,
    )


def fedlora_run(
    folder: Path, options: list[str] | None = None, on_round: OnRound | None = None, **changes: Any
) -> Finished:
    """Run ``fedlora run`` on the tiny model and wait for its end.

    Args:
        folder: Where model, data and run go.
        options: More arguments.
        on_round: Called with each round's number as its line appears; where it returns False, everything is killed.
        changes: Of the configuration.
    """
    flat = tiny_flat(folder, **{"run.dir": str(folder / "runs"), "run.name": "run", **changes})
    config = folder / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    family, lines = Family(), []
    with started(family, "run", "-c", str(config), *(options or [])) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not line.startswith("round "):
                continue
            family.meet()
            if on_round is not None and not on_round(int(line.split("/")[0].removeprefix("round ")), family):
                family.kill()
                break
    return Finished(process.returncode, "".join(lines), folder / "runs" / "run", family.left())


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A disk of a size at a folder."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def kill_a_trainer(family: Family) -> None:
    """kill -9 of one trainer."""
    trainers = family.trainers()
    assert trainers, "no trainer found to kill"
    trainers[0].send_signal(signal.SIGKILL)


def comparable(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that does not depend on the clock or on processes."""
    metrics = [
        {key: value for key, value in line.items() if key != "seconds"} for line in read_lines(folder / "metrics.jsonl")
    ]
    result = json.loads((folder / "result.json").read_text())
    files = [*folder.rglob("*.safetensors"), folder / "scores.jsonl", folder / "clients.jsonl"]
    return {
        "metrics": metrics,
        "result": {key: value for key, value in result.items() if key != "seconds"},
        **{path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)},
    }
