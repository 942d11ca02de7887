"""Joining: what a coordinator asks of a deployed site before its first round, its answer, and what must agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self, final

from fedlora.codec import WireError
from fedlora.config import Scalar
from fedlora.headers import HeaderReader

PROTOCOL = 1
"""Version of what coordinator and sites say to each other; both sides must have the same."""

_SERVERS_OWN = ("federation.", "eval.", "server.", "rounds", "data.", "run.")
"""Keys, or their beginnings, that say nothing to a site: another value of them makes no other job."""
_SAID = ("data.classes", "data.prompt-template", "data.chat-template", "data.learn", "run.name", "run.plugins")
"""Those among them that do."""


def said(flat: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return the part of a run's configuration that a site is told."""
    return {key: value for key, value in flat.items() if key in _SAID or not key.startswith(_SERVERS_OWN)}


@final
@dataclass(frozen=True)
class JoinRequest:
    """What the coordinator asks of a site.

    Attributes:
        site: The name of the site that is asked.
        client: The site's number among the clients.
        clients: How many there are.
        flat: The run's configuration, dotted; ``run.name`` is what a site knows the run by.
        protocol: The coordinator's version of this protocol.
    """

    site: str
    client: int
    clients: int
    flat: Mapping[str, Scalar]
    protocol: int = PROTOCOL

    @property
    def job(self) -> str:
        """The digest by which instructions name this job."""
        text = json.dumps([self.site, self.client, self.clients, said(self.flat)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def header(self) -> dict[str, Any]:
        """Return the request as plain values."""
        return {**vars(self), "flat": json.dumps(said(self.flat))}

    @classmethod
    def read(cls, header: HeaderReader) -> Self:
        """Return the request of a header.

        Raises:
            WireError: It holds none.
        """
        try:
            flat = json.loads(header.one("flat", str))
        except (ValueError, RecursionError) as error:
            raise WireError(f"the configuration cannot be read ({error})") from error
        if not isinstance(flat, dict) or not all(isinstance(value, Scalar) for value in flat.values()):
            raise WireError("the configuration is not a table of plain values")
        client, clients = header.one("client", int), header.one("clients", int)
        if not 0 <= client < clients <= _MOST_CLIENTS:
            raise WireError(f"client {client} of {clients}: must be one of them, of {_MOST_CLIENTS} at most")
        return cls(header.one("site", str), client, clients, said(flat), header.one("protocol", int))


_MOST_CLIENTS = 1 << 20


@final
@dataclass(frozen=True)
class JoinReport:
    """What a site answers. It holds nothing of a row.

    Attributes:
        site: Its name.
        reason: Why it does not join; empty where it does.
        protocol: Its version of this protocol.
        version: Of fedlora.
        fingerprint: Of its installed code.
        rows: Its nominal number of rows, which bounds what it may claim as its weight.
        digest: Of the base model's weights, their quantisation and the tokenizer.
        initial_digest: Of the seeded tensors.
        constants_digest: Of the method's constants, such as indices.
        device: Where it computes.
        threads: CPU threads of a trainer.
        trainers: How many trainers it has.
    """

    site: str
    reason: str = ""
    protocol: int = PROTOCOL
    version: str = ""
    fingerprint: str = ""
    rows: int = 0
    digest: str = ""
    initial_digest: str = ""
    constants_digest: str = ""
    device: str = ""
    threads: int = 0
    trainers: int = 0

    def header(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return dict(vars(self))

    @classmethod
    def read(cls, header: HeaderReader) -> Self:
        """Return the report of a header.

        Raises:
            WireError: It holds none.
        """
        values: dict[str, Any] = {
            item.name: header.one(item.name, int) if item.type == "int" else header.text(item.name)
            for item in fields(cls)
        }
        return cls(**values)

    def differs(self, own: Self) -> str:
        """Return what of this report is not as the coordinator has it; empty where all is.

        Args:
            own: The coordinator's own report, of its own base model and code.
        """
        for name, what in (
            ("protocol", "the version of the protocol"),
            ("digest", "the base model, its quantisation or its tokenizer"),
            ("initial_digest", "the tensors drawn from the seed"),
            ("constants_digest", "the method's constants"),
        ):
            here, there = getattr(own, name), getattr(self, name)
            if here != there:
                return f"{what} differs: {str(there)[:16]!r} at the site, {str(here)[:16]!r} at the coordinator"
        return ""
