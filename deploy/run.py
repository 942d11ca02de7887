"""Runs a deployed federation from its coordinator: starts the run, or goes on with it, until it is finished."""

from __future__ import annotations

import json
import os
import shlex
import ssl
import subprocess
import tempfile
import time
import tomllib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

import fedlora
from deploy.coordinator_file import CoordinatorFile
from deploy.superlink import CONNECTION
from fedlora.config import Config, from_toml, to_toml
from fedlora.runs.folder import run_path
from simulations.launch import shipped
from simulations.options import absolute_paths, read_overrides
from simulations.setup import resolve
from simulations.superlink import FLOWER_ENVIRONMENT, flower_command

_TRIES = 3  # without a finished round between them
_PAUSE_S = 10.0
_LINK_S = 60.0
_LOAD_S = 15.0


def run_federation(file: CoordinatorFile, console: Console) -> int:
    """Run what ``run.toml`` says, from its last finished round if there is one.

    A run whose server died, or whose SuperLink was restarted, is started again where it was; one that is still at work
    is followed.

    Returns:
        0 when the run is finished, 1 when it failed.

    Raises:
        ValueError: The configuration cannot be used.
    """
    app = app_folder()
    flat, config = read_run(file, app)
    folder = run_path(config)
    environment = {**os.environ, **FLOWER_ENVIRONMENT, "FLWR_HOME": str(file.flower_home)}
    if not _superlink_answers(file):
        console.print(
            f"fedlora: the SuperLink does not answer at 127.0.0.1:{file.link_port}; start it with `fedlora deploy "
            f"superlink {shlex.quote(str(file.path))}`",
            markup=False,
        )
        return 1
    failures, before = 0, finished_rounds(folder)
    while failures < _TRIES:
        if (folder / "result.json").is_file():
            console.print(f"finished: {folder}", markup=False)
            return 0
        running = _at_work(environment)
        if running:
            number = str(running[0]["run-id"])
            if _is_written(folder):
                console.print(f"run {number} is at work on this SuperLink; following it")
                subprocess.run([flower_command(), "log", number, CONNECTION, "--stream"], env=environment, check=False)
            else:  # Flower would notice a minute later that its server is gone
                console.print(f"run {number} has no server any more, as after a crash; it is ended")
                command = [flower_command(), "stop", number, CONNECTION]
                subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
                _wait_until_over(environment)
                continue
        else:
            _start(app, {**flat, "run.resume": (folder / "config.toml").is_file()}, environment)
        _wait_until_over(environment)
        if (folder / "result.json").is_file():
            continue
        now = finished_rounds(folder)
        failures, before = (failures + 1 if now == before else 1), now
        console.print(f"the run ended after round {now} of {config.rounds}: {_why(environment)}", markup=False)
        if failures < _TRIES:
            time.sleep(_PAUSE_S)
    console.print(f"fedlora: the run failed {_TRIES} times without a finished round between; it stands in {folder}")
    return 1


def app_folder() -> Path:
    """Return the folder of the Flower app, which is sent to the sites' SuperNodes.

    Raises:
        ValueError: fedlora is not installed from a checkout.
    """
    folder = Path(str(fedlora.__file__)).resolve().parents[1]
    if not (folder / "pyproject.toml").is_file():
        raise ValueError(
            f"{folder} holds no pyproject.toml: a coordinator needs a checkout of fedlora, installed with `pip install "
            "--editable`, since Flower builds from it what it sends to the sites."
        )
    return folder


def read_run(file: CoordinatorFile, app: Path) -> tuple[dict[str, Any], Config]:
    """Return the run's configuration, by dotted key and resolved.

    Raises:
        ValueError: It cannot be read or used.
    """
    try:
        own = from_toml(file.run.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{file.path} [server]: run = {str(file.run)!r}: cannot be read ({error}).") from error
    flat = absolute_paths({**read_overrides(app, []), **own})
    if not flat.get("federation.sites"):
        raise ValueError(f"{file.run}: federation.sites must name the sites of this run.")
    if not flat.get("run.name"):
        raise ValueError(f"{file.run}: run.name must be given, by which a run that was interrupted goes on.")
    return flat, resolve({**flat, "run.resume": False})


def finished_rounds(folder: Path) -> int:
    """Return how many rounds of a run are complete."""
    try:
        state = json.loads((folder / "checkpoint" / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    return int(state["round"])


def _is_written(folder: Path) -> bool:
    """Return whether a server is at work on a run: it holds the folder's lock, once it has loaded its model."""
    end = time.monotonic() + _LOAD_S
    while time.monotonic() < end:
        try:
            with FileLock(folder / ".lock", timeout=0):
                pass
        except (Timeout, OSError):
            return True
        time.sleep(1.0)
    return False


def _start(app: Path, flat: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Submit the run and stream its log until it ends."""
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder:
        file = Path(folder) / "run-config.toml"
        file.write_text(to_toml(flat), encoding="utf-8")
        copy = shipped(app, Path(folder) / "app", flat)
        command = [flower_command(), "run", str(copy), CONNECTION, "--stream", "--run-config", str(file)]
        subprocess.run(command, env=dict(environment), check=False)


def _runs(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the SuperLink's runs, newest first; none where it does not answer."""
    command = [flower_command(), "ls", CONNECTION, "--format", "json"]
    answer = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=False)
    try:
        runs = json.loads(answer.stdout)["runs"]
    except (ValueError, KeyError, TypeError):
        return []
    return list(runs)


def _at_work(environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the SuperLink's runs that are not over."""
    return [run for run in _runs(environment) if str(run.get("status", "")).split(":")[0] != "finished"]


def _wait_until_over(environment: Mapping[str, str]) -> None:
    """Wait until no run is at work: a stream may end before its run."""
    while _at_work(environment):
        time.sleep(2.0)


def _why(environment: Mapping[str, str]) -> str:
    runs = _runs(environment)
    if not runs:
        return "the SuperLink does not answer"
    lines = [line for line in str(runs[0].get("status-details", "")).strip().splitlines() if line.strip()]
    return f"{runs[0].get('status')}{': ' + lines[-1] if lines else ''}"


def _superlink_answers(file: CoordinatorFile) -> bool:
    """Return whether the SuperLink answers, within a minute."""
    address, end = f"https://127.0.0.1:{file.link_port}/health", time.monotonic() + _LINK_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5, context=ssl.create_default_context(cafile=str(file.ca))):
                return True
        except OSError:
            time.sleep(1.0)
    return False
