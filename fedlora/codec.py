"""Tensors <-> bytes: their raw little-endian numbers one after another, and a compressed manifest of names and shapes.

The data are therefore exactly what theory says (elements times their size) and the manifest a few hundred bytes.
Nothing is unpickled, and everything that another machine may have written is checked.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors
from fedlora.methods import TensorSpec, count_parameters

_DTYPES = ("float32", "float64")
_MAX_MANIFEST_BYTES = 1 << 24
_MAX_DIMS = 8
_MAX_SIZE = 1 << 40


class WireError(ValueError):
    """A record does not hold what it should; the message says what is wrong with it."""


def pack(tensors: Tensors) -> tuple[bytes, bytes]:
    """Return the manifest and the data of tensors (float32 or float64)."""
    manifest = [[name, str(value.dtype), list(value.shape)] for name, value in tensors.items()]
    assert all(dtype in _DTYPES for _, dtype, _ in manifest), "only float32 and float64 travel"
    packed = zlib.compress(json.dumps(manifest, separators=(",", ":")).encode(), 9)
    data = b"".join(
        np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        for value in tensors.values()
    )
    return packed, data


def unpack(packed: bytes, data: bytes) -> dict[str, NDArray[np.floating]]:
    """Return the tensors of :func:`pack`.

    Raises:
        WireError: The bytes are anything else.
    """
    tensors: dict[str, NDArray[np.floating]] = {}
    at, view = 0, memoryview(data)
    for entry in _manifest(packed):
        name, dtype, shape = read_entry(entry)
        if name in tensors:
            raise WireError(f"{name} is there twice")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if at + size > len(data):
            raise WireError(f"the data end before {name}")
        flat = np.frombuffer(view[at : at + size], dtype=np.dtype(dtype).newbyteorder("<"))
        tensors[name] = flat.reshape(shape).astype(dtype)
        at += size
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes follow the last tensor")
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


def payload_bytes(specs: Mapping[str, TensorSpec], dtype: str) -> int:
    """Return the bytes of these tensors in the codec, without the manifest."""
    return count_parameters(specs) * np.dtype(dtype).itemsize
