"""Tensors <-> bytes: their raw little-endian numbers one after another, and a compressed manifest of names and shapes.

The data are therefore exactly what theory says (elements times their size) and the manifest a few hundred bytes.
Nothing is unpickled, and everything that another machine may have written is checked.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors

_DTYPES = ("float32", "float64")
_MAX_MANIFEST_BYTES = 1 << 24
_MAX_DIMS = 8
_MAX_SIZE = 1 << 40
_PIECE_BYTES = 1 << 25


class WireError(ValueError):
    """A record does not hold what it should; the message says what is wrong with it."""


def pack(tensors: Tensors) -> tuple[bytes, list[bytes]]:
    """Return the manifest and the data of tensors (float32 or float64), in pieces of whole tensors.

    A reader of several pieces never needs memory for one more copy of all of them.
    """
    manifest = [[name, str(value.dtype), list(value.shape)] for name, value in tensors.items()]
    assert all(dtype in _DTYPES for _, dtype, _ in manifest), "only float32 and float64 travel"
    packed = zlib.compress(json.dumps(manifest, separators=(",", ":")).encode(), 9)
    pieces: list[bytes] = []
    waiting: list[NDArray[np.floating]] = []
    for value in tensors.values():
        waiting.append(np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False))
        if sum(array.nbytes for array in waiting) >= _PIECE_BYTES:
            pieces.append(_joined(waiting))
            waiting = []
    return packed, [*pieces, _joined(waiting)] if waiting else pieces


def _joined(arrays: Sequence[NDArray[np.floating]]) -> bytes:
    return b"".join(array.reshape(-1).view(np.uint8).data for array in arrays)


def unpack(packed: bytes, pieces: Sequence[bytes]) -> dict[str, NDArray[np.floating]]:
    """Return the tensors of :func:`pack`, read-only views of the pieces where their place allows it.

    Raises:
        WireError: The bytes are anything else.
    """
    tensors: dict[str, NDArray[np.floating]] = {}
    left = iter(pieces)
    piece, at = b"", 0
    for entry in _manifest(packed):
        name, dtype, shape = read_entry(entry)
        if name in tensors:
            raise WireError(f"{name} is there twice")
        count = math.prod(shape)
        size = count * np.dtype(dtype).itemsize
        if at == len(piece) and size:
            piece, at = next(left, b""), 0
        if at + size > len(piece):
            raise WireError(f"the data end before {name}")
        flat = np.frombuffer(piece, np.dtype(dtype).newbyteorder("<"), count, at) if size else np.zeros(0, dtype)
        tensors[name] = np.require(flat.reshape(shape), dtype, "A")
        at += size
    if extra := len(piece) - at + sum(map(len, left)):
        raise WireError(f"{extra} bytes follow the last tensor")
    return tensors


def _manifest(packed: bytes) -> list[Any]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(packed, _MAX_MANIFEST_BYTES)
        manifest = json.loads(text) if inflate.eof else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise WireError(f"the manifest cannot be read ({error})") from error
    if not isinstance(manifest, list):
        raise WireError("the manifest is not a list, or it is cut short")
    return manifest


def read_entry(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    """Return name, dtype and shape of an entry of a manifest that anybody may have written.

    Raises:
        WireError: It is none.
    """
    match entry:
        case [str(name), str(dtype), list(shape)] if _is_shape(shape):
            if dtype not in _DTYPES:
                raise WireError(f"{name[:80]} has dtype {dtype[:20]!r}, not one of {', '.join(_DTYPES)}")
            return name, dtype, tuple(shape)
    raise WireError("an entry of the manifest is not [name, dtype, shape]")


def _is_shape(shape: list[Any]) -> bool:
    """Whether numpy can make an array of this shape: numbers, few and small enough, also where one of them is 0."""
    return (
        len(shape) <= _MAX_DIMS
        and all(type(n) is int and n >= 0 for n in shape)
        and math.prod(max(n, 1) for n in shape) < _MAX_SIZE
    )
