"""Starts the SuperLink of a run on this machine: Flower's local one, without its limit of 15 seconds.

``flwr run`` starts a SuperLink by itself and gives up where it does not answer within 15 seconds, as on a busy machine,
or where another process has taken its port. Here it is started beforehand, waited for, and started again on another
port where it ends; ``flwr run`` then finds it by its address in Flower's configuration.
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

from clients.own_ray import RAY_ENVIRONMENT
from fedlora.runs.lock import COMMAND, this_command
from simulations import cluster
from simulations.keeper import end_processes

# What Flower does by itself at start-up and a run must not: install [project].dependencies anew (torch among
# them) into an environment of its own, and call home.
FLOWER_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    **RAY_ENVIRONMENT,
    "PYTHONUNBUFFERED": "1",
}
_TRIES = 3
_READY_S = 120.0
_PROBE_S = 2.0
_PAUSE_S = 0.2
_LOG_BYTES = 2000
# What Ray appends to its folder for a socket, ray/session_YYYY-MM-DD_hh-mm-ss_ffffff_PID/sockets/plasma_store.N, and
# what a path of a socket may have; macOS has a little less than Linux.
_SOCKET = 76
_SOCKET_LIMIT = 103


class SuperLink(NamedTuple):
    """A running SuperLink.

    Attributes:
        environment: For those who talk to it.
        process: The process.
    """

    environment: dict[str, str]
    process: subprocess.Popen[bytes]


class StartError(RuntimeError):
    """The SuperLink does not start; the message says why, and where its log is."""


def begin_superlink(home: Path) -> SuperLink:
    """Begin to start a SuperLink for simulations whose files are in ``home``; :func:`start_superlink` waits for it."""
    # What Ray leaves goes with the home; a run folder's lock names the command.
    environment = {"RAY_TMPDIR": str(home), **flower_environment(home), COMMAND: this_command()}
    if cluster.named():
        cluster.put_command(home / "bin")
        environment["PATH"] = os.pathsep.join([str(home / "bin"), environment["PATH"]])
    command = [flower_command("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(_port(environment)), "--database", str(home / "state.db")]
    with superlink_log(home).open("ab") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return SuperLink(environment, process)


def start_superlink(home: Path, begun: SuperLink | None = None) -> SuperLink:
    """Start a SuperLink for simulations whose files are in ``home``, and wait until it answers.

    Args:
        home: The folder.
        begun: One whose start was begun before.

    Raises:
        StartError: None does.
    """
    link, reason = begun or begin_superlink(home), ""
    for left in reversed(range(_TRIES)):
        port = _port(link.environment)
        reason = _until_ready(link.process, port)
        if not reason:
            connection = f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\n'
            (home / "config.toml").write_text(connection + "insecure = true\n", encoding="utf-8")
            return link
        end_processes(home)
        link.process.wait()
        if left:
            link = begin_superlink(home)
    raise StartError(f"the SuperLink {reason}, {_TRIES} times{keep_log(home)}")


def _port(environment: Mapping[str, str]) -> int:
    return int(environment["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"])


def _until_ready(process: subprocess.Popen[bytes], port: int) -> str:
    """Wait until a SuperLink answers; return what is wrong, or nothing."""
    end = time.monotonic() + _READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            return f"ended with exit code {process.returncode}"
        if _answers(port) and _listens(process.pid, port):
            return ""
        time.sleep(_PAUSE_S)
    return f"did not answer within {_READY_S:.0f} s"


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PROBE_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _listens(pid: int, port: int) -> bool:
    """Return whether it is this process that listens on a port: another run's SuperLink may have been faster."""
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)


def superlink_log(home: Path) -> Path:
    """Return the file with what a run's SuperLink, ServerApp and nodes have printed."""
    return home / "superlink.log"


def keep_log(home: Path) -> str:
    """Copy the SuperLink's log to where it outlives its home; return the end of a sentence that says where."""
    log = superlink_log(home)
    if not log.is_file():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")[-_LOG_BYTES:].strip()
    try:
        handle, copy = tempfile.mkstemp(prefix="fedlora-superlink-", suffix=".log")
        os.close(handle)
        shutil.copyfile(log, copy)
    except OSError as error:
        return f"; its log cannot be kept ({error}), the end of it:\n{text}"
    return f"; its log is kept in {copy}, the end of it:\n{text}"


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of a Flower whose files are in ``home`` and whose ports nobody else uses."""
    http_port, control = free_ports(2)
    here = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))
    return {
        **os.environ,
        **FLOWER_ENVIRONMENT,
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(http_port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "no_proxy": here,
        "NO_PROXY": here,
    }


def make_home() -> Path:
    """Make a Flower home for a run, whose path is short enough for the sockets that Ray makes in it.

    Raises:
        OSError: There is no place for it.
    """
    own = Path(tempfile.gettempdir())
    for place in (own, Path("/tmp"), Path("/var/tmp")):
        short = len(os.fsencode(place / "fedlora-12345678")) + _SOCKET <= _SOCKET_LIMIT
        if short and os.access(place, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="fedlora-", dir=place))
    raise OSError(
        f"no folder for a run's temporary files: {own} is too long a path for the sockets that Ray makes in it, and "
        "/tmp cannot be written; set TMPDIR to a folder with a short path."
    )


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
