"""Messages <-> Flower's records: with :mod:`fedlora.server` the only part of the library that imports Flower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedlora.codec import WireError, pack, unpack
from fedlora.exchange import ClientReport, Instruction, Tensors
from fedlora.headers import (
    HeaderReader,
    instruction_header,
    read_instruction_header,
    read_reports_header,
    reports_header,
)
from fedlora.joining import JoinReport, JoinRequest
from fedlora.reduce import REDUCTIONS, Reduction

_CODEC = "fedlora.raw"
_GROUP = "reduced."


def encode(tensors: Tensors) -> ArrayRecord:
    """Return the tensors (float32 or float64) as one record: a manifest and numbered pieces."""
    manifest, pieces = pack(tensors)
    parts = {"manifest": manifest} | {str(number): piece for number, piece in enumerate(pieces)}
    return ArrayRecord(
        {name: Array(dtype="uint8", shape=(len(data),), stype=_CODEC, data=data) for name, data in parts.items()}
    )


def decode(record: Any) -> dict[str, NDArray[np.floating]]:
    """Return the tensors of a record made by :func:`encode`, as read-only views of it.

    Raises:
        WireError: The record is anything else.
    """
    if not isinstance(record, ArrayRecord) or "manifest" not in record:
        raise WireError("not a record of tensors in fedlora's codec")
    names = [str(number) for number in range(len(record) - 1)]
    if record.keys() != {"manifest", *names}:
        raise WireError("not a record of tensors in fedlora's codec")
    if any(array.stype != _CODEC for array in record.values()):
        raise WireError(f"the tensors are not encoded as {_CODEC}")
    return unpack(record["manifest"].data, [record[name].data for name in names])


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
    extra = {"extra": encode(instruction.extra)} if instruction.extra else {}
    header = config_record(instruction_header(instruction))
    return RecordDict({"instruction": header, "tensors": encode(instruction.tensors), **extra})


def read_instruction(content: RecordDict) -> Instruction:
    """Return the instruction of a message's content.

    Raises:
        WireError: It holds none.
    """
    extra = decode(content["extra"]) if "extra" in content else {}
    return read_instruction_header(header_of(content, "instruction"), decode(content.get("tensors")), extra)


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
        header = reports_header(self.reports)
        groups: dict[str, ArrayRecord] = {}
        if self.reduction is not None and self.reduction.count:
            records, numbers = self.reduction.encode()
            header |= {"reduction": self.reduction.name, "numbers": list(numbers), "values": list(numbers.values())}
            groups = {f"{_GROUP}{name}": encode(tensors) for name, tensors in records.items()}
        return RecordDict({"reply": config_record(header), **groups})


def read_reports(content: RecordDict) -> list[ClientReport]:
    """Return the clients' reports of a reply's content.

    They are read before the updates: an update that cannot be read has left its client, and its ledger hash counts.

    Raises:
        WireError: It holds none.
    """
    return read_reports_header(header_of(content, "reply"))


def read_reduction(content: RecordDict, asked: str) -> Reduction | None:
    """Return the reduced updates of a reply's content; None where it holds none.

    Args:
        content: The content.
        asked: The reduction that was asked for.

    Raises:
        WireError: They are something else.
    """
    header = header_of(content, "reply")
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


# -- joining ------------------------------------------------------------------------------------------


def write_join_request(request: JoinRequest) -> RecordDict:
    """Return the content of a message that asks a site to join."""
    return RecordDict({"join": config_record(request.header())})


def read_join_request(content: RecordDict) -> JoinRequest:
    """Return the request of a message's content.

    Raises:
        WireError: It holds none.
    """
    return JoinRequest.read(header_of(content, "join"))


def write_join_report(report: JoinReport) -> RecordDict:
    """Return the content of a site's answer."""
    return RecordDict({"joined": config_record(report.header())})


def read_join_report(content: RecordDict) -> JoinReport:
    """Return the answer of a message's content.

    Raises:
        WireError: It holds none.
    """
    return JoinReport.read(header_of(content, "joined"))


# -- headers ------------------------------------------------------------------------------------------


def config_record(values: dict[str, Any]) -> ConfigRecord:
    """Return a header as a record, without its empty lists and texts, whose bytes Flower cannot count."""
    return ConfigRecord({key: value for key, value in values.items() if value not in ([], "")})


def header_of(content: RecordDict, name: str) -> HeaderReader:
    """Return the reader of a message's header.

    Raises:
        WireError: The message holds none.
    """
    record = content.get(name)
    return HeaderReader(record if isinstance(record, ConfigRecord) else None, name)
