"""What a command leaves when it is killed: nothing. Real processes, each with a mark of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from simulations.keeper import end_processes, kept
from tests.support.runs import environment

# A command that starts a process of another session, as Flower does, whose child has lost the mark; then waits.
COMMAND = """
import os, psutil, signal, subprocess, sys, time
from pathlib import Path
from simulations.keeper import kept
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which tests under nohup, or in the background of a shell, ignore
signal.signal(signal.SIGINT, signal.default_int_handler)
home = Path(sys.argv[1])
ending = sys.argv[2]
child = "import time; time.sleep(600)"
parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}], env={{}}); time.sleep(600)"
with kept(home, folders=[home]):
    subprocess.Popen([sys.executable, "-c", parent], env={**os.environ, "FLWR_HOME": str(home)}, start_new_session=True)
    while len(psutil.Process().children(recursive=True)) < 3:
        time.sleep(0.05)
    print(*(one.pid for one in psutil.Process().children(recursive=True)), flush=True)
    if ending == "error":
        raise ValueError("of its own")
    if ending != "done":
        time.sleep(600)
"""


@contextmanager
def command(home: Path, ending: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """Start the command; yield it, and what it has started, its keeper included."""
    home.mkdir()
    (home / "file").write_text("of the run")
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(home), ending],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as started:
        assert started.stdout is not None
        try:
            yield started, [psutil.Process(int(pid)) for pid in started.stdout.readline().split()]
            started.wait(30)
        finally:
            started.kill()


def are_gone(processes: list[psutil.Process], within_s: float) -> bool:
    """Whether all of them end within a time."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("ending", "number"),
    [
        ("killed", signal.SIGKILL),
        ("ended", signal.SIGTERM),
        ("its terminal closed", signal.SIGHUP),
        ("interrupted", signal.SIGINT),
        ("done", None),
        ("error", None),
    ],
)
def test_whatever_ends_a_command_ends_what_it_has_started(
    ending: str, number: signal.Signals | None, tmp_path: Path
) -> None:
    """Those that have lost the mark, too; and its folder is removed."""
    home = tmp_path / "home"
    with command(home, ending) as (process, started):
        assert len(started) == 3
        if number is not None:
            process.send_signal(number)
        assert are_gone(started, 30)
    assert not home.exists()


def test_a_command_whose_keeper_was_killed_cleans_up_itself(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with command(home, "waiting") as (process, started):
        for one in started:
            if "FEDLORA_KEEPER" in one.environ():
                one.kill()
        process.send_signal(signal.SIGTERM)
        assert are_gone(started, 30)
    assert not home.exists()


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    """SIGHUP that is ignored stays ignored."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with kept(tmp_path / "home"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_processes_of_others_are_left_alone(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    other = subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": str(tmp_path / "home-2")})
    own = subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": str(tmp_path / "home")})
    try:
        end_processes(tmp_path / "home")
        assert own.wait(10) == -signal.SIGTERM
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
