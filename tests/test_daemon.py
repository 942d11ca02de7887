"""The real daemon of a site: its process, its socket, its Ray, and who may not talk to it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clients.errors import SiteError
from clients.own_ray import _LOOPBACK
from clients.protocol import VERSION, receive
from clients.release_log import ReleaseLog
from clients.site_file import SiteFile
from clients.socket_site import SocketSite
from fedlora.exchange import Instruction, Outcome, Update
from fedlora.privacy import Ledger
from tests.support.sites import coordinators_worker, instruction_of, request_of, server_config, site_file

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]
RUN = [sys.executable, "-m", "deploy.cli", "site", "run"]
ALLOWED, STRANGER = 65533, 65534
ACCESS = f'[access]\nusers = ["{ALLOWED}"]\nmax-message-bytes = {1 << 20}\n'
CONFIG = server_config()
REQUEST = request_of(CONFIG)


@dataclass
class Daemon:
    """The site north's daemon.

    Attributes:
        file: Its file.
        worker: The coordinator's own model.
        process: The daemon; None: it does not run.
    """

    file: SiteFile
    worker: Any
    process: psutil.Popen | None = None

    @property
    def site(self) -> SocketSite:
        return SocketSite(self.file.socket)

    @property
    def said(self) -> str:
        return (self.file.path.parent / "daemon.log").read_text()

    def start(self) -> None:
        with (self.file.path.parent / "daemon.log").open("ab") as log:
            self.process = psutil.Popen(
                [*RUN, str(self.file.path)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        until(self._answers, self)

    def _answers(self) -> bool:
        try:
            return ask(self.file.socket, b"is it there?") != b""
        except OSError:
            return False  # the socket of one that was killed

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        return [self.process, *self.process.children(recursive=True)]

    def end(self, number: int) -> list[psutil.Process]:
        """End the daemon by a signal, and return all the processes that it had."""
        family = self.family()
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)
        self.process = None
        return family

    def instruction(self, number: int, **changes: Any) -> Instruction:
        model = self.worker.loaded.model
        return instruction_of(CONFIG, model.specs, model.initial, REQUEST, number, **changes)

    def train(self, number: int, **changes: Any) -> Update:
        (update,) = self.site.train(self.instruction(number, **changes))
        return update


def until(there: Callable[[], Any], daemon: Daemon, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert daemon.process is not None
        assert daemon.process.poll() is None, daemon.said
        assert time.monotonic() < end, daemon.said
        time.sleep(0.1)


def ask(path: Path, data: bytes) -> bytes:
    """Send bytes, and return all that comes back until the daemon closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20.0)
        connection.connect(str(path))
        connection.sendall(data)
        answer = b""
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionResetError:  # it has not read all of it, or has no place for another connection
            if not answer:
                raise
    return answer


@pytest.fixture(scope="module")
def north() -> Iterator[Daemon]:
    """The daemon's folder, in one that other users may enter: they must be stopped at the socket."""
    folder = Path(tempfile.mkdtemp(prefix="fl-d-"))
    folder.chmod(0o755)
    made = Daemon(site_file(folder, more=ACCESS), coordinators_worker(folder, CONFIG))
    try:
        yield made
    finally:
        if made.process is not None:
            made.end(signal.SIGTERM)
        shutil.rmtree(folder)


@pytest.fixture
def daemon(north: Daemon) -> Daemon:
    """The running daemon, which has joined a run."""
    if north.process is None:
        north.start()
    assert north.site.join(REQUEST).reason == "", north.said
    return north


def test_it_joins_and_trains_and_says_so_in_its_books(daemon: Daemon) -> None:
    report = daemon.site.join(REQUEST)
    described = daemon.worker.describe()
    assert (report.site, report.reason, report.trainers) == ("north", "", 1)
    assert (report.digest, report.initial_digest) == (described.digest, described.initial_digest)
    update = daemon.train(1)
    assert update.report.outcome is Outcome.OK, update.report.reason
    assert all(value.dtype == np.float64 and np.isfinite(value).all() for value in update.tensors.values())
    entries = Ledger(daemon.file.state / "ledger.jsonl", "north").entries()
    assert entries[-1].hash == update.report.ledger_head
    assert ReleaseLog(daemon.file.state / "released.jsonl").lines()[-1]["ledger"] == entries[-1].hash
    assert daemon.file.state.stat().st_mode & 0o777 == 0o700


def test_what_it_refuses_comes_through_in_its_own_words(daemon: Daemon) -> None:
    asked = request_of(CONFIG, 0, **{"privacy.noise-multiplier": 0.1})
    assert daemon.site.join(asked).reason.endswith("privacy.noise-multiplier, by min-noise-multiplier")
    other = daemon.train(2, job="0" * 64)
    assert (other.report.outcome, other.report.reason) == (Outcome.NOT_JOINED, "it has not joined this run")
    large = daemon.train(2, tensors={"x": np.zeros(1 << 20)})
    assert "8388608 bytes of tensors are more than the 1048576 that are taken" in large.report.reason
    (report,) = daemon.site.evaluate(daemon.instruction(1))
    assert report.reason == "a client under DP does not report how its model does on its rows"


def test_a_second_daemon_of_the_same_site_is_refused(daemon: Daemon) -> None:
    """With one clear error, and the first one goes on."""
    done = subprocess.run(
        [*RUN, str(daemon.file.path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    said = " ".join((done.stdout + done.stderr).split())
    assert f"{daemon.file.state} is in use: another daemon serves this site" in said
    assert "Traceback" not in said
    assert daemon.site.join(REQUEST).reason == ""


def frame(header: bytes, *, magic: bytes = b"FLSD", version: int = VERSION) -> bytes:
    return struct.pack(">4sHI", magic, version, len(header)) + header


def question(kind: str, header: dict[str, Any], **tensors: list[Any]) -> bytes:
    return frame(json.dumps({"kind": kind, "header": header, "tensors": tensors}).encode())


def test_hostile_questions_are_answered_and_forgotten(daemon: Daemon) -> None:
    """Each is answered by an error, at once; none ends the daemon, or has it hold more memory."""
    assert daemon.process is not None
    instruction = {"round": 1, "clients": "all"}
    hostile = [
        (pickle.dumps({"kind": "train"}) * 4, "not a fedlora site"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "not a fedlora site"),
        (frame(pickle.dumps([1])), "a header cannot be read"),
        (frame(b"{}", version=VERSION + 1), f"version {VERSION + 1}"),
        (frame(b"[]"), "a header is not one of a frame"),
        (question("labels", {}), "there is no question of kind 'labels'"),
        (question("", {}), "there is no question of kind ''"),
        (question("x" * 10**6, {}), f"kind '{'x' * 40}'"),
        (question("train", {}, tensors=[["x", "float64", [5 << 27]]]), f"{5 << 30} bytes of tensors are more than"),
        (question("train", {}, tensors=[["x", "object", [1]]]), "x has dtype 'object'"),
        (question("train", instruction), "train."),
        (question("evaluate", {}), "evaluate."),
        (question("join", {}), "join.flat is not str"),
        (question("join", {**REQUEST.header(), "flat": "[" * 10**5}), "the configuration cannot be read"),
    ]
    before = daemon.process.memory_info().rss
    for data, reason in hostile:
        here, there = socket.socketpair()
        with here, there:
            here.sendall(ask(daemon.file.socket, data))
            answer = receive(there, 0)
        assert answer.kind == "error"
        assert reason in answer.header["reason"], answer
    for data in (b"", b"FLSD", question("train", {}, tensors=[["x", "float64", [9]]])):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:  # it goes in the middle of a frame
            connection.connect(str(daemon.file.socket))
            connection.sendall(data)
    assert daemon.process.memory_info().rss < before + (64 << 20)
    assert daemon.site.join(REQUEST).reason == ""
    assert daemon.process.is_running()


def test_silent_connections_take_all_places_and_give_them_back(daemon: Daemon) -> None:
    """Twenty that say nothing: what is beyond the bound is closed at once, and the daemon answers when they go."""
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(20)]
    try:
        for one in silent:
            one.settimeout(10.0)
            one.connect(str(daemon.file.socket))
        assert [one.recv(1) for one in silent[16:]] == [b""] * 4, "closed"
        with pytest.raises(SiteError, match="does not answer"):
            daemon.site.join(REQUEST)
    finally:
        for one in silent:
            one.close()
    until(daemon._answers, daemon, 10.0)
    assert daemon.site.join(REQUEST).reason == ""
    assert "refused a connection: 16 are open" in daemon.said


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="needs a Python that any user may run")
def test_a_user_who_is_not_named_is_refused(daemon: Daemon) -> None:
    """By who it is, though the socket's file would let it: a named user gets an answer, another not a byte."""
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(20); s.connect(sys.argv[1]); "
        "s.sendall(b'x' * 10); print(len(s.recv(4096)))"
    )
    answers = {}
    for user in (ALLOWED, STRANGER):
        command = ["/usr/bin/python3", "-c", code, str(daemon.file.socket)]
        done = subprocess.run(
            command, user=user, group=user, extra_groups=[], cwd="/", capture_output=True, text=True, check=False
        )
        answers[user] = done.stdout.strip(), done.stderr[-200:]
    assert int(answers[ALLOWED][0]) > 10, answers
    assert answers[STRANGER][0] == "0" or "ConnectionResetError" in answers[STRANGER][1], answers
    assert f"refused user {STRANGER}" in daemon.said
    reading = ["/usr/bin/python3", "-c", "import sys; open(sys.argv[1])", str(daemon.file.state / "ledger.jsonl")]
    done = subprocess.run(reading, user=ALLOWED, cwd="/", capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr, "a named user may ask, and not read the site's files"


@pytest.mark.slow
def test_its_ray_answers_nobody_without_its_token(daemon: Daemon) -> None:
    """The planted bug: a Ray that anybody on the machine can have run code, as another user does not need to be."""
    (gcs,) = [one for one in daemon.family() if one.name().startswith("gcs_server")]
    port = next(one.laddr.port for one in gcs.net_connections("tcp") if one.status == psutil.CONN_LISTEN)
    code = (
        "import sys, ray\n"
        "try:\n"
        f"    ray.init(address='{_LOOPBACK}:{port}', log_to_driver=False, _node_ip_address='{_LOOPBACK}')\n"
        "    print('let in:', ray.get(ray.remote(lambda: 1).remote(), timeout=10))\n"
        "except BaseException as error:\n"
        "    print('refused:', type(error).__name__, error)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    wrong = {**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    tries = [
        subprocess.Popen([sys.executable, "-c", code], env=one, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for one in (clean, wrong)
    ]
    for one in tries:
        said = one.communicate(timeout=60)[0].decode(errors="replace")
        assert "let in" not in said
        assert "AuthenticationError" in said or "token" in said.lower(), said
    assert daemon.train(3).report.outcome is Outcome.OK


@pytest.mark.slow
def test_killed_and_started_again_it_takes_up_its_run(daemon: Daemon) -> None:
    """With -9: nothing that holds rows stays behind, and without joining anew it trains on, in the same ledger."""
    ledger = Ledger(daemon.file.state / "ledger.jsonl", "north")
    before = ledger.uses()
    first = daemon.train(4)
    agents = [one for one in daemon.family() if "Agent" in one.name()]
    family = daemon.end(signal.SIGKILL)
    with pytest.raises(SiteError, match=r"does not answer \(ConnectionRefusedError\)"):
        daemon.site.join(REQUEST)
    daemon.start()
    second = daemon.train(5, ledger_heads=(first.report.ledger_head,))
    assert second.report.outcome is Outcome.OK, daemon.said
    assert len(ledger.uses()) == len(before) + 2
    left = psutil.wait_procs(family, timeout=5)[1]
    assert set(left) <= set(agents), "of all that have seen rows, nothing is left"
    for one in left:  # two of Ray's that take a minute to see that it is gone
        with suppress(psutil.NoSuchProcess):
            one.kill()


def test_a_signal_ends_it_with_all_that_it_started(daemon: Daemon) -> None:
    """SIGTERM: no process, no socket, none of Ray's files; and it has said that it ended."""
    assert daemon.process is not None
    process = daemon.process
    folders = {Path(one) for one in _ray_folders(daemon)}
    assert folders
    assert not psutil.wait_procs(daemon.end(signal.SIGTERM), timeout=5)[1]
    assert process.returncode == 0
    assert not daemon.file.socket.exists()
    assert not any(folder.exists() for folder in folders)
    assert "site north: ended" in daemon.said
    assert "Traceback" not in daemon.said


def _ray_folders(daemon: Daemon) -> set[str]:
    """The temporary folders that Ray's processes were started with."""
    words = " ".join(" ".join(one.cmdline()) for one in daemon.family())
    marker = str(Path(tempfile.gettempdir()) / "fl-ray-")
    return {marker + part.split("/")[0].split()[0] for part in words.split(marker)[1:]}
