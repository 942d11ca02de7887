"""Frames between a site's daemon and the ClientApp: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import json
import pickle
import re
import socket
import struct
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from clients.errors import SiteError
from clients.protocol import VERSION, Frame, receive, send
from clients.socket_site import SocketSite
from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.headers import instruction_header, read_instruction_header, read_reports_header, reports_header
from fedlora.joining import JoinReport, JoinRequest
from tests.test_wire import INSTRUCTION, json_values, tensors

MIB = 1 << 20


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    for end in (here, there):
        end.settimeout(5.0)
    with here, there:
        yield here, there


def passed(frame: Frame, max_bytes: int = 1 << 30) -> Frame:
    """Send a frame through a socket, from another thread: a buffer of the kernel's is small."""
    here, there = socket.socketpair()
    with here, there:
        sender = threading.Thread(target=send, args=(here, frame))
        sender.start()
        back = receive(there, max_bytes)
        sender.join()
        here.close()
        assert not there.recv(1), "not a byte is left over"
    return back


def raw(header: Any, *, length: int | None = None, magic: bytes = b"FLSD", version: int = VERSION) -> bytes:
    """The bytes of a frame as somebody else may have written them, up to its tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack(">4sHI", magic, version, len(text) if length is None else length) + text


def with_tensors(*entries: Any) -> bytes:
    return raw({"kind": "train", "header": {}, "tensors": {"tensors": list(entries)}})


# -- what goes in comes out -------------------------------------------------------------------------------


@given(st.dictionaries(st.text(max_size=12), tensors, max_size=3), st.text(max_size=8))
def test_round_trip(groups: dict[str, Any], kind: str) -> None:
    """Any groups of any tensors, 0-d and empty ones among them: names, order, dtypes, shapes and bytes."""
    back = passed(Frame(kind, {"a": [1, "x", True, None, 0.5]}, groups))
    assert (back.kind, back.header) == (kind, {"a": [1, "x", True, None, 0.5]})
    assert list(back.tensors) == list(groups)
    for group, values in groups.items():
        assert list(back.tensors[group]) == list(values)
        for name, value in values.items():
            there = back.tensors[group][name]
            assert (there.dtype, there.shape, there.tobytes()) == (value.dtype, value.shape, value.tobytes())
            assert there.flags.writeable


def test_tensors_larger_than_a_buffer_and_in_another_order() -> None:
    """Several chunks, a transposed view, a big-endian array: the numbers arrive, not the bytes as they lay."""
    large = np.arange(3 * MIB // 8 + 5, dtype=np.float64)
    sent: dict[str, NDArray[np.floating]] = {
        "large": large,
        "view": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "part": large[::7],
        "scalar": np.array(2.5, dtype=np.float32),
        "none": np.zeros((0, 4), dtype=np.float32),
    }
    back = passed(Frame("update", {}, {"tensors": sent})).tensors["tensors"]
    for name, value in sent.items():
        assert back[name].shape == value.shape
        assert np.array_equal(back[name], value), name


def test_every_kind_of_message_keeps_its_fields() -> None:
    """What the daemon and the ClientApp say to each other, through a socket and back."""
    request = JoinRequest("north", 1, 3, {"seed": 3, "method.name": "lora", "run.name": "r"})
    assert JoinRequest.read(passed(Frame("join", request.header())).reader()) == request
    report = JoinReport("north", "why", 1, "0.1", "f", 7, "d", "i", "c", "cpu", 2, 3)
    assert JoinReport.read(passed(Frame("joined", report.header())).reader()) == report
    groups = {"tensors": INSTRUCTION.tensors, "extra": INSTRUCTION.extra}
    frame = passed(Frame("train", instruction_header(INSTRUCTION), groups))
    back = read_instruction_header(frame.reader(), frame.tensors["tensors"], frame.tensors["extra"])
    assert instruction_header(back) == instruction_header(INSTRUCTION)
    said = ClientReport(4, Outcome.BUDGET_SPENT, "spent", 5, 2, ledger_head="h")
    assert read_reports_header(passed(Frame("report", reports_header([said]))).reader()) == [said]
    assert passed(Frame("end")) == Frame("end")


def test_frames_follow_each_other(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    for number in range(3):
        send(here, Frame("update", {"n": number}, {"tensors": {"x": np.full(2, number, np.float32)}}))
    for number in range(3):
        frame = receive(there, 8)
        assert frame.header == {"n": number}
        assert frame.tensors["tensors"]["x"].tolist() == [number, number]


# -- what is no frame -------------------------------------------------------------------------------------

NOT_ONE = "a header is not one of a frame"
FRAMES: Mapping[str, tuple[bytes, str]] = {
    "magic": (raw({}, magic=b"HTTP"), "this is not a fedlora site, or not a client of one"),
    "another protocol": (b"GET / HTTP/1.1\r\n\r\n", "this is not a fedlora site"),
    "pickled": (pickle.dumps({"kind": "train"}) * 2, "this is not a fedlora site"),
    "pickled header": (raw(pickle.dumps({"kind": "train", "header": {}, "tensors": {}})), "a header cannot be read"),
    "version": (
        raw({}, version=VERSION + 1),
        rf"speaks version {VERSION + 1} of the site's protocol, this one {VERSION}; install the same fedlora",
    ),
    "length": (raw(b"", length=2**32 - 1), "a header of 4294967295 bytes is too large"),
    "not text": (raw(b"\xff\xfe\xff"), "a header cannot be read"),
    "not json": (raw(b"{'kind': 'train'}"), "a header cannot be read"),
    "empty": (raw(b""), "a header cannot be read"),
    "deep": (raw(b"[" * 100_000), "a header cannot be read"),
    "digits": (raw(b"1" * 10_000), "a header cannot be read"),
    "list": (raw([1]), NOT_ONE),
    "number": (raw(1), NOT_ONE),
    "no kind": (raw({"header": {}, "tensors": {}}), NOT_ONE),
    "kind": (raw({"kind": 1, "header": {}, "tensors": {}}), NOT_ONE),
    "header": (raw({"kind": "train", "header": [], "tensors": {}}), NOT_ONE),
    "groups": (raw({"kind": "train", "header": {}, "tensors": []}), NOT_ONE),
    "group": (raw({"kind": "train", "header": {}, "tensors": {"tensors": {}}}), "a group of tensors is not a list"),
    "entry": (with_tensors({"name": "x"}), "not .name, dtype, shape."),
    "pickled dtype": (with_tensors(["x", "object", [1]]), "x has dtype 'object', not one of float32, float64"),
    "negative": (with_tensors(["x", "float32", [-1]]), "not .name, dtype, shape."),
    "two negatives": (with_tensors(["x", "float32", [-(2**20), -(2**20)]]), "not .name, dtype, shape."),
    "huge": (with_tensors(["x", "float32", [2**40]]), "not .name, dtype, shape."),
    "huge beside zero": (with_tensors(["x", "float32", [0, 2**62, 2**62]]), "not .name, dtype, shape."),
    "no number": (with_tensors(["x", "float32", [1.0]]), "not .name, dtype, shape."),
    "a truth": (with_tensors(["x", "float32", [True]]), "not .name, dtype, shape."),
    "dimensions": (with_tensors(["x", "float32", [1] * 40]), "not .name, dtype, shape."),
    "twice": (with_tensors(["x", "float32", [0]], ["x", "float32", [0]]), "x is there twice"),
    "too large": (with_tensors(["x", "float64", [513]]), "4104 bytes of tensors are more than the 4096 that are taken"),
    "large together": (with_tensors(*(["x", "float32", [342]] for _ in range(3))), "4104 bytes of tensors are more"),
    "many": (with_tensors(*(["", "float32", [0]] for _ in range(70_000))), "70000 tensors are too many"),
    "a million": (with_tensors(*(["", "float32", [0]] for _ in range(10**6))), "a header of .* bytes is too large"),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_what_is_no_frame_is_refused(kind: str) -> None:
    """At once and by our own error, though nothing follows and the other end stays open."""
    data, message = FRAMES[kind]
    here, there = socket.socketpair()
    with here, there:
        there.settimeout(5.0)  # a reader that waited for more would fail by a timeout
        sender = threading.Thread(target=_written, args=(here, data))
        sender.start()
        with pytest.raises(WireError, match=message):
            receive(there, 4096)
        there.close()
        sender.join()


def _written(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except BrokenPipeError:
        return  # refused before all of it was read


@given(st.one_of(st.binary(max_size=96), json_values.map(raw), st.binary(max_size=96).map(raw)))
def test_garbage_is_refused_with_our_own_error(data: bytes) -> None:
    """Any bytes at all: a frame, a WireError, or that the other end stopped; never a traceback from deep inside."""
    here, there = socket.socketpair()
    with here, there:
        here.sendall(data)
        here.close()
        try:
            receive(there, 1 << 16)
        except (WireError, ConnectionResetError):
            return


@given(
    st.lists(st.tuples(st.text(max_size=2), st.sampled_from(["float32", "int8"]), st.lists(st.integers(-2, 3)))),
    st.binary(max_size=64),
)
def test_any_list_of_tensors_takes_what_it_announces_or_nothing(entries: list[Any], data: bytes) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall(with_tensors(*entries) + data)
        here.close()
        try:
            frame = receive(there, 1 << 16)
        except (WireError, ConnectionResetError):
            return
        left = len(there.recv(1 << 16))
    assert sum(value.nbytes for value in frame.tensors["tensors"].values()) == len(data) - left


def test_nothing_of_tensors_that_are_too_large_is_read_or_allocated(pair: tuple[socket.socket, socket.socket]) -> None:
    """Five gigabytes announced: refused by the header alone, and their first bytes are still in the socket."""
    here, there = pair
    here.sendall(with_tensors(["small", "float32", [2]], ["x", "float64", [5 << 27]]) + b"first bytes")
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=rf"{(5 << 30) + 8} bytes of tensors are more than the {1 << 32}"):
            receive(there, 1 << 32)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    assert there.recv(64) == b"first bytes"


@pytest.mark.parametrize("cut", [0, 5, 10, 40, -1])
def test_a_peer_that_stops_in_the_middle(cut: int, pair: tuple[socket.socket, socket.socket]) -> None:
    """Closed: said so. Silent: the connection's own timeout ends it."""
    here, there = pair
    data = with_tensors(["x", "float32", [4]]) + bytes(16)
    here.sendall(data[:cut])
    there.settimeout(0.1)
    with pytest.raises(TimeoutError):
        receive(there, 64)
    again, other = socket.socketpair()
    with again, other:
        again.sendall(data[:cut])
        again.close()
        with pytest.raises(ConnectionResetError, match="in the middle of a frame"):
            receive(other, 64)


def test_pickled_bytes_are_never_loaded(tmp_path: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    """The planted bug: a reader that unpickles would run what it was sent."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    payload = pickle.dumps(Bomb())
    here, there = pair
    for data in (payload * 2, raw(payload)):
        with pytest.raises(WireError):
            _received(here, there, data)
    size = len(payload) // 4 * 4
    frame = _received(here, there, with_tensors(["x", "float32", [size // 4]]) + payload[:size])
    assert frame.tensors["tensors"]["x"].tobytes() == payload[:size]
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists(), "the payload would have run"


def _received(here: socket.socket, there: socket.socket, data: bytes) -> Frame:
    here.sendall(data)
    try:
        return receive(there, 4096)
    finally:
        there.setblocking(False)
        with suppress(BlockingIOError):
            there.recv(1 << 16)  # what a refused frame left
        there.settimeout(5.0)


def test_a_header_that_could_not_be_read_is_not_sent(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    with pytest.raises(WireError, match=r"a header of .* bytes is too large"):
        send(here, Frame("report", {"reason": "x" * (1 << 24)}))
    there.setblocking(False)
    with pytest.raises(BlockingIOError):
        there.recv(1)


# -- the ClientApp's end ----------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[[bytes], SocketSite]]:
    """A socket that answers the next question with these bytes, whatever it is, and closes."""
    path = tmp_path / "s"
    threads: list[threading.Thread] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer(data: bytes) -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(5.0)
                with suppress(WireError):  # too much for this daemon: it says so without reading on
                    receive(connection, 1 << 12)
                connection.sendall(data)

        def start(data: bytes) -> SocketSite:
            threads.append(threading.Thread(target=answer, args=(data,)))
            threads[-1].start()
            return SocketSite(path)

        yield start
        for thread in threads:
            thread.join(5.0)


def frames(*parts: Frame) -> bytes:
    here, there = socket.socketpair()
    with here, there:
        for part in parts:
            send(here, part)
        here.close()
        return there.recv(1 << 16)


PLAIN = Instruction(1, (4,), {}, {})
UPDATE = Frame("update", reports_header([ClientReport(4, steps=2)]), {"tensors": {"x": np.ones(2)}, "extra": {}})


def test_an_update_of_the_daemons_comes_through(daemon: Callable[[bytes], SocketSite]) -> None:
    (update,) = daemon(frames(UPDATE, Frame("end"))).train(PLAIN)
    assert update.report == ClientReport(4, steps=2)
    assert update.tensors["x"].tolist() == [1.0, 1.0]
    report = Frame("report", reports_header([ClientReport(4, examples=3)]))
    assert list(daemon(frames(report, Frame("end"))).evaluate(PLAIN)) == [ClientReport(4, examples=3)]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (frames(Frame("error", {"reason": "the site cannot read the message"})), "the site cannot read the message"),
        (b"", r"the site's daemon does not answer \(ConnectionResetError\); its own log says why"),
        (frames(UPDATE)[:-8], r"does not answer \(ConnectionResetError\)"),
        (
            raw({}, version=VERSION + 1),
            rf"daemon cannot be understood: .* version {VERSION + 1} of the site's protocol, this one {VERSION}",
        ),
        (b"HTTP/1.1 400 Bad Request", r"not a fedlora site"),
    ],
)
def test_a_daemon_that_does_not_answer_is_one_failed_client_with_a_reason(
    answer: bytes, reason: str, daemon: Callable[[bytes], SocketSite]
) -> None:
    """And no error of the ClientApp's, whose text Flower would send in place of a reason."""
    for said in (
        [update.report for update in daemon(answer).train(PLAIN)],
        list(daemon(answer).evaluate(PLAIN)),
    ):
        (report,) = said
        assert (report.client, report.outcome) == (4, Outcome.FAILED)
        assert re.search(reason, report.reason)
    with pytest.raises(SiteError, match=reason):
        daemon(answer).join(JoinRequest("north", 0, 1, {}))


def test_no_daemon_at_all(tmp_path: Path) -> None:
    site = SocketSite(tmp_path / "nothing")
    with pytest.raises(SiteError, match=r"does not answer \(FileNotFoundError\)"):
        site.join(JoinRequest("north", 0, 1, {}))
    assert [update.report.outcome for update in site.train(PLAIN)] == [Outcome.FAILED]


def test_why_a_message_was_too_large_is_heard(daemon: Callable[[bytes], SocketSite]) -> None:
    """The daemon answers and closes while the client still sends; its words count, not the broken pipe."""
    large = Instruction(1, (4,), {}, {"x": np.zeros(4 * MIB, np.float32)})
    refusal = frames(Frame("error", {"reason": "more than the 4096 that are taken"}))
    (update,) = daemon(refusal).train(large)
    assert update == Update(ClientReport.failed(4, "more than the 4096 that are taken"))
