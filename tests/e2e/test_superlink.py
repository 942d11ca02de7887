"""The coordinator's servers as real processes: SuperNodes come, strangers do not, and what dies takes all with it."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any, Self, final

import httpx
import psutil
import pytest
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.runtime import RuntimeHttpClient

from deploy import pki
from deploy.coordinator_file import CoordinatorFile
from deploy.gateway import Gateway
from deploy.superlink import CONNECTION, register_sites, roster_path, serve
from tests.support.runs import BIN, Family

pytestmark = pytest.mark.e2e

SERVE = "import sys; from pathlib import Path; from deploy.coordinator_file import CoordinatorFile as File"
SERVE += "; from deploy.superlink import serve; sys.exit(serve(File.read(Path(sys.argv[1]))))"
APP = """
[project]
name = "tiny"
version = "1.0.0"
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "tiny.both:server"
clientapp = "tiny.both:client"
[tool.flwr.app.config]
out = ""
"""
CODE = """
import os
from pathlib import Path
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    doubled = [2 * array for array in message.content["a"].to_numpy_ndarrays()]
    return Message(RecordDict({"a": ArrayRecord(doubled)}), reply_to=message)

@server.main()
def main(grid, context):
    values = np.random.default_rng(0).normal(size=3_000_000).astype(np.float32)
    content = RecordDict({"a": ArrayRecord([values])})
    nodes = sorted(grid.get_node_ids())
    replies = grid.send_and_receive([Message(content, node, "train", ttl=120.0) for node in nodes], timeout=120)
    right = [np.array_equal(2 * values, one.content["a"].to_numpy_ndarrays()[0]) for one in replies]
    Path(context.run_config["out"]).write_text(f"{right} {os.environ['FEDLORA_SIGNING_KEY']}")
"""


@final
class Federation:
    """A coordinator and sites in one folder, and what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family = Family()
        self.coordinators: list[subprocess.Popen[bytes]] = []
        self.started: list[subprocess.Popen[bytes]] = []
        for name in ("ca", "other"):
            pki.create_authority(folder / f"{name}.key", folder / f"{name}.crt")
        certificate(folder, "server")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pki, "datetime", LongAgo)
            certificate(folder, "expired")
        sites = {name: pki.create_supernode_key(folder / name, name) for name in ("a", "b")}
        pki.create_supernode_key(folder / "stranger", "stranger")
        port, link_port = free_ports(2)
        self.file = CoordinatorFile(
            path=folder / "coordinator.toml",
            host="127.0.0.1",
            port=port,
            link_port=link_port,
            ca=folder / "ca.crt",
            certificate=folder / "server.crt",
            key=folder / "server.key",
            database=folder / "state" / "superlink.sqlite",
            signing_key=folder / "adapter.key",
            flower_home=folder / "flwr",
            run=folder / "run.toml",
            sites=sites,
        )
        (folder / "flwr").mkdir()
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\naddress = "127.0.0.1:{link_port}"\n'
            f'root-certificates = "{folder / "ca.crt"}"\n'
        )
        self.file.path.write_text(
            f"[server]\nhost = '127.0.0.1'\nport = {port}\nlink-port = {link_port}\nca = 'ca.crt'\n"
            "certificate = 'server.crt'\nkey = 'server.key'\nsigning-key = 'adapter.key'\n"
            "[sites]\na = 'a.pub'\nb = 'b.pub'\n"
        )

    @property
    def log(self) -> str:
        return (self.folder / "coordinator.log").read_text()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the coordinator's servers, and wait until they say that they are ready."""
        ready = self.log.count(" ready: ") if (self.folder / "coordinator.log").exists() else 0
        with (self.folder / "coordinator.log").open("ab") as log:
            process = self.popen([sys.executable, "-c", SERVE, str(self.file.path)], log)
        self.coordinators.append(process)
        until(lambda: self.log.count(" ready: ") > ready or process.poll() is not None)
        assert process.poll() is None, self.log
        return process

    def supernode(self, log: str, *arguments: str, port: int = 0) -> subprocess.Popen[bytes]:
        """Start a SuperNode of the gateway's, or of another port's."""
        command = [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{port or self.file.port}"]
        command += ["--port", str(free_ports(1)[0]), *arguments]
        with (self.folder / log).open("ab") as file:
            return self.popen(command, file)

    def popen(self, command: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        environment = {**self.family.environment(), "FLWR_HOME": str(self.folder / "site"), **QUIET}
        process = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def flwr(self, *arguments: str) -> str:
        environment = {**self.family.environment(), "FLWR_HOME": str(self.file.flower_home), **QUIET}
        command = [str(BIN / "flwr"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def nodes(self) -> dict[str, str]:
        """Return what the SuperLink knows: each SuperNode's state by its name."""
        address = f"127.0.0.1:{self.file.link_port}"
        with ControlHttpClient.from_server_address(
            address, False, self.file.ca.read_bytes(), interceptors=[]
        ) as client:
            return {node.name: node.status for node in client.ListNodes(ListNodesRequest()).nodes_info}

    def with_key(self, name: str, ca: str = "ca") -> list[str]:
        key = ["--auth-supernode-private-key", str(self.folder / name)]
        return ["--root-certificates", str(self.folder / f"{ca}.crt"), *key]

    def refused(self, *arguments: str, port: int = 0) -> str:
        """Start a SuperNode that must end by itself, and return what it said."""
        process = self.supernode("stranger.log", *arguments, port=port)
        assert process.wait(60) != 0
        text = (self.folder / "stranger.log").read_text()
        (self.folder / "stranger.log").unlink()
        return text


QUIET = {
    "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "PYTHONUNBUFFERED": "1",
}


def until(condition: Callable[[], Any], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def certificate(folder: Path, name: str) -> None:
    authority = folder / "ca.crt"
    key, written = folder / f"{name}.key", folder / f"{name}.crt"
    pki.create_server_certificate(key, written, authority_key=folder / "ca.key", authority=authority, names=[])


@final
class LongAgo(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return cls.fromtimestamp((datetime.now(UTC) - timedelta(days=366)).timestamp(), tz)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Two sites behind the gateway, both online."""
    federation = Federation(tmp_path_factory.mktemp("federation"))
    try:
        federation.start()
        for name in ("a", "b"):
            federation.supernode(f"site-{name}.log", *federation.with_key(name))
        until(lambda: federation.nodes() == {"a": "online", "b": "online"})
        yield federation
    finally:
        federation.family.kill()
        for process in federation.started:
            process.wait()


def test_a_run_reaches_the_sites_through_the_gateway(federation: Federation) -> None:
    roster = json.loads(roster_path(federation.file).read_text())
    assert list(roster) == ["a", "b"]
    app, out = federation.folder / "app", federation.folder / "out"
    (app / "tiny").mkdir(parents=True)
    (app / "pyproject.toml").write_text(APP)
    (app / "tiny" / "__init__.py").touch()
    (app / "tiny" / "both.py").write_text(CODE)
    said = federation.flwr("run", str(app), CONNECTION, "--stream", "--run-config", f"out='{out}'")
    assert out.exists(), said
    assert out.read_text() == f"[True, True] {federation.file.signing_key}"


def test_only_loopback_reaches_the_superlink_itself(federation: Federation) -> None:
    listening = {
        (one.laddr.ip, one.laddr.port)
        for process in federation.family.meet()
        for one in process.net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    assert ("127.0.0.1", federation.file.link_port) in listening
    assert {ip for ip, port in listening if port == federation.file.link_port} == {"127.0.0.1"}
    modes = [path.stat().st_mode & 0o077 for path in federation.file.database.parent.glob("superlink.sqlite*")]
    assert modes
    assert not any(modes)


def test_strangers_are_refused_and_disturb_nothing(federation: Federation) -> None:
    folder = federation.folder
    assert "404" in federation.refused("--root-certificates", str(folder / "ca.crt"))  # register-node
    said = federation.refused(*federation.with_key("stranger"))
    assert "[code: 2004] not signed with the key of a site in the coordinator's file" in said
    assert "CERTIFICATE_VERIFY_FAILED" in federation.refused(*federation.with_key("a", ca="other"))
    said = federation.refused(*federation.with_key("a"))  # a's key twice
    assert "[code: 2004] Failed to activate SuperNode." in said
    for line in (
        r"refused 127.0.0.1: POST '/v1/fleet/register-node': 404",
        r"refused 127.0.0.1: POST '/v1/fleet/activate-node': 412, not signed with the key of a site",
        r"the SuperLink refused 127.0.0.1 \(site a\): /v1/fleet/activate-node: 412; is its key in use",
    ):
        assert re.search(line, federation.log), line
    assert federation.nodes() == {"a": "online", "b": "online"}

    old = replace(federation.file, port=0, certificate=folder / "expired.crt", key=folder / "expired.key")
    gateway = Gateway(old)
    gateway.start()
    try:
        assert "certificate has expired" in federation.refused(*federation.with_key("b"), port=gateway.port)
    finally:
        gateway.stop()
    assert federation.nodes() == {"a": "online", "b": "online"}


def test_control_and_runtime_are_not_behind_the_gateway(federation: Federation) -> None:
    address, ca = f"127.0.0.1:{federation.file.port}", federation.file.ca.read_bytes()
    with ControlHttpClient.from_server_address(address, False, ca, interceptors=[]) as client:
        calls: list[Callable[[], Any]] = [
            lambda: client.ListNodes(ListNodesRequest()),
            lambda: client.StartRun(StartRunRequest()),
            lambda: client.RegisterNode(RegisterNodeRequest(public_key=b"x", name="c")),
        ]
        for call in calls:
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                call()
    with (
        RuntimeHttpClient.from_server_address(address, False, ca, interceptors=[]) as runtime,
        pytest.raises(httpx.HTTPStatusError, match="404"),
    ):
        runtime.AcquireTask(AcquireTaskRequest())
    assert federation.nodes() == {"a": "online", "b": "online"}


def test_sites_are_registered_once(federation: Federation) -> None:
    home, sites = federation.file.flower_home, dict(federation.file.sites)
    before = json.loads(roster_path(federation.file).read_text())
    assert register_sites(home, CONNECTION, sites) == before
    for wrong, what in (
        ({"a": federation.folder / "stranger.pub"}, "knows another key"),
        ({"c": sites["a"]}, "knows this key as site 'a'"),
    ):
        with pytest.raises(ValueError, match=rf"{what}.*flwr supernode unregister {before['a']} {CONNECTION}"):
            register_sites(home, CONNECTION, wrong)
    with pytest.raises(ValueError, match=r"\[superlink.elsewhere\] must have address"):
        register_sites(home, "elsewhere", sites)
    assert len(federation.nodes()) == 2


def test_a_second_coordinator_says_that_there_is_one(
    federation: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="the gateway cannot listen there"):
        serve(federation.file)
    with pytest.raises(ValueError, match=f"link-port = {federation.file.link_port}: the SuperLink cannot listen"):
        serve(replace(federation.file, port=free_ports(1)[0]))
    # One that does not start, and one that no site would believe, say why.
    port, link_port = free_ports(2)
    caplog.set_level(logging.ERROR, "deploy.superlink")
    apart = replace(federation.file, port=port, link_port=link_port, flower_home=tmp_path)
    (tmp_path / "database").mkdir()
    assert serve(replace(apart, database=tmp_path / "database")) == 1
    assert "the SuperLink has ended with exit code" in caplog.text
    assert "unable to open database file" in caplog.text
    old = replace(apart, certificate=federation.folder / "expired.crt", key=federation.folder / "expired.key")
    assert serve(replace(old, database=tmp_path / "state" / "new.sqlite")) == 1
    assert "no site would trust it" in caplog.text
    for closed in (port, link_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", closed))


@pytest.mark.slow
def test_a_superlink_that_dies_takes_the_gateway_with_it_and_sites_come_back_by_themselves(
    federation: Federation,
) -> None:
    process = federation.coordinators[-1]
    [link] = [one for one in psutil.Process(process.pid).children() if "flower-superlink" in " ".join(one.cmdline())]
    link.kill()
    assert process.wait(30) == 1
    assert "the SuperLink has ended with exit code -9" in federation.log
    assert not [one for one in federation.family.left() if "supernode" not in one and "runtime-api" not in one]
    until(lambda: "Connection attempt failed" in (federation.folder / "site-a.log").read_text())
    federation.start()
    until(lambda: federation.nodes() == {"a": "online", "b": "online"})


def test_sigterm_ends_all_of_it(federation: Federation) -> None:
    process = federation.coordinators[-1]
    mine = psutil.Process(process.pid).children(recursive=True)
    assert any("flower-superlink" in " ".join(one.cmdline()) for one in mine)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(40) == 0
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in mine)
    for port in (federation.file.port, federation.file.link_port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
