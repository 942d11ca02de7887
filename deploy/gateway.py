"""The gateway: all of a coordinator that sites can reach, a TLS proxy in front of Flower's SuperLink.

A SuperLink serves everything on one port: what SuperNodes need, but also registration and the start of runs, which are
open to whoever reaches it. It listens on loopback only; the gateway passes on the few requests of a SuperNode, and
those only that are signed with the key of a site in the coordinator's file. Everything else is refused before anything
of its body is passed on. Bodies are streamed both ways, never kept.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, suppress
from typing import Any, final

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.admission import ACTIVATE, HEALTH, MAX_HEAD, NotPassedError, checked, site_of
from deploy.coordinator_file import CoordinatorFile
from deploy.trust import authority, keys_of, server_tls

_logger = logging.getLogger(__name__)

VERSIONS = "fedlora-versions"
"""Header of the answer to :data:`HEALTH`: what the coordinator runs, for a site's doctor to compare."""

_VERSIONS = f"fedlora={importlib.metadata.version('fedlora')} flwr={importlib.metadata.version('flwr')}"
MAX_CONNECTIONS = 1024
"""From all addresses; more are cut without an answer."""

MAX_CONNECTIONS_OF_ADDRESS = 64
"""A SuperNode has up to five; several sites may share an address."""

HEAD_S = 20.0
"""Seconds from a request's first byte to the end of its head, and from a connection's start to its first request's."""

STALL_S = 60.0
"""Seconds without a byte of a body."""

_KEEP_ALIVE_S = 75  # longer than a SuperNode's, so that the gateway never closes under a request
_LINK_KEEP_ALIVE_S = 2  # shorter than the SuperLink's, for the same reason
_LINGER_S = 2.0  # for reading on after a refusal, so that it arrives
_GRACE_S = 5
_HEADERS = ("content-type", "content-length", "accept")
_PREFIX = "flwr-"


@final
class Gateway:
    """The gateway of a coordinator, served in a thread.

    Args:
        file: The coordinator's file.

    Raises:
        ValueError: A certificate or key cannot be read, or nothing can listen on the address.
    """

    def __init__(self, file: CoordinatorFile) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"https://127.0.0.1:{file.link_port}",
            verify=authority(file.ca),
            headers={"accept-encoding": "identity"},
            timeout=httpx.Timeout(STALL_S, connect=5),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_LINK_KEEP_ALIVE_S),
            trust_env=False,
        )
        tls = server_tls(file.certificate, file.key)
        config = uvicorn.Config(
            _Proxy(keys_of(file.sites), self._client),
            interface="asgi3",
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # a sender's word for its address is nothing
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
            h11_max_incomplete_event_size=MAX_HEAD,
            ssl_context_factory=lambda _config, _default: tls,
        )
        self._server = uvicorn.Server(config)
        self._socket = _listen(file.host, file.port)
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="gateway")

    def start(self) -> None:
        """Start to serve, and return when it does.

        Raises:
            RuntimeError: It does not.
        """
        self._thread.start()
        while not self._server.started:
            if not self.running:
                raise RuntimeError("the gateway does not start; its log says why")
            time.sleep(0.02)

    @property
    def running(self) -> bool:
        """Whether it serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Let requests end, but not for long, and stop; it need not have been started."""
        self._server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

    async def _serve(self) -> None:
        async with self._client:
            await self._server.serve(sockets=[self._socket])


@final
class _Proxy:
    """The ASGI application."""

    def __init__(self, keys: Mapping[bytes, tuple[str, ec.EllipticCurvePublicKey]], client: httpx.AsyncClient) -> None:
        self.connections: Counter[str] = Counter()
        self._keys = keys
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        who = scope["client"][0] if scope["client"] else "unknown"
        answer = _Answer(send)
        try:
            method, path, headers = checked(scope)
            if path != HEALTH:
                who = f"{who} (site {site_of(self._keys, path, headers)})"
            content = _body(receive) if method == "POST" else None
            request = self._client.build_request(method, path, headers=_passed(headers), content=content)
            response = await self._client.send(request, stream=True)
            async with aclosing(response):
                own = {VERSIONS: _VERSIONS} if path == HEALTH else {}
                await answer.start(response.status_code, _passed(response.headers) | own)
                async for part in response.aiter_raw():
                    await answer.write(part)
            if response.is_error:
                _log_answer(who, path, response.status_code)
            await answer.write(b"", last=True)
        except (httpx.HTTPError, NotPassedError) as error:
            refused = error if isinstance(error, NotPassedError) else _unreachable(error)
            _log_refusal(who, scope, refused)
            if not answer.started:  # else the server closes the connection, as the answer is not whole
                await answer.refuse(refused, receive)


@final
class _Answer:
    """The answer to a request."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def write(self, part: bytes, *, last: bool = False) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await self._send({"type": "http.response.body", "body": part, "more_body": not last})
        except TimeoutError:
            raise NotPassedError(408, f"took nothing of its answer for {STALL_S:.0f} s") from None

    async def refuse(self, refused: NotPassedError, receive: Receive) -> None:
        content: dict[str, Any] = {"detail": refused.why} | ({"code": refused.code} if refused.code else {})
        text = json.dumps(content).encode()
        headers = {"content-type": "application/json", "content-length": str(len(text)), "connection": "close"}
        await self.start(refused.status, headers)
        await self.write(text)
        with suppress(TimeoutError):  # closing at once would take the answer from who is still sending
            async with asyncio.timeout(_LINGER_S):
                while (await receive()).get("more_body"):
                    continue
        await self.write(b"", last=True)


@final
class _Connection(H11Protocol):
    """A connection: counted by its address, and with a time limit for the heads of its requests."""

    _deadline: asyncio.TimerHandle | None = None
    _address: str = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        held = self._held
        held[self._address] += 1
        self._deadline = self.loop.call_later(HEAD_S, transport.abort)
        if held.total() > MAX_CONNECTIONS:
            _logger.warning("%s: cut off: more than %d connections", self._address, MAX_CONNECTIONS)
            transport.abort()
        elif held[self._address] > MAX_CONNECTIONS_OF_ADDRESS:
            self.app = _too_many

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._clear()
        self._held[self._address] -= 1
        if not self._held[self._address]:
            del self._held[self._address]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._clear()  # a request is under way, and has limits of its own
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.transport.abort)

    @property
    def _held(self) -> Counter[str]:
        proxy = self.config.app
        assert isinstance(proxy, _Proxy)
        return proxy.connections

    def _clear(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer on a connection that is one too many for its address; a SuperNode tries again after a while."""
    refused = NotPassedError(503, f"more than {MAX_CONNECTIONS_OF_ADDRESS} connections from one address")
    _log_refusal(scope["client"][0], scope, refused)
    await _Answer(send).refuse(refused, receive)


# -- requests -------------------------------------------------------------------------------------------------


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    """Yield the body of a request as it comes; the sender is held back while nobody takes it."""
    more = True
    while more:
        try:
            async with asyncio.timeout(STALL_S):
                event = await receive()
        except TimeoutError:
            raise NotPassedError(408, f"sent nothing of its body for {STALL_S:.0f} s") from None
        if event["type"] != "http.request":
            raise NotPassedError(400, "went away within its body")
        more = event["more_body"]
        yield event["body"]


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers that are passed on; the date of an answer is the gateway's own."""
    return {name: value for name, value in headers.items() if name in _HEADERS or name.startswith(_PREFIX)}


def _unreachable(error: httpx.HTTPError) -> NotPassedError:
    kind = type(error).__name__
    if isinstance(error, httpx.TimeoutException):
        return NotPassedError(504, f"the SuperLink does not answer ({kind})")
    return NotPassedError(502, f"the SuperLink cannot be reached ({kind})")


def _log_refusal(who: str, scope: Scope, refused: NotPassedError) -> None:
    target = scope["raw_path"][:200].decode("latin-1")
    _logger.warning("refused %s: %s %r: %d, %s", who, scope["method"], target, refused.status, refused.why)


def _log_answer(who: str, path: str, status: int) -> None:
    hint = ""
    if path == ACTIVATE:
        hint = "; is its key in use by another SuperNode, or was its SuperNode killed less than a minute ago?"
    level = logging.INFO if status == 403 else logging.WARNING  # 403: of a run that has ended
    _logger.log(level, "the SuperLink refused %s: %s: %d%s", who, path, status, hint)


# -- the socket -----------------------------------------------------------------------------------------------


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ValueError(
            f"host = {host!r}, port = {port}: the gateway cannot listen there ({error.strerror}); is it running, or "
            "is the port another's?"
        ) from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # its connections have it: else 40 ms an answer
    return listener
