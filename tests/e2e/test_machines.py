"""Machines as they are: busy, with their ports taken, a full disk, and commands that are killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from simulations import superlink
from simulations.keeper import kept
from simulations.superlink import StartError, make_home, start_superlink
from tests.support.runs import BIN, ROOT, Family, environment, fedlora, small_disk, started
from tests.support.trainers import tiny_flat

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_port_that_another_process_takes_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of a port and its use: another one is tried, whatever answers at the first."""
    home, choose = make_home(), superlink.free_ports
    with socket.create_server(("127.0.0.1", 0)) as taken, kept(home, folders=[home]):
        first = int(taken.getsockname()[1])
        answers = iter([[first, first]])
        monkeypatch.setattr(superlink, "free_ports", lambda count: next(answers, None) or choose(count))
        found, process = start_superlink(home)
        assert found["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] != str(first)
        done = subprocess.run([str(BIN / "flwr"), "ls", "--format", "json"], env=found, capture_output=True, check=True)
        assert json.loads(done.stdout)["runs"] == []
    process.wait()
    assert not home.exists()


def test_the_log_of_a_superlink_that_does_not_start_is_kept() -> None:
    """Its own home is gone by the time that somebody reads the message."""
    home = make_home()
    (home / "state.db").mkdir()
    with kept(home, folders=[home]), pytest.raises(StartError, match="ended with exit code 1, 3 times") as error:
        start_superlink(home)
    log = Path(str(error.value).partition("is kept in ")[2].partition(", the end")[0])
    assert "unable to open database file" in log.read_text()
    log.unlink()


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="only root mounts")
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """One line with the path, all that was written whole; the command that is printed is pasted into a shell."""
    disk = tmp_path / "a disk, né"
    with small_disk(disk, "100k"):
        flat = tiny_flat(tmp_path, **{"run.dir": str(disk), "run.name": "run", "rounds": 100})
        config = tmp_path / "config.toml"
        config.write_text(to_toml(flat), encoding="utf-8")
        done = fedlora("run", "-c", config)
        assert done.returncode == 1
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("fedlora: error: ")]
        assert line.startswith(f"fedlora: error: {disk / 'run'}/")
        assert line.endswith(" cannot be written: No space left on device; make room there")
        assert "Traceback" not in done.stdout + done.stderr
        rounds = [line["round"] for line in read_lines(disk / "run" / "metrics.jsonl")]
        assert rounds == list(range(1, len(rounds) + 1))
        assert not list(disk.rglob("*.partial"))
        report = fedlora("report", disk / "run")
        assert re.search(rf"│ +{rounds[-1]} │", report.stdout), report.stdout + report.stderr
        assert "note: no plots and summary: " in report.stdout
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        again = fedlora("run", "-c", disk / "run" / "config.toml", "-c", "run.resume=true")
        assert again.returncode == 0, again.stdout
        (printed,) = [line[5:].strip() for line in again.stdout.splitlines() if line.startswith("next: ")]
        assert shlex.split(printed) == ["fedlora", "report", str(disk / "run")]
        pasted = subprocess.run(
            ["sh", "-c", printed], cwd=ROOT, env=environment(PATH=f"{BIN}:{os.environ['PATH']}"), check=False
        )
        assert pasted.returncode == 0


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """kill -9 of the sweep's command alone, with a process a group: the same command again, at once."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "rounds": 30})
    file, folder = tmp_path / "mini.toml", tmp_path / "runs" / "mini"
    file.write_text(to_toml({**flat, "grid.strategy.name": ["fedavg", "ffa-lora"]}))
    family = Family()
    with started(family, "sweep", str(file), "--workers", "2") as process:
        while not any(folder.glob("cells/*/metrics.jsonl")):
            assert process.poll() is None
            time.sleep(0.2)
        assert len(family.meet()) > 10
        second = fedlora("sweep", file)
        assert second.returncode == 2
        assert f"{folder} is being written by process {process.pid}, since" in second.stdout
        process.kill()
        done = fedlora("sweep", file, "--workers", "2")
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout
    assert family.left(within_s=30) == []
