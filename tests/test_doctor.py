"""`fedlora doctor`: it has nothing against a sound installation, and finds each planted fault, with its cure."""

from __future__ import annotations

import email.utils
import os
import pwd
import shutil
import socket
import ssl
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from rich.console import Console

from clients.site_file import SiteFile
from deploy import checks, doctor, pki
from deploy.checks import Finding, Grade
from deploy.coordinator_file import CoordinatorFile
from deploy.doctor_coordinator import examine_coordinator
from deploy.doctor_site import LoadedAs, examine_site
from deploy.gateway import Gateway
from deploy.init import Setup, initialise
from fedlora.config import ModelConfig
from fedlora.models import load_base
from fedlora.tasks import TASKS as FEDLORA_TASKS
from tests.support.tiny import save_tiny_language_model

NOBODY = next((entry.pw_uid for entry in pwd.getpwall() if entry.pw_name == "nobody"), 65534)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """A federation of two sites on this machine, site a with data, its daemon and SuperNode one user."""
    folder = tmp_path / "federation"
    initialise(folder, Setup(("a", "b"), "127.0.0.1", port=free_port(), rows=10))
    site = folder / "sites/a"
    (site / "data.csv").write_text("text,label\n" + "good,pos\nbad,neg\n" * 5)
    edit(site / "site.toml", 'users = ["flower"]', "users = []")
    edit(site / "site.toml", "port = 9300", f"port = {free_port()}")
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def site_findings(federation: Path, *, load_models: bool = False, loaded_as: LoadedAs | None = None) -> list[Finding]:
    loaded = (loaded_as or LoadedAs()) if load_models else None
    return examine_site(SiteFile.read(federation / "sites/a/site.toml"), loaded_as=loaded)


def coordinator_findings(federation: Path) -> list[Finding]:
    return examine_coordinator(CoordinatorFile.read(federation / "coordinator/coordinator.toml"))


def of(findings: list[Finding], what: str) -> list[Finding]:
    """The findings about a thing that are not all right; each has a cure."""
    found = [one for one in findings if what in one.what and one.grade is not Grade.OK]
    assert all(one.cure for one in found)
    return found


def only(findings: list[Finding], what: str, grade: Grade, text: str) -> None:
    """One finding about a thing, and none about anything else that would stop the installation."""
    (finding,) = of(findings, what)
    assert finding.grade is grade
    assert text in finding.found
    failed = {one.what for one in findings if one.grade is Grade.FAILED}
    assert failed == ({finding.what} if grade is Grade.FAILED else set())


# -- the coordinator's gateway, as a site sees it ---------------------------------------------------------


@contextmanager
def gateway(certificate: Path, key: Path, port: int, ahead: float = 0.0) -> Iterator[None]:
    """A server with TLS whose clock is so many seconds ahead."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return email.utils.formatdate(time.time() + ahead, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("0.0.0.0", port), Handler)
    # The handshake in the thread of its connection: a client that refuses must not stop the others.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve(federation: Path, ahead: float = 0.0) -> AbstractContextManager[None]:
    file = CoordinatorFile.read(federation / "coordinator/coordinator.toml")
    return gateway(file.certificate, file.key, file.port, ahead)


def reissue(federation: Path, start: datetime, end: datetime) -> None:
    """Sign the server's certificate anew for another time."""
    old = pki.read_certificate(federation / "coordinator/tls/server.crt")
    key = serialization.load_pem_private_key((federation / "ca/ca.key").read_bytes(), None)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer).public_key(old.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(end)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    signed = builder.sign(key, hashes.SHA384())  # type: ignore[arg-type]
    (federation / "coordinator/tls/server.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))


def days(number: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=number)


def test_a_sound_installation(federation: Path) -> None:
    """Of a site with its coordinator, all is well but that both are one user, as its file says."""
    with serve(federation):
        findings = site_findings(federation)
    assert [one.what for one in findings if one.grade is not Grade.OK] == ["users"]
    said = {one.what: one.found for one in findings}
    assert said["data"] == "10 rows, 2 classes"
    assert "answers, with a certificate for this name by this federation's authority" in said["coordinator"]
    findings = coordinator_findings(federation)
    assert [one.what for one in findings if one.grade is not Grade.OK] == ["authority's key"]
    (federation / "ca/ca.key").rename(federation / "offline")
    assert {one.grade for one in coordinator_findings(federation)} == {Grade.OK}


def test_a_coordinator_that_does_not_run_is_a_warning(federation: Path) -> None:
    only(site_findings(federation), "coordinator", Grade.WARNING, "cannot be reached")


@pytest.mark.parametrize(
    ("start", "end", "grade", "text", "cure"),
    [
        (-400, -1, Grade.FAILED, "certificate has expired", "fedlora deploy renew"),
        (1, 400, Grade.FAILED, "certificate is not yet valid", "clock"),
        (-1, 20.5, Grade.WARNING, "valid for 20 days", "fedlora deploy renew"),
    ],
)
def test_a_certificate_out_of_its_time_is_found_on_both_sides(
    start: float, end: float, grade: Grade, text: str, cure: str, federation: Path
) -> None:
    reissue(federation, days(start), days(end))
    with serve(federation):
        (finding,) = [one for one in site_findings(federation) if one.grade is not Grade.OK and one.what != "users"]
    assert finding.grade is grade
    assert text in finding.found
    assert cure in finding.cure
    (finding,) = of(coordinator_findings(federation), "server's certificate")
    assert finding.grade is grade
    assert cure in finding.cure


def test_another_federations_authority(federation: Path, tmp_path: Path) -> None:
    initialise(tmp_path / "other", Setup(("a",), "127.0.0.1"))
    wrong = (tmp_path / "other/ca/ca.crt").read_bytes()
    (federation / "sites/a/tls/ca.crt").write_bytes(wrong)
    with serve(federation):
        only(site_findings(federation), "coordinator", Grade.FAILED, "is refused")
    (federation / "coordinator/tls/ca.crt").write_bytes(wrong)
    only(coordinator_findings(federation), "server's certificate", Grade.FAILED, "is not signed by")


def test_a_name_that_the_certificate_does_not_have(federation: Path) -> None:
    """127.0.0.2 is this machine, too, and not in the certificate."""
    edit(federation / "sites/a/site.toml", 'superlink = "127.0.0.1:', 'superlink = "127.0.0.2:')
    with serve(federation):
        findings = site_findings(federation)
    only(findings, "coordinator", Grade.FAILED, "IP address mismatch")
    assert "--also" in of(findings, "coordinator")[0].cure


@pytest.mark.parametrize(
    ("ahead", "grade", "text"),
    [
        (86400, Grade.FAILED, "behind the coordinator's: Flower refuses"),
        (-86400, Grade.FAILED, "ahead of the coordinator's: Flower refuses"),
        (-10, Grade.FAILED, "ahead of the coordinator's: Flower refuses"),
        (120, Grade.WARNING, "behind the coordinator's"),
    ],
)
def test_a_clock_that_is_off(ahead: float, grade: Grade, text: str, federation: Path) -> None:
    """Flower takes a SuperNode that is up to 5 seconds ahead, and up to 300 behind."""
    with serve(federation, ahead):
        only(site_findings(federation), "clock", grade, text)


def test_a_gateway_without_its_superlink(federation: Path) -> None:
    """The real gateway: certificate and clock are checked, and that Flower is not behind it."""
    gateway = Gateway(CoordinatorFile.read(federation / "coordinator/coordinator.toml"))
    gateway.start()
    try:
        findings = site_findings(federation)
    finally:
        gateway.stop()
    only(findings, "coordinator", Grade.WARNING, "its SuperLink is not there")
    said = {one.what: one.grade for one in findings}
    assert said["clock"] is said["its certificate"] is Grade.OK


def test_something_else_behind_the_coordinators_port(federation: Path) -> None:
    """A server that speaks no TLS: a warning with what happened, and no crash."""
    port = CoordinatorFile.read(federation / "coordinator/coordinator.toml").port
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(20)

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        only(site_findings(federation), "coordinator", Grade.WARNING, "cannot be reached")
        thread.join()


# -- keys, users and folders ------------------------------------------------------------------------------


def test_keys_that_others_can_read(federation: Path) -> None:
    (federation / "sites/a/keys/supernode").chmod(0o644)
    only(site_findings(federation), "SuperNode's key", Grade.FAILED, "has mode 0644: other users can get at it")
    (federation / "coordinator/tls/server.key").chmod(0o640)
    only(coordinator_findings(federation), "server's key", Grade.FAILED, "has mode 0640")


def test_a_state_folder_that_others_can_look_into(federation: Path) -> None:
    (federation / "sites/a/state").chmod(0o755)
    only(site_findings(federation), "state folder", Grade.FAILED, "has mode 0755: other users can look in")


def test_keys_that_are_gone_or_of_another_kind(federation: Path) -> None:
    key = federation / "sites/a/keys/supernode"
    key.write_bytes((federation / "coordinator/signing/adapter.key").read_bytes())
    only(site_findings(federation), "SuperNode's key", Grade.FAILED, "is no key that Flower takes")
    key.unlink()
    only(site_findings(federation), "SuperNode's key", Grade.FAILED, "No such file or directory")


def test_a_key_of_two_sites(federation: Path) -> None:
    keys = federation / "coordinator/keys"
    shutil.copy(keys / "a.pub", keys / "b.pub")
    only(coordinator_findings(federation), "key of site b", Grade.FAILED, "is also that of site a")
    (keys / "b.pub").write_text("ssh-ed25519 AAAA x")
    only(coordinator_findings(federation), "key of site b", Grade.FAILED, "cannot be used")


def test_a_key_of_another_certificate(federation: Path) -> None:
    tls = federation / "coordinator/tls"
    shutil.copy(federation / "ca/ca.key", tls / "server.key")
    only(coordinator_findings(federation), "server's certificate", Grade.FAILED, "server.key is not its key")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")
def test_a_key_that_its_user_does_not_own(federation: Path) -> None:
    edit(federation / "sites/a/site.toml", "users = []", f'users = ["{NOBODY}"]')
    only_key = of(site_findings(federation), "SuperNode's key")
    assert "belongs to root, not to nobody" in only_key[0].found
    os.chown(federation / "sites/a/keys/supernode", NOBODY, NOBODY)
    assert not of(site_findings(federation), "SuperNode's key")


def test_a_user_who_is_not_there(federation: Path) -> None:
    edit(federation / "sites/a/site.toml", "users = []", 'users = ["nobody-at-all"]')
    only(site_findings(federation), "users", Grade.FAILED, "there is no user 'nobody-at-all'")


@pytest.mark.skipif(os.getuid() == NOBODY, reason="needs another user")
def test_data_that_the_supernodes_user_can_read(federation: Path) -> None:
    """The wall has a hole: what the coordinator sends runs as that user."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # pytest's own folder lets nobody in
        folder = Path(name)
        folder.chmod(0o755)
        data = Path(shutil.copy(federation / "sites/a/data.csv", folder))
        data.chmod(0o644)
        file = federation / "sites/a/site.toml"
        edit(file, 'path = "data.csv"', f'path = "{data}"')
        edit(file, "users = []", f'users = ["{NOBODY}"]')
        (finding,) = of(site_findings(federation), "data wall")
        assert finding.grade is Grade.FAILED
        assert f"can read {data}, and so can what the coordinator sends" in finding.found
        data.chmod(0o600)
        assert not of(site_findings(federation), "data wall")
        data.chmod(0o644)
        folder.chmod(0o700)
        assert not of(site_findings(federation), "data wall"), "a folder on the way keeps it out"


def test_a_user_who_does_not_get_to_the_socket(federation: Path) -> None:
    edit(federation / "sites/a/site.toml", "users = []", f'users = ["{NOBODY}"]')
    (finding,) = of(site_findings(federation), "socket")
    assert "does not get into" in finding.found


def test_a_socket_path_that_linux_does_not_take(federation: Path) -> None:
    edit(federation / "sites/a/site.toml", 'socket = "run/site.sock"', f'socket = "run/{"x" * 100}.sock"')
    only(site_findings(federation), "socket", Grade.FAILED, "and Linux takes 107")


def test_a_file_in_the_sockets_place(federation: Path) -> None:
    (federation / "sites/a/run/site.sock").write_text("")
    only(site_findings(federation), "socket", Grade.FAILED, "is no socket")


# -- data, models, ports ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("planted", "grade", "text"),
    [
        (lambda site: (site / "data.csv").unlink(), Grade.FAILED, "no such file"),
        (lambda site: edit(site / "data.csv", "text,label", "texts,label"), Grade.FAILED, "'text'"),
        (lambda site: edit(site / "data.csv", "good,pos\nbad", "good,neutral\nbad"), Grade.FAILED, "'neutral'"),
        (lambda site: edit(site / "site.toml", "rows = 10", "rows = 1000"), Grade.WARNING, "[public] rows = 1000"),
    ],
)
def test_data_that_do_not_fit(planted: Callable[[Path], object], grade: Grade, text: str, federation: Path) -> None:
    planted(federation / "sites/a")
    only(site_findings(federation), "data", grade, text)


TASKS: dict[str, tuple[str, str, str]] = {
    "classification": ("text,label\ngood,pos\nbad,neg\n", "", "6 rows, 2 classes"),
    "multi-label": ("text,label\ngood,pos;neg\nbad,\n", 'label-separator = ";"', "6 rows, 2 labels"),
    "regression": ("text,label\ngood,1.5\nbad,-2\n", "", "6 rows with numbers"),
    "causal-lm": ("text,answer\ngood,1\nbad,2\n", "", "6 rows with answers"),
}


def rows_for(federation: Path, task: str, said: str | None = None) -> Path:
    """Give site a rows of a task; its file says this one, another, or with '' none."""
    rows, more, _ = TASKS[task]
    header, _, rest = rows.partition("\n")
    site = federation / "sites/a"
    (site / "data.csv").write_text(f"{header}\n{rest * 3}")
    name = task if said is None else said
    edit(site / "site.toml", 'task = "classification"', f'task = "{name}"\n{more}' if name else more)
    return site


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_read_for_their_task(task: str, federation: Path) -> None:
    rows_for(federation, task)
    findings = site_findings(federation)
    assert not of(findings, "data"), of(findings, "data")
    assert TASKS[task][2] in {one.found for one in findings}


@pytest.mark.parametrize("task", TASKS)
def test_rows_of_another_task_than_the_file_says(task: str, federation: Path) -> None:
    other = "regression" if task != "regression" else "classification"
    rows_for(federation, task, other)
    texts = {"causal-lm": "no such column", "regression": "numbers with decimals, such as 1.5"}
    only(site_findings(federation), "data", Grade.FAILED, texts.get(task, "have no finite number"))


@pytest.mark.parametrize("task", TASKS)
def test_a_file_that_does_not_say_its_task(task: str, federation: Path) -> None:
    """What was tried is said, and is a warning: it may not be what the rows are for."""
    site = rows_for(federation, task, "")
    only(site_findings(federation), "data", Grade.WARNING, f"{TASKS[task][2]}, read for {task}; site.toml does not say")
    (site / "data.csv").write_text("x,y\n1,2\n")
    only(site_findings(federation), "data", Grade.FAILED, "as multi-label: data.text-column = 'text': no such column")


def test_a_digest_is_that_of_the_task(federation: Path) -> None:
    """A language model's base has an output layer that a classifier's lacks."""
    save_tiny_language_model(federation / "sites/a/lm")
    edit(federation / "sites/a/site.toml", '"minilm" = "minilm"', '"tiny" = "lm"')
    digests = {}
    for task in ("regression", "causal-lm"):
        file = federation / "sites/a/site.toml"
        text = file.read_text()
        rows_for(federation, task)
        found = {one.what: one.found for one in site_findings(federation, load_models=True)}["model tiny"]
        loaded = load_base(
            ModelConfig(str(federation / "sites/a/lm")), FEDLORA_TASKS[task], 1, "auto", dtype=torch.float32,
            device=torch.device("cpu"),
        )  # fmt: skip
        assert found == f"digest {loaded.digest}"
        digests[task] = found
        file.write_text(text)
    assert digests["regression"] != digests["causal-lm"], "control"


def test_a_models_digest_is_what_a_run_compares(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a run of its dtype: bases of others have other digests, and so have quantised ones (test_quantised)."""
    digests = {}
    for loaded_as in (LoadedAs(), LoadedAs("bfloat16")):
        findings = site_findings(federation, load_models=True, loaded_as=loaded_as)
        (digest,) = [one.found for one in findings if one.what == "model minilm"]
        digests[loaded_as] = digest.removeprefix("digest ")
    assert [len(one) for one in set(digests.values())] == [64, 64]
    digest = digests[LoadedAs()]
    file = federation / "sites/a/site.toml"
    edit(file, "model-digests = []", f'model-digests = ["{digest}"]')
    assert not of(site_findings(federation, load_models=True), "model")
    coarse = LoadedAs("bfloat16")
    only(
        site_findings(federation, load_models=True, loaded_as=coarse), "model minilm", Grade.FAILED, "none of [limits]"
    )
    nf4 = LoadedAs(quantization="nf4")
    monkeypatch.setattr("fedlora.quantisation._PACKAGE", "not-installed")
    missing = site_findings(federation, load_models=True, loaded_as=nf4)
    only(missing, "model minilm", Grade.FAILED, "install it with: pip install 'fedlora[quantization]'")
    edit(file, digest, "0" * 64)
    only(site_findings(federation, load_models=True), "model minilm", Grade.FAILED, "none of [limits] model-digests")


def test_a_model_that_is_no_model(federation: Path) -> None:
    (federation / "sites/a/models").mkdir()
    edit(federation / "sites/a/site.toml", '"minilm" = "minilm"', '"minilm" = "models"')
    only(site_findings(federation), "model minilm", Grade.FAILED, "holds no config.json")
    only(site_findings(federation, load_models=True), "model minilm", Grade.FAILED, "cannot be loaded")


def test_a_port_of_somebody_else(federation: Path) -> None:
    port = CoordinatorFile.read(federation / "coordinator/coordinator.toml").port
    with socket.create_server(("127.0.0.1", port)):
        only(coordinator_findings(federation), f"port {port}", Grade.FAILED, "used by ")


@pytest.mark.parametrize(
    ("old", "new", "what", "text"),
    [
        ('sites = "a,b"', 'sites = "a,b,c"', "run", "site c of federation.sites has no key"),
        ("rounds = 3", "rounds = 0", "run", "rounds = 0"),
        ("rounds = 3", "round = 3", "run", "'round'"),
    ],
)
def test_a_run_that_cannot_work(old: str, new: str, what: str, text: str, federation: Path) -> None:
    edit(federation / "coordinator/run.toml", old, new)
    only(coordinator_findings(federation), what, Grade.FAILED, text)


def test_a_folder_that_was_moved(federation: Path) -> None:
    """Flower's connection file still names the certificate where it was."""
    moved = federation.parent / "moved"
    federation.rename(moved)
    only(coordinator_findings(moved), "Flower's connection", Grade.FAILED, "root-certificates")
    (moved / "coordinator/flwr/config.toml").unlink()
    only(coordinator_findings(moved), "Flower's connection", Grade.FAILED, "has no connection 'deployment'")


def test_versions_of_the_other_side() -> None:
    (own,) = checks.versions()
    assert own.grade is Grade.OK
    theirs = {"fedlora": "0.0.1", "torch": "1.0", "flwr": "1.0"}
    grades = {one.found.split()[0]: one.grade for one in checks.versions(theirs) if one.grade is not Grade.OK}
    assert grades == {"fedlora": Grade.FAILED, "flwr": Grade.FAILED, "torch": Grade.WARNING}


# -- the command ------------------------------------------------------------------------------------------


def run(path: Path) -> tuple[int, str]:
    parser, said = ArgumentParser(), StringIO()
    doctor.add_arguments(parser)
    code = doctor.run_doctor(parser.parse_args([str(path)]), Console(file=said, width=200))
    return code, said.getvalue()


def test_the_command_says_what_failed_and_how_to_cure_it(federation: Path) -> None:
    path = federation / "coordinator/coordinator.toml"
    code, said = run(path)
    assert code == 0, "a warning is no failure"
    assert "0 failed, 1 with a warning" in said
    (federation / "coordinator/tls/server.key").chmod(0o644)
    code, said = run(path)
    assert code == 1
    assert f"failed: server's key: chmod 600 {federation}/coordinator/tls/server.key" in said


def test_the_command_tells_a_site_from_a_coordinator(federation: Path) -> None:
    code, said = run(federation / "sites/a/site.toml")
    assert code == 0
    assert "state folder" in said
    with pytest.raises(ValueError, match="cannot be read from"):
        run(federation / "none.toml")
