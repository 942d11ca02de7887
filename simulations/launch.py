"""Runs the app under a Flower of its own, with an exit code that says how the run ended.

``flwr run --stream`` exits 0 when the run failed, leaves a SuperLink behind for good, and takes client code
from the directory in which that SuperLink happened to be started. Here every run has its own Flower home
and ports; whatever was started with that home is ended when the run is over or its command is gone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fedlora.config import Scalar, from_toml, to_toml
from fedlora.runs.lock import COMMAND, Holder, is_held, this_command
from simulations import cluster
from simulations.keeper import end_processes, kept
from simulations.superlink import (
    StartError,
    SuperLink,
    begin_superlink,
    flower_command,
    keep_log,
    make_home,
    start_superlink,
)

_FOLLOWS = 5  # times that a log which ends before its run is followed again
_ASKS = 5
_PAUSE_S = 1.0
_CLIENT_APPS = 4  # side by side: each waits for trainers most of the time
SUPERNODES = 2
"""That Flower starts by default."""
_FLOWERS = 2  # cores for each of its actors, by itself
_LOOK_S = 0.2
_OF_GPU = 0.9  # of its memory that processes share; the rest is what each one takes beside its tensors
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# By which programs are told to print colours into a pipe, too, as Jupyter tells them: Flower's JSON is none then.
COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")
CONFIG_TABLE = "[tool.flwr.app.config]\n"


def launch(
    app: Path,
    config: Mapping[str, Scalar],
    federation_config: Sequence[str],
    console: Console,
    check: Callable[[], object] = lambda: None,
) -> int:
    """Run ``flwr run --stream`` on ``app``.

    Args:
        app: Folder of the app.
        config: The whole run configuration.
        federation_config: Options of ``--federation-config``.
        console: Where the verdict goes.
        check: What must be tried before the run; it is tried while Flower starts, and what it raises is raised.

    Returns:
        0 when the run completed, 1 when it did not.
    """
    home = make_home()
    with kept(home, folders=[home]):
        begun = begin_superlink(home)
        check()
        copy, file = shipped(app, home / "app", config), home / "run-config.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        try:
            link = start_superlink(home, begun)
        except StartError as error:
            console.print(f"fedlora: the run could not be started: {error}", markup=False)
            return 1
        command = [flower_command(), "run", str(copy), "--stream", "--run-config", str(file)]
        for option in with_few_actors(federation_config, _cores()):
            command += ["--federation-config", option]
        code = _flower(command, link, app)
        run = _run(link)
        if run is None and code != 0 and link.process.poll() is None:
            said = f"fedlora: the run could not be started; Flower says why above{keep_log(home)}"
            console.print(said, markup=False)
            return 1
        return _verdict(_followed(run, link), link, home, console)


def _cores() -> int:
    """Return the CPU cores that Ray will count: in a container those that it may use."""
    from ray._private.utils import get_num_cpus

    return int(get_num_cpus())


def with_few_actors(federation_config: Sequence[str], cores: int) -> list[str]:
    """Return options of ``--federation-config`` by which Flower starts a few actors, where they do not say how many.

    It starts one for each two cores, used or not: 32 processes on a machine of 64 cores.

    Args:
        federation_config: The options.
        cores: Of this machine, as Ray counts them.
    """
    said = " ".join(federation_config)
    given = re.search(r"init-args-num-cpus=(\d+)", said)
    few = (int(given[1]) if given else cores) // _CLIENT_APPS
    if "client-resources" in said or few <= _FLOWERS or cluster.named():
        return list(federation_config)
    return [*federation_config, f"client-resources-num-cpus={few}"]


def end_abandoned(folder: Path) -> None:
    """End what a command that was killed has left at work on a folder, so that another one can go on with it."""
    holder = Holder.of(folder)
    if holder is not None and holder.abandoned and is_held(folder):
        end_processes(holder.command, COMMAND)


def shipped(app: Path, folder: Path, config: Mapping[str, Scalar] | None = None) -> Path:
    """Copy what an app ships into ``folder``, and return it; the app itself where it does not say what it ships.

    Flower walks through everything below an app's folder before it leaves out what is not shipped: with a virtual
    environment in it that takes seconds.

    Args:
        app: Folder of the app.
        folder: Where the copy goes.
        config: The run configuration. Flower refuses keys that the app's table does not have, as those of a plug-in
            are: the copy's has them.
    """
    pyproject = (app / "pyproject.toml").read_text(encoding="utf-8")
    patterns = tomllib.loads(pyproject)["tool"]["flwr"]["app"].get("fab-include", [])
    if not patterns:
        return app
    for pattern in ("pyproject.toml", ".gitignore", *patterns):
        for file in app.glob(pattern):
            if file.is_file():
                copy = folder / file.relative_to(app)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    (folder / "pyproject.toml").write_text(with_keys(pyproject, config or {}), encoding="utf-8")
    return folder


def with_keys(pyproject: str, config: Mapping[str, Scalar]) -> str:
    """Return the text of an app's ``pyproject.toml`` with the keys of ``config`` that its table lacks."""
    known = from_toml(pyproject)
    missing = {key: value for key, value in config.items() if f"tool.flwr.app.config.{key}" not in known}
    before, header, rest = pyproject.partition(CONFIG_TABLE)
    return "".join([before, header, to_toml(missing), rest])


def own_cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_by_side(
    app: Path,
    sweep: Path,
    workers: int,
    federation_config: Sequence[str],
    again: Callable[[int], bool] | None = None,
    together: int = 1,
) -> None:
    """Run a sweep's file by several ``fedlora sweep`` processes at once, each with a share of its groups.

    Each has a Flower of its own, one of the GPUs that this process may use, and its part of the CPU cores.

    Args:
        app: Folder of the app.
        sweep: The sweep's file.
        workers: How many.
        federation_config: Options of ``--federation-config``.
        again: For processes without Flower, which share the memory of GPUs, too: whether one that died, by its number
            from 1, is to be started again; None: they have a Flower, and see to that themselves.
        together: Cells that a process without Flower runs side by side.
    """
    in_process = again is not None
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    cores = max(2, own_cores() // workers)
    options = list(federation_config)
    if not in_process and not any("init-args-num-cpus" in option for option in options):
        options.append(f"init-args-num-cpus={cores}")
    command = [sys.executable, "-m", "simulations.cli", "sweep", str(sweep), str(app)]
    command += [part for option in options for part in ("--federation-config", option)]
    if in_process:
        on_one = -(-workers // len(gpus)) if gpus else 1
        command += [
            "--in-process",
            "--together",
            str(together),
            "--gpu-share",
            str(_OF_GPU / on_one if on_one > 1 else 1.0),
        ]
    mark = this_command()
    # What numpy computes at the server would take all cores otherwise, in every process.
    threads = {name: str(cores) for name in _THREADS if in_process and name not in os.environ}

    def start(number: int) -> subprocess.Popen[bytes]:
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[(number - 1) % len(gpus)]} if gpus else {}
        environment = {**os.environ, **gpu, **threads, COMMAND: mark}
        return subprocess.Popen([*command, "--share", f"{number}/{workers}"], cwd=app, env=environment)

    with kept(mark, COMMAND):
        children = {number: start(number) for number in range(1, workers + 1)}
        while children:
            for number, child in list(children.items()):
                code = child.poll()
                if code and again is not None and again(number):
                    children[number] = start(number)
                elif code is not None:
                    del children[number]
            time.sleep(_LOOK_S)


def _flower(command: Sequence[str], link: SuperLink, folder: Path | None = None) -> int:
    """Run a command of Flower's that prints what the user sees; Ctrl-C is for the one that waits for it alone."""
    return subprocess.run(command, env=link.environment, cwd=folder, check=False, start_new_session=True).returncode


def _run(link: SuperLink) -> dict[str, Any] | None:
    """Return what Flower says of the one run of this home; None where it does not answer, or has none."""
    command = [flower_command(), "ls", "--format", "json"]
    plain = {key: value for key, value in link.environment.items() if key not in COLOURS}
    for _ in range(_ASKS):
        if link.process.poll() is not None:
            break
        answer = subprocess.run(command, env=plain, capture_output=True, text=True, check=False, start_new_session=True)
        try:
            runs = json.loads(answer.stdout)["runs"]
            return dict(runs[0]) if runs else None
        except (json.JSONDecodeError, KeyError, TypeError):
            time.sleep(_PAUSE_S)
    return None


def _followed(run: dict[str, Any] | None, link: SuperLink) -> dict[str, Any] | None:
    """Wait until a run is over, whose log may have ended before it, and return what Flower says of it then."""
    follows = 0
    while run is not None and not str(run["status"]).startswith("finished"):
        time.sleep(_PAUSE_S)
        if follows < _FOLLOWS:
            follows += 1
            command = [flower_command(), "log", str(run["run-id"]), "--stream"]
            _flower(command, link)
        run = _run(link)
    return run


def _verdict(run: dict[str, Any] | None, link: SuperLink, home: Path, console: Console) -> int:
    """Say how a run ended where it did not complete, and return the exit code."""
    if run is None:
        code = link.process.poll()
        why = "Flower does not answer" if code is None else f"its SuperLink ended with exit code {code}"
        console.print(f"fedlora: the run failed: {why}{keep_log(home)}", markup=False)
        return 1
    status, details = str(run["status"]), str(run.get("status-details", ""))
    if status == "finished:completed":
        return 0
    lines = [line for line in details.strip().splitlines() if line.strip()]
    said = lines[-1] if lines else f"no details{keep_log(home)}"
    console.print(f"fedlora: the run failed ({status}): {said}", markup=False)
    return 1
