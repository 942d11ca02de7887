"""The gateway between real sockets and real TLS: what passes, what does not, and how much of it is ever in memory."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from starlette.types import Receive, Scope, Send

from deploy import admission
from deploy import gateway as module
from deploy.admission import ALLOWED
from deploy.coordinator_file import CoordinatorFile
from deploy.gateway import Gateway
from deploy.pki import create_authority, create_server_certificate, create_supernode_key
from deploy.trust import authority

MIB = 2**20
PULL = "/v1/fleet/pull-messages"
PUSH = "/v1/fleet/push-object"
CONTENT = {"content-type": "application/protobuf"}


class Upstream:
    """Stands for the SuperLink: keeps what it was sent, answers with the length of the body, or streams one."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self.seen: list[tuple[str, str, dict[str, str], int]] = []
        self.taken = 0  # bytes of bodies, so far
        self.given = 0
        self.lost = 0  # requests whose sender went away
        self.hold = threading.Event()  # bodies are read while it is set
        self.hold.set()
        self.stream = 0  # bytes of the answer to pull-object
        self.status = 200
        self.cut = False  # answers end before their length
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Its connections inherit this; left to itself, a kernel lets such a buffer grow to what it likes.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        self.port = int(self._socket.getsockname()[1])
        options: dict[str, Any] = {"interface": "asgi3", "http": "h11", "ws": "none", "lifespan": "off"}
        options |= {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(self, ssl_certfile=certificate, ssl_keyfile=key, **options)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve(sockets=[self._socket])))
        self._thread.start()
        wait(lambda: self._server.started)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length, more = 0, True
        while more:
            while not self.hold.is_set():
                await asyncio.sleep(0.01)
            event = await receive()
            if event["type"] == "http.disconnect":
                self.lost += 1
                return
            length += len(event["body"])
            self.taken += len(event["body"])
            more = event["more_body"]
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.seen.append((scope["method"], scope["raw_path"].decode(), headers, length))
        answer = [(b"content-type", b"application/protobuf"), (b"flwr-note", b"yes"), (b"x-private", b"no")]
        await send({"type": "http.response.start", "status": self.status, "headers": answer})
        if scope["path"].endswith("pull-object"):
            while self.given < self.stream:
                self.given += MIB
                await send({"type": "http.response.body", "body": bytes(MIB), "more_body": True})
                if self.cut:
                    raise RuntimeError("planted: the answer ends here")
        await send({"type": "http.response.body", "body": str(length).encode()})

    def stop(self) -> None:
        self.hold.set()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def wait(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority, the server's certificate, a stranger's pair of both, and keys of sites and of a stranger."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("ca", "other"):
        create_authority(folder / f"{name}.key", folder / f"{name}.crt")
        authority, key = folder / f"{name}.crt", folder / f"{name}-server.key"
        create_server_certificate(
            key, folder / f"{name}-server.crt", authority_key=folder / f"{name}.key", authority=authority, names=[]
        )
    for name in ("a", "b", "stranger"):
        create_supernode_key(folder / name, name)
    return folder


@pytest.fixture
def upstream(files: Path) -> Iterator[Upstream]:
    server = Upstream(files / "ca-server.crt", files / "ca-server.key")
    yield server
    server.stop()


def coordinator(files: Path, link_port: int) -> CoordinatorFile:
    return CoordinatorFile(
        path=files / "coordinator.toml",
        host="127.0.0.1",
        port=0,
        link_port=link_port,
        ca=files / "ca.crt",
        certificate=files / "ca-server.crt",
        key=files / "ca-server.key",
        database=files / "unused",
        signing_key=files / "unused",
        flower_home=files / "unused",
        run=files / "unused",
        sites={"a": files / "a.pub", "b": files / "b.pub"},
    )


@pytest.fixture
def gateway(files: Path, upstream: Upstream) -> Iterator[Gateway]:
    server = Gateway(coordinator(files, upstream.port))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(files: Path, gateway: Gateway) -> Iterator[httpx.Client]:
    context = authority(files / "ca.crt")
    with httpx.Client(base_url=f"https://127.0.0.1:{gateway.port}", verify=context, trust_env=False) as client:
        yield client


def signed(files: Path, who: str = "a", *, age: float = 0.0, stamp: str = "", claims: str = "") -> dict[str, str]:
    """Return the headers of a SuperNode's request."""
    key = load_ssh_private_key((files / who).read_bytes(), None)
    claimed = load_ssh_private_key((files / (claims or who)).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(claimed, ec.EllipticCurvePrivateKey)
    stamp = stamp or (now() - timedelta(seconds=age)).isoformat()
    return {
        **CONTENT,
        "flwr-public-key": b64encode(public_key_to_bytes(claimed.public_key())).decode(),
        "flwr-timestamp": stamp,
        "flwr-signature": b64encode(sign_message(key, stamp.encode())).decode(),
    }


def head(request: str, headers: dict[str, str], length: int | None = 0) -> bytes:
    lines = [request, "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def connect(files: Path, gateway: Gateway) -> ssl.SSLSocket:
    plain = socket.create_connection(("127.0.0.1", gateway.port), timeout=10)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MIB)
    return authority(files / "ca.crt").wrap_socket(plain, server_hostname="localhost")


def raw(files: Path, gateway: Gateway, request: bytes) -> bytes:
    """Send bytes as they are, and return all that comes until the connection is closed."""
    with connect(files, gateway) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def cut_off(files: Path, gateway: Gateway, request: bytes) -> bool:
    """Return whether a connection is closed under a request."""
    try:
        return raw(files, gateway, request)[:12] in (b"", b"HTTP/1.1 400")
    except OSError:
        return True


def push_blindly(connection: ssl.SSLSocket, size: int) -> int:
    """Send until the other side takes no more for a second, or all is sent; return how much was."""
    connection.settimeout(1)
    sent, block = 0, bytes(65536)
    try:
        while sent < size:
            sent += connection.send(block)
    except TimeoutError:
        pass
    return sent


# -- what passes ----------------------------------------------------------------------------------------------


def test_the_calls_of_a_supernode_pass_and_no_more_headers_than_it_needs(
    files: Path, upstream: Upstream, client: httpx.Client
) -> None:
    for method, path in ALLOWED.values():
        headers = {
            **signed(files),
            "cookie": "x",
            "x-forwarded-for": "10.0.0.9",
            "authorization": "x",
            "flwr-more": "1",
        }
        answer = client.request(method, path, headers=headers, content=b"12345" if method == "POST" else None)
        assert answer.status_code == 200
        assert answer.text == ("5" if method == "POST" else "0")
        assert answer.headers["flwr-note"] == "yes"
        assert "x-private" not in answer.headers
        assert len(answer.headers.get_list("date")) == 1  # a site's doctor compares clocks by it
        _, seen, passed, _ = upstream.seen[-1]
        assert seen == path
        assert passed["flwr-more"] == "1"
        assert passed["host"] == f"127.0.0.1:{upstream.port}"
        assert not {"cookie", "x-forwarded-for", "authorization"} & set(passed)
    assert len(upstream.seen) == len(ALLOWED) == 12 - 1


def test_health_is_open_to_who_has_no_key(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200


def test_what_the_superlink_answers_arrives_as_it_is(files: Path, upstream: Upstream, client: httpx.Client) -> None:
    upstream.status = 412
    assert client.post(PULL, headers=signed(files), content=b"1").status_code == 412


# -- what does not --------------------------------------------------------------------------------------------

TARGETS = (
    *("/", "*", "/docs", "/openapi.json", "/v1", "/v1/fleet", "/v1/fleet/"),
    *("/v1/fleet/register-node", "/v1/fleet/unregister-node"),
    *("/v1/control/start-run", "/v1/control/register-node", "/v1/control/list-nodes", "/v1/control/stop-run"),
    *("/v1/runtime/acquire-task", "/v1/runtime/pull-messages", "/v1/runtime/push-object", "/v1/responses"),
    # towards what is open behind the gateway
    *("//v1/control/start-run", "/v1/fleet/../control/start-run", "/v1/fleet/pull-messages/../../control/start-run"),
    *("/v1/fleet/%2e%2e/control/start-run", "/v1/fleet/..%2fcontrol/start-run", "/v1/fleet%2f..%2fcontrol/start-run"),
    *("/v1/fleet/..%252fcontrol%252fstart-run", "/v1/fleet/..;/control/start-run", "/v1/fleet/..\\control\\start-run"),
    *("https://127.0.0.1/v1/control/start-run", "http://localhost/v1/fleet/pull-messages"),
    # and other spellings of what is allowed: only the one that Flower uses passes
    *("//v1/fleet/pull-messages", "/v1//fleet/pull-messages", "/v1/fleet/pull-messages/", "/v1/./fleet/pull-messages"),
    *(
        "/v1/fleet/%70ull-messages",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages;x",
    ),
    *(
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages%3f",
        "/v1/fleet/pull-messages%20",
        "/health/",
    ),
)


def test_other_paths_are_refused_even_if_signed(
    files: Path, upstream: Upstream, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    for target in TARGETS:
        caplog.clear()
        method = "GET" if target.startswith("/health") else "POST"
        answer = raw(files, gateway, head(f"{method} {target} HTTP/1.1", signed(files)))
        assert answer.startswith(b"HTTP/1.1 404"), (target, answer)
        assert "refused 127.0.0.1" in caplog.text, target
        assert ": 404, " in caplog.text, target
    assert upstream.seen == []


def test_other_methods_are_refused(files: Path, upstream: Upstream, gateway: Gateway) -> None:
    for method in ("GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE", "POST"):
        for target in {"GET": (PULL,), "POST": ("/health",)}.get(method, (PULL, "/health")):
            answer = raw(files, gateway, head(f"{method} {target} HTTP/1.1", signed(files)))
            assert answer.startswith(b"HTTP/1.1 404"), (method, target, answer)
    assert upstream.seen == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"who": "stranger"}, "not signed with the key"),
        ({"who": "stranger", "claims": "a"}, "signature is not site a's"),
        ({"who": "b", "claims": "a"}, "signature is not site a's"),
        ({"age": 86400.0}, "clock of site a is 86400 s behind"),
        ({"age": -86400.0}, "clock of site a is 86400 s ahead"),
        ({"stamp": "2026-01-01T00:00:00"}, "signature is not site a's"),
        ({"stamp": "yesterday"}, "signature is not site a's"),
    ],
)
def test_only_a_sites_signature_of_now_is_let_in(
    change: dict[str, Any],
    reason: str,
    files: Path,
    upstream: Upstream,
    client: httpx.Client,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answer = client.post(PULL, headers=signed(files, **change), content=b"secret")
    assert answer.status_code == 401
    assert reason in answer.json()["detail"]
    assert reason in caplog.text
    assert PULL in caplog.text
    assert "secret" not in caplog.text
    assert upstream.seen == []


@pytest.mark.parametrize("missing", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
def test_a_part_of_the_signature_is_none(missing: str, files: Path, upstream: Upstream, client: httpx.Client) -> None:
    for headers in (
        {k: v for k, v in signed(files).items() if k != missing},
        {**signed(files), missing: "é!".encode()},
    ):
        assert client.post(PULL, headers=headers, content=b"").status_code == 401  # type: ignore[arg-type]
    assert upstream.seen == []


def test_an_unknown_supernode_is_told_so_as_flower_does(files: Path, client: httpx.Client) -> None:
    answer = client.post("/v1/fleet/activate-node", headers=signed(files, "stranger"), content=b"")
    assert (answer.status_code, answer.json()["code"]) == (412, 2004)  # a SuperNode prints it before it ends


def test_two_values_of_a_header_are_refused(files: Path, upstream: Upstream, gateway: Gateway) -> None:
    """The gateway would look at one, and the SuperLink at the other."""
    other = signed(files, "b")["flwr-public-key"]
    request = head(f"POST {PULL} HTTP/1.1", {**signed(files), "FLWR-Public-Key": other})
    assert raw(files, gateway, request).startswith(b"HTTP/1.1 400")
    assert upstream.seen == []


# -- limits ---------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_or_of_unknown_length(
    files: Path, upstream: Upstream, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_BODY", MIB)
    assert client.post(PUSH, headers=signed(files), content=bytes(MIB)).text == str(MIB)
    answer = client.post(PUSH, headers=signed(files), content=bytes(MIB + 1))
    assert answer.status_code == 413
    assert "1048577 bytes: more than 1048576" in answer.json()["detail"]
    assert client.post(PUSH, headers=signed(files), content=iter([b"1", b"2"])).status_code == 411
    assert len(upstream.seen) == 1


def test_the_answer_arrives_while_a_refused_body_is_on_its_way(files: Path, client: httpx.Client) -> None:
    for _ in range(5):
        assert client.post("/v1/control/start-run", content=bytes(8 * MIB)).status_code == 404


def test_a_request_within_a_request_stays_a_body(files: Path, upstream: Upstream, gateway: Gateway) -> None:
    inner = head("POST /v1/control/start-run HTTP/1.1", CONTENT)
    both = {**signed(files), "Transfer-Encoding": "chunked"}
    answer = raw(files, gateway, head(f"POST {PUSH} HTTP/1.1", both, 4) + b"0\r\n\r\n" + inner)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 411"))
    assert b"200 OK" not in answer
    answer = raw(files, gateway, head(f"POST {PUSH} HTTP/1.1", signed(files), len(inner)) + inner + inner)
    assert answer.count(b"HTTP/1.1 200") == 1  # the first is a body, the second a request of its own
    assert answer.count(b"HTTP/1.1 404") == 1
    assert [(path, length) for _, path, _, length in upstream.seen] == [(PUSH, len(inner))]
    for wrong in ("Content-Length: +5", "Content-Length: 5\r\nContent-Length: 6", "Content-Length : 5"):
        request = head(f"POST {PUSH} HTTP/1.1", signed(files), None)[:-2] + f"{wrong}\r\n\r\n12345".encode()
        assert raw(files, gateway, request).startswith(b"HTTP/1.1 400")
    assert len(upstream.seen) == 1


def test_long_heads_are_refused(files: Path, upstream: Upstream, gateway: Gateway) -> None:
    request = head(f"POST {PULL} HTTP/1.1", {**signed(files), "flwr-more": "x" * 20_000})
    assert raw(files, gateway, request).startswith(b"HTTP/1.1 431")
    assert cut_off(files, gateway, head(f"POST {PULL} HTTP/1.1", {"flwr-more": "x" * MIB})[:-4])  # without an end
    assert upstream.seen == []


def test_connections_of_one_address_are_bounded(
    files: Path,
    gateway: Gateway,
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS_OF_ADDRESS", 3)
    held = [connect(files, gateway) for _ in range(3)]
    answer = client.post(PULL, headers=signed(files), content=b"")
    assert answer.status_code == 503  # a SuperNode tries again after it, and would end after 429
    assert "refused 127.0.0.1" in caplog.text
    held.pop().close()

    def free() -> bool:
        return client.post(PULL, headers=signed(files), content=b"").status_code == 200

    wait(free)
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 3)
    assert cut_off(files, gateway, head(f"POST {PULL} HTTP/1.1", signed(files)))
    for one in held:
        one.close()


def test_a_head_and_a_body_that_do_not_come(files: Path, upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_S", 0.5)
    monkeypatch.setattr(module, "STALL_S", 0.5)
    server = Gateway(coordinator(files, upstream.port))
    server.start()
    try:
        with connect(files, server) as silent, connect(files, server) as slow, connect(files, server) as second:
            second.sendall(head("GET /health HTTP/1.1", {}))
            assert second.recv(4096).startswith(b"HTTP/1.1 200")
            started = time.monotonic()
            open_ = {silent, slow, second}
            while open_ and time.monotonic() < started + 5:
                for one in [*open_ - {silent}]:
                    try:
                        one.sendall(b"P")  # a byte from time to time does not help
                    except OSError:
                        open_.discard(one)
                silent.settimeout(0.05)
                try:
                    if silent in open_ and silent.recv(1) == b"":
                        open_.discard(silent)
                except TimeoutError:
                    continue
                except OSError:
                    open_.discard(silent)
            assert not open_
        with connect(files, server) as stalled:
            stalled.sendall(head(f"POST {PUSH} HTTP/1.1", signed(files), 1000) + b"abc")
            assert stalled.recv(4096).startswith(b"HTTP/1.1 408")
        wait(lambda: upstream.lost == 1)
    finally:
        server.stop()
    assert [path for _, path, _, _ in upstream.seen] == ["/health"]


def test_a_sender_is_held_back_while_the_superlink_does_not_read(
    files: Path, upstream: Upstream, gateway: Gateway, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.hold.clear()
    buffers = sum(int(Path(f"/proc/sys/net/ipv4/tcp_{way}mem").read_text().split()[2]) for way in "rw")
    size = buffers + 32 * MIB
    monkeypatch.setattr(admission, "MAX_BODY", size)
    with connect(files, gateway) as connection:
        connection.sendall(head(f"POST {PUSH} HTTP/1.1", signed(files), size))
        # As much as the kernel may let the gateway's two sockets hold, which it decides as it goes; ours hold little.
        assert push_blindly(connection, size) < buffers + 16 * MIB
        upstream.hold.set()
    wait(lambda: upstream.lost == 1)  # it went away within its body: so does the request to the SuperLink
    assert upstream.seen == []
    assert client.post(PUSH, headers=signed(files), content=bytes(size), timeout=60).text == str(size)


def test_the_superlink_is_held_back_while_a_site_does_not_read(
    files: Path, upstream: Upstream, client: httpx.Client
) -> None:
    upstream.stream = 128 * MIB
    path = "/v1/fleet/pull-object"
    with client.stream("POST", path, headers=signed(files), content=b"x", timeout=60) as answer:
        before = -1
        while before != upstream.given:
            before = upstream.given
            time.sleep(0.5)
        assert 0 < upstream.given < 32 * MIB
        total = sum(len(part) for part in answer.iter_raw())
    assert total == 128 * MIB + 1


# -- the way to the SuperLink, and TLS ------------------------------------------------------------------------


def test_a_superlink_that_is_away_can_come_back(
    files: Path, gateway: Gateway, client: httpx.Client, upstream: Upstream
) -> None:
    port = upstream.port
    upstream.stop()
    answer = client.post(PULL, headers=signed(files), content=b"")
    assert answer.status_code == 502  # a SuperNode tries again
    assert "cannot be reached" in answer.json()["detail"]
    assert str(port) not in answer.text


def test_another_server_in_the_superlinks_place_gets_nothing(files: Path) -> None:
    impostor = Upstream(files / "other-server.crt", files / "other-server.key")
    server = Gateway(coordinator(files, impostor.port))
    server.start()
    try:
        answer = raw(files, server, head(f"POST {PULL} HTTP/1.1", {**signed(files), "connection": "close"}))
        assert answer.startswith(b"HTTP/1.1 502")
        assert impostor.seen == []
    finally:
        server.stop()
        impostor.stop()


def test_an_answer_that_breaks_off_does_not_look_whole(files: Path, upstream: Upstream, client: httpx.Client) -> None:
    upstream.stream, upstream.cut = 10 * MIB, True
    with pytest.raises(httpx.RemoteProtocolError):
        client.post("/v1/fleet/pull-object", headers=signed(files), content=b"")
    assert client.get("/health").status_code == 200


def test_tls_is_verified_and_not_old(files: Path, gateway: Gateway) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{gateway.port}/health", verify=authority(files / "other.crt"))
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{gateway.port}/health")
    context = authority(files / "ca.crt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as plain:
        context.wrap_socket(plain, server_hostname="localhost")


def test_one_clear_error_for_what_cannot_be_served(files: Path, upstream: Upstream, tmp_path: Path) -> None:
    file = coordinator(files, 1)
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    for change, word in (
        ({"port": upstream.port}, f"port = {upstream.port}: the gateway cannot listen"),
        ({"certificate": rubbish}, "certificate = "),
        ({"key": files / "other-server.key"}, "do not fit"),
        ({"ca": rubbish}, "ca = "),
        ({"sites": {"a": rubbish}}, r"\[sites\] a = "),
        ({"sites": {"a": files / "missing"}}, r"\[sites\] a = "),
        ({"sites": {"a": files / "a.pub", "c": files / "a.pub"}}, r"\[sites\] c = .*is the key of site a, too"),
    ):
        with pytest.raises(ValueError, match=word):
            Gateway(replace(file, **change))


def test_refusals_are_json_and_their_log_is_one_line(
    files: Path, gateway: Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = raw(files, gateway, head("POST /x%0aforged%1b[2J HTTP/1.1", {}))
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"]
    lines = [record.getMessage() for record in caplog.records if record.name == "deploy.gateway"]
    assert len(lines) == 1
    assert "\n" not in lines[0]
