"""Messages <-> Flower's records: with :mod:`fedlora.server` the only part of the library that imports Flower."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlora.codec import WireError, pack, unpack
from fedlora.exchange import ClientReport, Instruction, Outcome, Tensors
from fedlora.local_terms import LocalTerms
from fedlora.reduce import REDUCTIONS, Reduction
from fedlora.roles import Role

_CODEC = "fedlora.raw"
_GROUP = "reduced."


def encode(tensors: Tensors) -> ArrayRecord:
    """Return the tensors (float32 or float64) as one record."""
    manifest, data = pack(tensors)
    return ArrayRecord(
        {
            "manifest": Array(dtype="uint8", shape=(len(manifest),), stype=_CODEC, data=manifest),
            "data": Array(dtype="uint8", shape=(len(data),), stype=_CODEC, data=data),
        }
    )


def decode(record: Any) -> dict[str, NDArray[np.floating]]:
    """Return the tensors of a record made by :func:`encode`.

    Raises:
        WireError: The record is anything else.
    """
    if not isinstance(record, ArrayRecord) or set(record) != {"manifest", "data"}:
        raise WireError("not a record of tensors in fedlora's codec")
    if any(array.stype != _CODEC for array in record.values()):
        raise WireError(f"the tensors are not encoded as {_CODEC}")
    return unpack(record["manifest"].data, record["data"].data)


def message_bytes(content: RecordDict) -> int:
    """Return the bytes of all records of a message, as Flower counts them."""
    return sum(record.count_bytes() for record in content.values())


def named_arrays(tensors: Tensors) -> ArrayRecord:
    """Return the tensors as Flower's own strategies and users have them: one named array each."""
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in tensors.items()})


def from_named_arrays(record: ArrayRecord) -> dict[str, NDArray[np.floating]]:
    """Return the arrays of :func:`named_arrays`."""
    return {name: array.numpy() for name, array in record.items()}


# -- the server's instruction -------------------------------------------------------------------------


def write_instruction(instruction: Instruction) -> RecordDict:
    """Return the content of a message to a node."""
    local = instruction.local
    header: dict[str, Any] = {
        "round": instruction.round,
        "clients": list(instruction.clients),
        "kinds": list(instruction.roles),
        "roles": [str(role) for role in instruction.roles.values()],
        "weights": instruction.weights,
        "reduction": instruction.reduction,
        "learning_rate": local.learning_rate,
        "proximal": local.proximal,
        "scaffold": local.scaffold,
        "ranks": list(instruction.ranks),
        "fingerprint": instruction.fingerprint,
        "pack": instruction.pack,
        "ledger_heads": list(instruction.ledger_heads),
    }
    extra = {"extra": encode(instruction.extra)} if instruction.extra else {}
    return RecordDict({"instruction": _config_record(header), "tensors": encode(instruction.tensors), **extra})


def read_instruction(content: RecordDict) -> Instruction:
    """Return the instruction of a message's content.

    Raises:
        WireError: It holds none.
    """
    header = _Reader(content, "instruction")
    kinds, roles = header.list("kinds", str), header.list("roles", str)
    weights, reduction = header.one("weights", str), header.one("reduction", str)
    if weights not in ("examples", "equal") or len(kinds) != len(roles) or not set(roles) <= set(Role):
        raise WireError("the instruction's roles or weights are not known")
    if reduction not in REDUCTIONS:
        raise WireError(f"the instruction's reduction {reduction!r} is not known")
    clients, ranks = tuple(header.list("clients", int)), tuple(header.list("ranks", int))
    ledger_heads = tuple(header.list("ledger_heads", str))
    if any(values and len(values) != len(clients) for values in (ledger_heads, ranks)):
        raise WireError("the instruction's ledger hashes or ranks are not one a client")
    if any(rank < 1 for rank in ranks):
        raise WireError("the instruction's ranks are not 1 or more")
    if len(set(clients)) != len(clients):
        raise WireError("the instruction names a client twice")
    local = LocalTerms(header.one("learning_rate", float), header.one("proximal", float), header.one("scaffold", int))
    sizes = (local.learning_rate, local.proximal)
    if local.scaffold not in (0, 1, 2) or not all(0 <= size < math.inf for size in sizes):
        raise WireError("the instruction's terms of local training are not numbers of 0 or more, or not known")
    return Instruction(
        round=header.one("round", int),
        clients=clients,
        roles={kind: Role(role) for kind, role in zip(kinds, roles, strict=True)},
        tensors=decode(content.get("tensors")),
        weights="examples" if weights == "examples" else "equal",
        reduction=reduction,
        local=local,
        extra=decode(content["extra"]) if "extra" in content else {},
        ranks=ranks,
        fingerprint=header.one("fingerprint", str),
        pack=header.one("pack", int),
        ledger_heads=ledger_heads,
    )


# -- the node's reply ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a node answers: a report of each client, and the updates of those whose outcome is ok, reduced.

    Attributes:
        reports: One a client. Those whose outcome is ok have the same metrics; the others' are not read.
        reduction: Their updates; None where clients were evaluated.
    """

    reports: Sequence[ClientReport]
    reduction: Reduction | None = None

    def to_content(self) -> RecordDict:
        """Return the message content."""
        reports = self.reports
        metrics = list(dict.fromkeys(name for report in reports for name in report.metrics))
        header: dict[str, Any] = {
            "clients": [report.client for report in reports],
            "outcomes": [str(report.outcome) for report in reports],
            "reasons": [report.reason for report in reports],
            "examples": [report.examples for report in reports],
            "steps": [report.steps for report in reports],
            "ledger_heads": [report.ledger_head for report in reports],
            "metrics": metrics,
            **{f"metric.{name}": [float(report.metrics.get(name, 0.0)) for report in reports] for name in metrics},
        }
        groups: dict[str, ArrayRecord] = {}
        if self.reduction is not None and self.reduction.count:
            records, numbers = self.reduction.encode()
            header |= {"reduction": self.reduction.name, "numbers": list(numbers), "values": list(numbers.values())}
            groups = {f"{_GROUP}{name}": encode(tensors) for name, tensors in records.items()}
        return RecordDict({"reply": _config_record(header), **groups})


def read_reports(content: RecordDict) -> list[ClientReport]:
    """Return the clients' reports of a reply's content.

    They are read before the updates: an update that cannot be read has left its client, and its ledger hash counts.

    Raises:
        WireError: It holds none.
    """
    header = _Reader(content, "reply")
    names = header.list("metrics", str)
    columns: list[list[Any]] = [
        header.list("clients", int),
        header.list("outcomes", str),
        header.list("reasons", str),
        header.list("examples", int),
        header.list("steps", int),
        header.list("ledger_heads", str),
        *(header.list(f"metric.{name}", float) for name in names),
    ]
    if any(len(values) != len(columns[0]) for values in columns):
        raise WireError("the reply's lists differ in length")
    if not set(columns[1]) <= set(Outcome):
        raise WireError("the reply's outcomes are not known")
    reports = [
        ClientReport(client, Outcome(outcome), reason, examples, steps, dict(zip(names, metrics, strict=True)), head)
        for client, outcome, reason, examples, steps, head, *metrics in zip(*columns, strict=True)
    ]
    return [report if report.outcome is Outcome.OK else replace(report, metrics={}) for report in reports]


def read_reduction(content: RecordDict, asked: str) -> Reduction | None:
    """Return the reduced updates of a reply's content; None where it holds none.

    Args:
        content: The content.
        asked: The reduction that was asked for.

    Raises:
        WireError: They are something else.
    """
    header = _Reader(content, "reply")
    groups = {name.removeprefix(_GROUP): decode(content[name]) for name in content if name.startswith(_GROUP)}
    if not groups:
        return None
    given = header.one("reduction", str)
    if given != asked:
        raise WireError(f"its updates are reduced by {given[:40]!r}, not {asked!r}")
    names, values = header.list("numbers", str), header.list("values", int)
    if len(names) != len(values):
        raise WireError("the reply's lists differ in length")
    return REDUCTIONS[asked].decode(groups, dict(zip(names, values, strict=True)))


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
