"""The protocol between a site's daemon and the ClientApp on the same machine: typed frames over a Unix socket.

A frame is a fixed prefix, a header in JSON, and the raw numbers of the tensors that the header lists. Nothing is
unpickled, every value is checked, and a reader takes no more than it has said that it will.

One connection is one question: the client sends a frame, the daemon answers with one or more, the last of kind ``end``
or ``error``.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.codec import WireError, read_entry
from fedlora.exchange import Tensors
from fedlora.headers import HeaderReader

VERSION = 1
"""Of the frames; both ends are on one machine and installed by one operator, but not always at one time."""

_PREFIX = struct.Struct(">4sHI")  # magic, version, bytes of the header
_MAGIC = b"FLSD"
_MAX_HEADER_BYTES = 1 << 24
_MAX_TENSORS = 1 << 16
_CHUNK = 1 << 20


@final
@dataclass(frozen=True)
class Frame:
    """One message.

    Attributes:
        kind: What it is: ``join``, ``train``, ``evaluate``; ``joined``, ``update``, ``report``, ``end``, ``error``.
        header: Plain values.
        tensors: Groups of tensors by name.
    """

    kind: str
    header: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensors] = field(default_factory=dict)

    def reader(self) -> HeaderReader:
        """Return the header's reader."""
        return HeaderReader(self.header, self.kind)


def send(connection: socket.socket, frame: Frame) -> None:
    """Send a frame; numbers go out as they lie in memory, without another copy of all of them.

    Raises:
        OSError: The other end is gone.
    """
    listed = {
        group: [[name, str(value.dtype), list(value.shape)] for name, value in tensors.items()]
        for group, tensors in frame.tensors.items()
    }
    header = json.dumps({"kind": frame.kind, "header": dict(frame.header), "tensors": listed}).encode()
    if len(header) > _MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes is too large")
    connection.sendall(_PREFIX.pack(_MAGIC, VERSION, len(header)) + header)
    for tensors in frame.tensors.values():
        for value in tensors.values():
            little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
            if little.size:
                connection.sendall(little.reshape(-1).view(np.uint8).data)


def receive(connection: socket.socket, max_bytes: int) -> Frame:
    """Return the next frame.

    Args:
        connection: Where it comes from.
        max_bytes: The most bytes of tensors that it may hold.

    Raises:
        WireError: It is no frame of this version, or too large.
        OSError: The other end is gone, or does not go on in time.
    """
    magic, version, length = _PREFIX.unpack(_exactly(connection, _PREFIX.size))
    if magic != _MAGIC:
        raise WireError("this is not a fedlora site, or not a client of one")
    if version != VERSION:
        raise WireError(
            f"the other end speaks version {version} of the site's protocol, this one {VERSION}; install the same "
            "fedlora on both sides"
        )
    if length > _MAX_HEADER_BYTES:
        raise WireError(f"a header of {length} bytes is too large")
    try:
        content = json.loads(_exactly(connection, length))
    except (ValueError, RecursionError) as error:
        raise WireError(f"a header cannot be read ({error})") from error
    match content:
        case {"kind": str(kind), "header": dict(header), "tensors": dict(listed)}:
            return Frame(kind, header, _groups(connection, listed, max_bytes))
    raise WireError("a header is not one of a frame")


def _groups(
    connection: socket.socket, listed: Mapping[str, Any], max_bytes: int
) -> dict[str, dict[str, NDArray[np.floating]]]:
    """Read the tensors that a header lists; their sizes are known, and bounded, before the first is read."""
    entries = []
    for group, values in listed.items():
        if not isinstance(values, list):
            raise WireError("a group of tensors is not a list")
        entries += [(group, *read_entry(value)) for value in values]
    if len(entries) > _MAX_TENSORS:
        raise WireError(f"{len(entries)} tensors are too many")
    total = sum(np.dtype(dtype).itemsize * int(np.prod(shape, dtype=object)) for _, _, dtype, shape in entries)
    if total > max_bytes:
        raise WireError(f"{total} bytes of tensors are more than the {max_bytes} that are taken")
    groups: dict[str, dict[str, NDArray[np.floating]]] = {group: {} for group in listed}
    for group, name, dtype, shape in entries:
        if name in groups[group]:
            raise WireError(f"{name[:80]} is there twice")
        value = np.empty(shape, dtype=np.dtype(dtype).newbyteorder("<"))
        if value.size:
            _fill(connection, value.reshape(-1).view(np.uint8).data)
        groups[group][name] = value.astype(dtype, copy=False)
    return groups


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    _fill(connection, memoryview(data))
    return data


def _fill(connection: socket.socket, view: memoryview) -> None:
    at = 0
    while at < len(view):
        got = connection.recv_into(view[at : at + _CHUNK])
        if not got:
            raise ConnectionResetError("the other end closed the connection in the middle of a frame")
        at += got
