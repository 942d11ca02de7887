"""The coordinator's two servers: Flower's SuperLink on loopback, and in front of it the gateway that sites reach."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import final

import httpx
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from deploy.admission import HEALTH
from deploy.coordinator_file import SIGNING_KEY, CoordinatorFile
from deploy.gateway import Gateway
from deploy.trust import authority, read_public_keys
from fedlora.storage import write_whole
from simulations.keeper import end_processes
from simulations.superlink import flower_command, flower_environment

_logger = logging.getLogger(__name__)

CONNECTION = "deployment"
"""What Flower's configuration in the coordinator's Flower home calls this SuperLink."""

_MARK = "FEDLORA_SUPERLINK"  # environment variable of all that a SuperLink has started, whatever became of its parents
_READY_S = 60.0
_GRACE_S = 10.0
_LOG_LINES = 40


def serve(file: CoordinatorFile) -> int:
    """Start the SuperLink, register the sites, open the gateway, and serve until SIGTERM or SIGINT.

    Nothing is started again when it has died: that is systemd's part.

    Args:
        file: The coordinator's file.

    Returns:
        0 after a signal; 1 when the SuperLink or the gateway has died or does not start, and the log says which.

    Raises:
        ValueError: The file names a port, certificate, key or site that cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request that is passed on
    with _signals() as stopped:
        gateway = Gateway(file)
        try:
            with _superlink(file) as link:
                fault = _until_ready(link, file, stopped)
                if not fault and not stopped.is_set():
                    nodes = register_sites(file.flower_home, CONNECTION, file.sites)
                    write_whole(roster_path(file), (json.dumps(nodes, indent=2) + "\n").encode())
                    gateway.start()
                    _logger.info("ready: gateway at %s:%d for %s", file.host, gateway.port, ", ".join(nodes))
                    fault = _until_one_dies(link, gateway, stopped)
        finally:
            gateway.stop()
    if fault:
        _logger.error("%s", fault)
        return 1
    return 0


def roster_path(file: CoordinatorFile) -> Path:
    """Return where each site's SuperNode stands, for ``federation.roster``."""
    return file.database.with_name("roster.json")


def register_sites(flower_home: Path, connection: str, sites: Mapping[str, Path]) -> dict[str, int]:
    """Register each site's public key with the SuperLink, unless it is.

    Args:
        flower_home: Folder of Flower's ``config.toml``.
        connection: The SuperLink's name there.
        sites: File of each site's public key, by the site's name.

    Returns:
        Each site's SuperNode, in the order of ``sites``.

    Raises:
        ValueError: A key cannot be read or is registered for another site, or a site is registered with another key.
        httpx.HTTPError: The SuperLink cannot be reached.
    """
    keys = {name: public_key_to_bytes(key) for name, key in read_public_keys(sites).items()}
    address, ca = _read_connection(flower_home / "config.toml", connection)
    with ControlHttpClient.from_server_address(address, False, ca, interceptors=[]) as client:
        listed = client.ListNodes(ListNodesRequest()).nodes_info
        known = [node for node in listed if node.status != NodeStatus.UNREGISTERED]
        nodes: dict[str, int] = {}
        for name, key in keys.items():
            for node in known:
                if (node.name == name) != (node.public_key == key):
                    what = "another key" if node.name == name else f"this key as site {node.name!r}"
                    raise ValueError(
                        f"[sites] {name} = {str(sites[name])!r}: the SuperLink knows {what}; if that is over, take it "
                        f"out: FLWR_HOME={shlex.quote(str(flower_home))} flwr supernode unregister {node.node_id} "
                        f"{connection}"
                    )
                if node.public_key == key:
                    nodes[name] = node.node_id
        for name, key in keys.items():
            if name not in nodes:
                try:
                    nodes[name] = client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
                except httpx.HTTPStatusError as error:
                    reason = FlowerError.from_json(error.response.text) or error
                    raise ValueError(
                        f"[sites] {name} = {str(sites[name])!r}: the SuperLink does not register it ({reason}); a key "
                        "that was taken out once is not taken again: make a new one."
                    ) from error
                _logger.info("registered site %s as SuperNode %d", name, nodes[name])
    return {name: nodes[name] for name in sites}


@final
class _SuperLink:
    """A running SuperLink, and the last lines of what it and its children have printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._reader = threading.Thread(target=self._read, name="superlink's log", daemon=True)
        self._reader.start()

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def died(self) -> str:
        """Return what is to be said of its end."""
        self._reader.join(1)
        return f"the SuperLink has ended with exit code {self.code}{self.log()}"

    def log(self) -> str:
        """Return the end of its log, for a message."""
        return "; the end of its log:\n" + "".join(self._lines)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.append(line)
                sys.stderr.write(line)


@contextmanager
def _superlink(file: CoordinatorFile) -> Iterator[_SuperLink]:
    """Start the SuperLink, and end it with all that it has started."""
    _check_link_port(file.link_port)
    file.database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [flower_command("flower-superlink"), "--host", "127.0.0.1"]
    command += ["--port", str(file.link_port), "--database", str(file.database)]
    command += ["--ssl-certfile", str(file.certificate), "--ssl-keyfile", str(file.key)]
    command += ["--ssl-ca-certfile", str(file.ca)]
    command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    mark = uuid.uuid4().hex
    environment = {**flower_environment(file.flower_home), _MARK: mark, SIGNING_KEY: str(file.signing_key)}
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=file.path.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        umask=0o077,  # its database holds what sites send
    )
    try:
        yield _SuperLink(process)
    finally:
        end_processes(mark, _MARK)
        process.wait()


def _check_link_port(port: int) -> None:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise ValueError(
            f"link-port = {port}: the SuperLink cannot listen there ({error.strerror}); is it running already, or is "
            "the port another's?"
        ) from error


def _until_ready(link: _SuperLink, file: CoordinatorFile, stopped: threading.Event) -> str:
    """Wait until the SuperLink answers; return what is wrong, or nothing."""
    end = time.monotonic() + _READY_S
    problem = "no answer"
    with httpx.Client(verify=authority(file.ca), trust_env=False) as client:
        while time.monotonic() < end:
            if link.code is not None:
                return link.died()
            try:
                if client.get(f"https://127.0.0.1:{file.link_port}{HEALTH}").is_success:
                    return ""
            except httpx.HTTPError as error:
                problem = str(error)
                if "CERTIFICATE_VERIFY_FAILED" in problem:
                    return f"certificate = {str(file.certificate)!r}: no site would trust it ({problem})"
            if stopped.wait(0.2):
                return ""
    return f"the SuperLink was not ready within {_READY_S:.0f} s ({problem}){link.log()}"


def _until_one_dies(link: _SuperLink, gateway: Gateway, stopped: threading.Event) -> str:
    """Wait for the end; return what has died, or nothing after a signal."""
    while not stopped.wait(0.2):
        if link.code is not None:
            return link.died()
        if not gateway.running:
            return "the gateway has ended; its log says why"
    return ""


def _read_connection(path: Path, connection: str) -> tuple[str, bytes]:
    """Return address and authority of a SuperLink in Flower's configuration."""
    try:
        entry = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"][connection]
        return str(entry["address"]), Path(entry["root-certificates"]).read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: [superlink.{connection}] must have address and root-certificates ({error!r}); "
            "`fedlora deploy init` writes it."
        ) from error


# -- processes ------------------------------------------------------------------------------------------------


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Provide an event that SIGTERM and SIGINT set; they do nothing else inside the block."""
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopped.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
