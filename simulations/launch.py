"""Runs the app under a Flower of its own, with an exit code that says how the run ended.

``flwr run --stream`` exits 0 when the run failed, leaves a SuperLink behind for good, and takes client code
from the directory in which that SuperLink happened to be started. Here every run has its own Flower home
and ports; whatever was started with that home is ended when the run is over, however it is over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

from fedlora.config import Scalar, from_toml, to_toml

# What Flower does by itself at start-up and a run must not: install [project].dependencies anew (torch among
# them) into an environment of its own, and call home.
FLOWER_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray advises, instead of warning about it at each start
    "PYTHONUNBUFFERED": "1",
}
_GRACE_S = 10.0
CONFIG_TABLE = "[tool.flwr.app.config]\n"


def launch(app: Path, config: Mapping[str, Scalar], federation_config: Sequence[str], console: Console) -> int:
    """Run ``flwr run --stream`` on ``app``.

    Args:
        app: Folder of the app.
        config: The whole run configuration.
        federation_config: Options of ``--federation-config``.
        console: Where the verdict goes.

    Returns:
        0 when the run completed, 1 when it did not.
    """
    with _home() as (home, environment):
        file = home / "run-config.toml"
        file.write_text(to_toml(config), encoding="utf-8")
        command = [
            flower_command(),
            "run",
            str(shipped(app, home / "app", config)),
            "--stream",
            "--run-config",
            str(file),
        ]
        for option in federation_config:
            command += ["--federation-config", option]
        started = subprocess.run(command, env=environment, cwd=app, check=False)
        if started.returncode != 0:
            console.print("fedlora: the run could not be started; Flower says why above.", markup=False)
            _show_log(home, console)
            return 1
        return _verdict(environment, home, console)


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


def run_side_by_side(app: Path, sweep: Path, workers: int, federation_config: Sequence[str]) -> None:
    """Run a sweep's file by several ``fedlora sweep`` processes at once, each with a share of its groups.

    Each has a Flower of its own, one of the GPUs that this process may use, and its part of the CPU cores.
    """
    import torch

    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if gpus == [""]:
        gpus = [str(number) for number in range(torch.cuda.device_count())]
    cores = max(2, (os.cpu_count() or 1) // workers)
    options = list(federation_config)
    if not any("init-args-num-cpus" in option for option in options):
        options.append(f"init-args-num-cpus={cores}")
    command = [sys.executable, "-m", "simulations.cli", "sweep", str(sweep), str(app)]
    command += [part for option in options for part in ("--federation-config", option)]
    children: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        for child in children:
            if child.poll() is None:
                child.terminate()  # it ends what it has started itself
        for child in children:
            child.wait()

    with _interruptible(end):
        for number in range(workers):
            environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})}
            share = ["--share", f"{number + 1}/{workers}"]
            children.append(subprocess.Popen([*command, *share], cwd=app, env=environment))
        for child in children:
            child.wait()


def _verdict(environment: Mapping[str, str], home: Path, console: Console) -> int:
    """Ask Flower how the one run of this home ended."""
    answer = subprocess.run(
        [flower_command(), "ls", "--format", "json"], env=environment, capture_output=True, text=True, check=False
    )
    try:
        run = json.loads(answer.stdout)["runs"][0]
        status, details = str(run["status"]), str(run.get("status-details", ""))
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        status, details = "unknown", answer.stderr.strip() or answer.stdout.strip()
    if status == "finished:completed":
        return 0
    lines = [line for line in details.strip().splitlines() if line.strip()]
    console.print(f"fedlora: the run failed ({status}): {lines[-1] if lines else 'no details'}", markup=False)
    if not lines:
        _show_log(home, console)
    return 1


def _show_log(home: Path, console: Console) -> None:
    """Print the end of the SuperLink's log, which goes with its home."""
    log = home / "local-superlink" / "superlink.log"
    if log.is_file():
        console.print(log.read_text(encoding="utf-8", errors="replace")[-2000:], markup=False)


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower whose files are in ``home`` and whose ports nobody else uses."""
    http, control = free_ports(2)
    return {
        **os.environ,
        **FLOWER_ENVIRONMENT,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


@contextmanager
def _home() -> Iterator[tuple[Path, dict[str, str]]]:
    """Provide a Flower home for one run, and end every process that was started with it."""
    home = Path(tempfile.mkdtemp(prefix="fedlora-"))

    def end() -> None:
        end_processes(home)
        shutil.rmtree(home, ignore_errors=True)

    with _interruptible(end):
        yield home, flower_environment(home)


@contextmanager
def _interruptible(end: Callable[[], None]) -> Iterator[None]:
    """Call ``end`` whichever way the block ends; SIGTERM and SIGHUP interrupt it as Ctrl-C does."""
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
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


def end_processes(home: Path | str, variable: str = "FLWR_HOME") -> None:
    """End every process whose environment has ``home`` as its Flower home, or this value of another variable."""
    found = _processes(str(home), variable)
    for process in found:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(found, timeout=_GRACE_S)
    rest = [*{*alive, *_processes(str(home), variable)}]
    for process in rest:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(rest, timeout=_GRACE_S)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _processes(value: str, variable: str) -> list[psutil.Process]:
    """Return the processes started with this value of an environment variable, and their children.

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
    return list(found.values())


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback address that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def flower_command(name: str = "flwr") -> str:
    """Return the path of one of Flower's commands beside this Python."""
    return str(Path(sys.executable).parent / name)
