"""Headers of messages: instructions and reports <-> plain values, whatever carries them.

Flower's records (:mod:`fedlora.wire`) and the socket of a deployed site (``clients/protocol.py``) carry the same ones.
Anybody may have written what is read here, so every value is checked for its type.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, final

from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction, Outcome, Tensors
from fedlora.local_terms import LocalTerms
from fedlora.reduce.fold import REDUCTIONS
from fedlora.roles import Role

Header = Mapping[str, Any]

T = TypeVar("T", int, float, str, bool)


@final
class HeaderReader:
    """Reads typed values out of a header that anybody may have written.

    Args:
        header: What stands where the header should.
        name: What it is, for errors.

    Raises:
        WireError: It is no header.
    """

    def __init__(self, header: object, name: str) -> None:
        if not isinstance(header, Mapping):
            raise WireError(f"the message holds no {name}")
        self._header, self._name = header, name

    def one(self, key: str, kind: Callable[[Any], T]) -> T:
        """Return one value, which must be exactly of this type."""
        value: Any = self._header.get(key)
        if type(value) is not kind:
            raise WireError(f"{self._name}.{key} is not {kind.__name__}")
        found: T = value
        return found

    def text(self, key: str) -> str:
        """Return a text; empty where there is none, since Flower cannot count an empty one."""
        return self.one(key, str) if key in self._header else ""

    def list(self, key: str, kind: Callable[[Any], T]) -> list[T]:
        """Return a list of such values; empty where there is none, since Flower cannot carry an empty one."""
        values = self._header.get(key, [])
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise WireError(f"{self._name}.{key} is not a list of {kind.__name__}")
        return values


def instruction_header(instruction: Instruction) -> dict[str, Any]:
    """Return all of an instruction but its tensors."""
    local = instruction.local
    return {
        "round": instruction.round,
        "clients": list(instruction.clients),
        "kinds": list(instruction.roles),
        "roles": [str(role) for role in instruction.roles.values()],
        "weights": instruction.weights,
        "reduction": instruction.reduction,
        "learning_rate": local.learning_rate,
        "proximal": local.proximal,
        "scaffold": local.scaffold,
        "penalty": local.penalty,
        "decay": local.decay,
        "ranks": list(instruction.ranks),
        "module_counts": [len(own) for own in instruction.modules],
        "modules": [place for own in instruction.modules for place in own],
        "blocks": list(instruction.blocks),
        "experts": list(instruction.experts),
        "fingerprint": instruction.fingerprint,
        "pack": instruction.pack,
        "ledger_heads": list(instruction.ledger_heads),
        "job": instruction.job,
    }


def read_instruction_header(header: HeaderReader, tensors: Tensors, extra: Tensors) -> Instruction:
    """Return the instruction of a header and the tensors that came with it.

    Raises:
        WireError: It holds none.
    """
    kinds, roles = header.list("kinds", str), header.list("roles", str)
    weights, reduction = header.one("weights", str), header.one("reduction", str)
    if weights not in ("examples", "equal") or len(kinds) != len(roles) or not set(roles) <= set(Role):
        raise WireError("the instruction's roles or weights are not known")
    if reduction not in REDUCTIONS:
        raise WireError(f"the instruction's reduction {reduction!r} is not known")
    clients, ranks = tuple(header.list("clients", int)), tuple(header.list("ranks", int))
    experts, ledger_heads = tuple(header.list("experts", int)), tuple(header.list("ledger_heads", str))
    if any(values and len(values) != len(clients) for values in (ledger_heads, ranks, experts)):
        raise WireError("the instruction's ledger hashes, ranks or experts are not one a client")
    if any(rank < 1 for rank in ranks) or any(expert < 0 for expert in experts):
        raise WireError("the instruction's ranks are not 1 or more, or its experts not 0 or more")
    modules = _modules(header, len(clients))
    if ranks and modules:
        raise WireError("the instruction has both ranks that clients hold and modules that they train")
    if len(set(clients)) != len(clients):
        raise WireError("the instruction names a client twice")
    local = LocalTerms(
        learning_rate=header.one("learning_rate", float),
        proximal=header.one("proximal", float),
        scaffold=header.one("scaffold", int),
        penalty=header.one("penalty", float),
        decay=header.one("decay", float),
    )
    sizes = (local.learning_rate, local.proximal, local.penalty)
    known = local.scaffold in (0, 1, 2) and 0 < local.decay <= 1
    if not known or not all(0 <= size < math.inf for size in sizes):
        raise WireError("the instruction's terms of local training are not numbers of 0 or more, or not known")
    return Instruction(
        round=header.one("round", int),
        clients=clients,
        roles={kind: Role(role) for kind, role in zip(kinds, roles, strict=True)},
        tensors=tensors,
        weights="examples" if weights == "examples" else "equal",
        reduction=reduction,
        local=local,
        extra=extra,
        ranks=ranks,
        modules=modules,
        blocks=tuple(header.list("blocks", str)),
        experts=experts,
        fingerprint=header.text("fingerprint"),
        pack=header.one("pack", int),
        ledger_heads=ledger_heads,
        job=header.text("job"),
    )


def _modules(header: HeaderReader, clients: int) -> tuple[tuple[int, ...], ...]:
    """Return the modules that each client trains; empty: the header names none."""
    counts, places = header.list("module_counts", int), header.list("modules", int)
    if not counts and not places:
        return ()
    if len(counts) != clients or any(count < 1 for count in counts) or sum(counts) != len(places):
        raise WireError("the instruction's modules are not 1 or more of each client")
    ends = itertools.accumulate(counts)
    modules = tuple(tuple(places[end - count : end]) for end, count in zip(ends, counts, strict=True))
    if any(own[0] < 0 or list(own) != sorted(set(own)) for own in modules):
        raise WireError("the instruction's modules are not ascending places from 0")
    return modules


def reports_header(reports: Sequence[ClientReport]) -> dict[str, Any]:
    """Return clients' reports, a list for each of their fields.

    Those whose outcome is ok have the same metrics; the others' are not read.
    """
    metrics = list(dict.fromkeys(name for report in reports for name in report.metrics))
    return {
        "clients": [report.client for report in reports],
        "outcomes": [str(report.outcome) for report in reports],
        "reasons": [report.reason for report in reports],
        "examples": [report.examples for report in reports],
        "steps": [report.steps for report in reports],
        "ledger_heads": [report.ledger_head for report in reports],
        "metrics": metrics,
        **{f"metric.{name}": [float(report.metrics.get(name, 0.0)) for report in reports] for name in metrics},
    }


def read_reports_header(header: HeaderReader) -> list[ClientReport]:
    """Return the reports of a header.

    Raises:
        WireError: It holds none.
    """
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
