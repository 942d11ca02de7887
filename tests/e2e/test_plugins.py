"""The tutorial's plug-ins through real Flower: command line, ServerApp, ClientApps and trainers import the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedlora.config import from_toml, to_toml
from fedlora.reports.run import Run
from tests.support.plugged import tutorial_flat
from tests.support.runs import fedlora

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    flat = tutorial_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run", "rounds": 2})
    (tmp_path / "tiny.toml").write_text(to_toml(flat), encoding="utf-8")
    done = fedlora("run", "-c", tmp_path / "tiny.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs" / "run"
    assert json.loads((folder / "result.json").read_text(encoding="utf-8"))["rounds"] == 2
    assert from_toml((folder / "config.toml").read_text(encoding="utf-8"))["tied.strength"] == 2.0
    assert Run.read(folder).config.method.name == "tied", "read by a process that has not imported the plug-ins"
