"""Tensors <-> Flower records: the only module of the library that knows Flower.

The codec concatenates the tensors' raw little-endian bytes; a compressed manifest beside them names each
tensor with dtype and shape. The payload is therefore exactly what theory says (elements times their size)
and the envelope a few hundred bytes. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlora.exact_sum import ExactSum
from fedlora.methods import TensorSpec, count_parameters
from fedlora.roles import Role

Tensors = Mapping[str, NDArray[np.floating]]

_DTYPES = ("float32", "float64")
_MAX_MANIFEST_BYTES = 1 << 24
_CODEC = "fedlora.raw"
BUDGET_SPENT = "its privacy budget is spent"
"""How the error of a client begins that will not train any more."""


class WireError(ValueError):
    """A record does not hold what it should; the message says what is wrong with it."""


# -- tensors ------------------------------------------------------------------------------------------


def encode(tensors: Tensors) -> ArrayRecord:
    """Return the tensors (float32 or float64) as one record."""
    manifest = [[name, str(value.dtype), list(value.shape)] for name, value in tensors.items()]
    assert all(dtype in _DTYPES for _, dtype, _ in manifest), "only float32 and float64 travel"
    packed = zlib.compress(json.dumps(manifest, separators=(",", ":")).encode(), 9)
    data = b"".join(
        np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<")).tobytes() for value in tensors.values()
    )
    return ArrayRecord(
        {
            "manifest": Array(dtype="uint8", shape=(len(packed),), stype=_CODEC, data=packed),
            "data": Array(dtype="uint8", shape=(len(data),), stype=_CODEC, data=data),
        }
    )


def decode(record: Any) -> dict[str, NDArray[np.floating]]:
    """Return the tensors of a record made by :func:`encode`.

    Raises:
        WireError: The record is anything else.
    """
    manifest, data = _manifest(record), record["data"].data
    tensors: dict[str, NDArray[np.floating]] = {}
    at = 0
    for entry in manifest:
        name, dtype, shape = _entry(entry)
        if name in tensors:
            raise WireError(f"{name} is there twice")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if at + size > len(data):
            raise WireError(f"the data end before {name}")
        flat = np.frombuffer(data[at : at + size], dtype=np.dtype(dtype).newbyteorder("<"))
        tensors[name] = flat.reshape(shape).astype(dtype)
        at += size
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes follow the last tensor")
    return tensors


def _manifest(record: Any) -> list[Any]:
    if not isinstance(record, ArrayRecord) or set(record) != {"manifest", "data"}:
        raise WireError("not a record of tensors in fedlora's codec")
    if any(array.stype != _CODEC for array in record.values()):
        raise WireError(f"the tensors are not encoded as {_CODEC}")
    try:
        unpack = zlib.decompressobj()
        text = unpack.decompress(record["manifest"].data, _MAX_MANIFEST_BYTES)
        manifest = json.loads(text) if unpack.eof else None
    except (zlib.error, ValueError, RecursionError) as error:
        raise WireError(f"the manifest cannot be read ({error})") from error
    if not isinstance(manifest, list):
        raise WireError("the manifest is not a list, or it is cut short")
    return manifest


def _entry(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    match entry:
        case [str(name), str(dtype), list(shape)] if all(type(n) is int and 0 <= n < 2**40 for n in shape):
            if dtype not in _DTYPES:
                raise WireError(f"{name} has dtype {dtype!r}, not one of {', '.join(_DTYPES)}")
            return name, dtype, tuple(shape)
    raise WireError("an entry of the manifest is not [name, dtype, shape]")


def check_tensors(tensors: Tensors, expected: Mapping[str, TensorSpec], dtype: str) -> None:
    """Check names, shapes, dtype and that every number is finite.

    Raises:
        WireError: The first thing that is wrong, with the tensor's name.
    """
    for name in expected:
        if name not in tensors:
            raise WireError(f"{name} is missing")
    for name, value in tensors.items():
        if name not in expected:
            raise WireError(f"{name} is not expected")
        if value.shape != expected[name].shape:
            raise WireError(f"{name} has shape {list(value.shape)}, not {list(expected[name].shape)}")
        if str(value.dtype) != dtype:
            raise WireError(f"{name} has dtype {value.dtype}, not {dtype}")
        if not np.isfinite(value).all():
            raise WireError(f"{name} holds NaN or infinity")


def payload_bytes(specs: Mapping[str, TensorSpec], dtype: str) -> int:
    """Return the bytes of these tensors in the codec, without the envelope."""
    return count_parameters(specs) * np.dtype(dtype).itemsize


def message_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message, as Flower counts them."""
    return sum(record.count_bytes() for record in content.values())


def named_arrays(tensors: Tensors) -> ArrayRecord:
    """Return the tensors as Flower's own strategies and users know them: one named array each."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in tensors.items()})


def from_named_arrays(record: ArrayRecord) -> dict[str, NDArray[np.floating]]:
    """Return the arrays of :func:`named_arrays`."""
    return {name: array.numpy() for name, array in record.items()}


# -- messages -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a node: to train clients, or to evaluate them on their own rows.

    Attributes:
        round: The round, from 1.
        clients: The clients that the node stands for, ascending.
        roles: Role of each kind of tensor.
        weights: ``examples`` or ``equal``.
        tensors: Current values of the shared and broadcast tensors.
        fingerprint: The server's code, see :mod:`fedlora.fingerprint`.
        pack: Clients trained together; 0: automatic.
        ledger_heads: Under DP for each client the hash of the last ledger entry that the server was told; empty: none.
    """

    round: int
    clients: tuple[int, ...]
    roles: dict[str, Role]
    weights: Literal["examples", "equal"]
    tensors: dict[str, NDArray[np.floating]]
    fingerprint: str
    pack: int = 0
    ledger_heads: tuple[str, ...] = ()

    def to_content(self) -> RecordDict:
        """Return the message content."""
        header: dict[str, Any] = {
            "round": self.round,
            "clients": list(self.clients),
            "kinds": list(self.roles),
            "roles": [str(role) for role in self.roles.values()],
            "weights": self.weights,
            "fingerprint": self.fingerprint,
            "pack": self.pack,
            "ledger_heads": list(self.ledger_heads),
        }
        return RecordDict({"instruction": _config_record(header), "tensors": encode(self.tensors)})

    @classmethod
    def from_content(cls, content: RecordDict) -> Instruction:
        """Read a message content.

        Raises:
            WireError: It is not an instruction.
        """
        header = _Reader(content, "instruction")
        kinds, roles = header.list("kinds", str), header.list("roles", str)
        weights = header.one("weights", str)
        if weights not in ("examples", "equal") or len(kinds) != len(roles) or not set(roles) <= set(Role):
            raise WireError("the instruction's roles or weights are not known")
        clients, ledger_heads = tuple(header.list("clients", int)), tuple(header.list("ledger_heads", str))
        if ledger_heads and len(ledger_heads) != len(clients):
            raise WireError("the instruction's ledger hashes are not one a client")
        return cls(
            round=header.one("round", int),
            clients=clients,
            ledger_heads=ledger_heads,
            roles={kind: Role(role) for kind, role in zip(kinds, roles, strict=True)},
            weights="examples" if weights == "examples" else "equal",
            tensors=decode(content.get("tensors")),
            fingerprint=header.one("fingerprint", str),
            pack=header.one("pack", int),
        )


@dataclass
class Reply:
    """What a node answers: each client's facts, and one update or the exact sum of several.

    A list has one entry a client. A client with an error is not in the sum.

    Attributes:
        clients: The clients asked for.
        examples: Rows that each trained on (or evaluated).
        steps: Optimizer steps of each.
        metrics: For each metric one number a client: mean training loss, or sums over its own rows.
        errors: Why a client's update was left out; empty where it is in.
        ledger_heads: Under DP the hash of each client's last ledger entry; empty: it has none.
        update: The update of a node's only client.
        total: The weighted sum of several clients' updates.
    """

    clients: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    ledger_heads: list[str] = field(default_factory=list)
    update: Tensors | None = None
    total: ExactSum | None = None

    def add(
        self,
        client: int,
        *,
        examples: int = 0,
        steps: int = 0,
        metrics: Mapping[str, float] | None = None,
        error: str = "",
        ledger_head: str = "",
    ) -> None:
        """Enter one client's facts; metrics that it lacks are 0."""
        for name in metrics or {}:
            self.metrics.setdefault(name, [0.0] * len(self.clients))
        for name, values in self.metrics.items():
            values.append((metrics or {}).get(name, 0.0))
        self.clients.append(client)
        self.examples.append(examples)
        self.steps.append(steps)
        self.errors.append(error)
        self.ledger_heads.append(ledger_head)

    def to_content(self) -> RecordDict:
        """Return the message content."""
        header: dict[str, Any] = {
            "clients": self.clients,
            "examples": self.examples,
            "steps": self.steps,
            "metrics": list(self.metrics),
            "errors": self.errors,
            "ledger_heads": self.ledger_heads,
        }
        header |= {f"metric.{name}": values for name, values in self.metrics.items()}
        records: dict[str, Any] = {}
        if self.update is not None:
            records["update"] = encode(self.update)
        if self.total is not None and self.total.count:
            header |= {"weight": self.total.weight, "count": self.total.count}
            records |= {"coarse": encode(self.total.coarse), "fine": encode(self.total.fine)}
        return RecordDict({"reply": _config_record(header), **records})

    @classmethod
    def from_content(cls, content: RecordDict) -> Reply:
        """Read a message content.

        Raises:
            WireError: It is not a reply.
        """
        header = _Reader(content, "reply")
        reply = cls(
            clients=header.list("clients", int),
            examples=header.list("examples", int),
            steps=header.list("steps", int),
            metrics={name: header.list(f"metric.{name}", float) for name in header.list("metrics", str)},
            errors=header.list("errors", str),
            ledger_heads=header.list("ledger_heads", str),
        )
        lists: list[list[Any]] = [
            reply.examples,
            reply.steps,
            reply.errors,
            reply.ledger_heads,
            *reply.metrics.values(),
        ]
        if any(len(values) != len(reply.clients) for values in lists):
            raise WireError("the reply's lists differ in length")
        if "update" in content:
            reply.update = decode(content["update"])
        if "coarse" in content:
            coarse, fine = decode(content["coarse"]), decode(content.get("fine"))
            reply.total = ExactSum(
                {name: value.astype(np.float64) for name, value in coarse.items()},
                {name: value.astype(np.float64) for name, value in fine.items()},
                header.one("weight", int),
                header.one("count", int),
            )
        return reply


def _config_record(values: dict[str, Any]) -> ConfigRecord:
    """Return the values as a record without its empty lists, whose bytes Flower cannot count."""
    return ConfigRecord({key: value for key, value in values.items() if value != []})


T = TypeVar("T", int, float, str)


class _Reader:
    """Reads typed values out of a ConfigRecord that anybody may have written."""

    def __init__(self, content: RecordDict, name: str) -> None:
        record = content.get(name)
        if not isinstance(record, ConfigRecord):
            raise WireError(f"the message holds no {name}")
        self._record, self._name = record, name

    def one(self, key: str, kind: Callable[[Any], T]) -> T:
        value = self._record.get(key)
        if type(value) is not kind:
            raise WireError(f"{self._name}.{key} is not {kind.__name__}")
        return value  # type: ignore[return-value]

    def list(self, key: str, kind: Callable[[Any], T]) -> list[T]:
        values = self._record.get(key, [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise WireError(f"{self._name}.{key} is not a list of {kind.__name__}")
        return values  # type: ignore[return-value]
