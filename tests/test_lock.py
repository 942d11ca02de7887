"""The lock of a run's or a sweep's folder: it names who holds it, and nothing that was killed holds it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlora.plugins import read_config
from fedlora.runs.folder import RunFolder
from fedlora.runs.lock import COMMAND, Holder, held, is_held
from simulations.launch import end_abandoned
from tests.support.runs import environment

HOLD = """
import sys, time
from pathlib import Path
from fedlora.runs.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(folder: Path, command: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a folder, of a command if one is given."""
    folder.mkdir(exist_ok=True)
    env = environment(**({COMMAND: command} if command else {}))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def gone() -> str:
    """A command that was killed: a process that is no more, as the lock remembers it."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        return f"{process.pid}@{psutil.Process(process.pid).create_time():.1f}"


def config_of(folder: Path, **flat: Any) -> Any:
    return read_config({"run.dir": str(folder), "run.name": "run", **flat})


def test_who_holds_a_folder_is_named(tmp_path: Path) -> None:
    """With what to do about it; the advice ends nothing else."""
    with holding(tmp_path / "run") as process:
        for refused in (held(tmp_path / "run"), RunFolder.opened(config_of(tmp_path))):
            with pytest.raises(ValueError, match=rf"by process {process.pid}, since .* `kill {process.pid}`"), refused:
                pass
    assert not (tmp_path / "run" / "config.toml").exists(), "nothing was changed"


def test_the_command_is_named_where_one_stands_behind_the_process(tmp_path: Path) -> None:
    """To end it ends its whole Flower; the process that holds the folder is only a part of that."""
    own = psutil.Process()
    with (
        holding(tmp_path / "run", f"{own.pid}@{own.create_time():.1f}"),
        pytest.raises(ValueError, match=f"by process {own.pid}, since"),
        held(tmp_path / "run"),
    ):
        pass


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    with holding(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert (tmp_path / "run" / ".holder").is_file(), "it could not clear up"
        with held(tmp_path / "run"):
            assert is_held(tmp_path / "run")
        assert not is_held(tmp_path / "run")


def test_a_process_whose_command_is_gone_is_waited_for(tmp_path: Path) -> None:
    with holding(tmp_path / "run", gone()) as process:
        RunFolder.check(config_of(tmp_path))  # not refused
        started, end = time.monotonic(), threading.Timer(1.5, process.kill)
        end.start()
        with held(tmp_path / "run"):
            assert time.monotonic() - started > 1.4


def test_a_process_whose_command_is_gone_is_ended_by_the_next_one(tmp_path: Path) -> None:
    """By the mark that all of that command's processes have; others stay, whatever they hold."""
    with holding(tmp_path / "run", gone()) as left, holding(tmp_path / "other") as other:
        end_abandoned(tmp_path / "run")
        assert left.wait(10) != 0
        end_abandoned(tmp_path / "other")
        assert other.poll() is None


def test_another_process_with_the_number_of_the_holders_command_is_not_it(tmp_path: Path) -> None:
    own = psutil.Process()
    with holding(tmp_path / "run", f"{own.pid}@{own.create_time() - 3600:.1f}"):
        holder = Holder.of(tmp_path / "run")
        assert holder is not None
        assert holder.abandoned


def test_what_a_killed_process_left_half_written_does_not_take_the_name(tmp_path: Path) -> None:
    """Killed within its very first file: neither a run to continue nor one in the way."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.toml.x1y2z3.partial").write_text("se")
    (path / ".lock").touch()
    with RunFolder.opened(config_of(tmp_path)) as folder:
        assert not list(folder.path.glob("*.partial"))
        assert (folder.path / "config.toml").is_file()


def test_a_run_that_is_written_is_not_touched_by_its_resume(tmp_path: Path) -> None:
    """Its configuration and result stay as they are until the folder is held."""
    with RunFolder.opened(config_of(tmp_path)) as folder:
        folder.write_json("result.json", {})
    before = (folder.path / "config.toml").read_bytes()
    with (
        holding(folder.path),
        pytest.raises(ValueError, match="is being written by process"),
        RunFolder.opened(config_of(tmp_path, **{"run.resume": True, "rounds": 99})),
    ):
        pass
    assert (folder.path / "config.toml").read_bytes() == before
    assert (folder.path / "result.json").is_file()
