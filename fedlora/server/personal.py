"""Clients' evaluations of their own models, where they keep tensors that the server cannot evaluate."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from fedlora.codec import WireError
from fedlora.exchange import Outcome
from fedlora.server.replies import reports_of
from fedlora.wire import message_bytes

_logger = logging.getLogger(__name__)

Sums = Mapping[str, float]


@dataclass
class PersonalEvaluation:
    """Who was asked after a round, and what they reported.

    Attributes:
        round: The round.
        pending: Clients whose reply has not arrived, by the node that stands for them.
        sums: For each client the sums of its rows' facts, and ``examples``, their number.
        refused: Why a client's report is not used, by client.
        asked: The clients that were asked.
        done: Whether the replies have been collected.
    """

    round: int
    pending: dict[int, tuple[int, ...]]
    sums: dict[int, Sums] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    asked: tuple[int, ...] = field(init=False)
    done: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        """Remember who was asked."""
        self.asked = tuple(client for clients in self.pending.values() for client in clients)

    def collect(self, replies: Iterable[Message]) -> int:
        """Read the replies; return the bytes that Flower carried."""
        received = 0
        for message in replies:
            clients = self.pending.pop(message.metadata.src_node_id, ())
            try:
                reports = reports_of(message, clients)
            except WireError as error:
                self._refuse(clients, str(error))
                continue
            received += message_bytes(message.content)
            for report in reports:
                finite = bool(report.metrics) and np.isfinite(list(report.metrics.values())).all()
                if report.outcome is not Outcome.OK or report.examples < 1 or not finite:
                    self._refuse([report.client], report.reason or "not a finite number a row")
                    continue
                self.sums[report.client] = {**report.metrics, "examples": report.examples}
        for clients in self.pending.values():
            self._refuse(clients, "no reply arrived in time")
        self.pending, self.done = {}, True
        return received

    def means(self) -> dict[str, int | float]:
        """Return each metric's mean over the clients' own rows, as ``personal_<metric>``, and ``personal_clients``."""
        return personal_means(self.sums)

    def _refuse(self, clients: Iterable[int], reason: str) -> None:
        for client in clients:
            self.refused[client] = f"evaluation: {reason}"
            _logger.warning("round %d: client %d is left out: evaluation: %s", self.round, client, reason)


def personal_means(by_client: Mapping[int, Sums]) -> dict[str, int | float]:
    """Return each metric's mean over the clients' own rows, as ``personal_<metric>``, and ``personal_clients``.

    A metric that some clients did not report is the mean over those that did.
    """
    sums = [by_client[client] for client in sorted(by_client)]  # any order of replies, one result
    means: dict[str, int | float] = {}
    for name in dict.fromkeys(name for one in sums for name in one if name != "examples"):
        having = [one for one in sums if name in one]
        means[f"personal_{name}"] = sum(one[name] for one in having) / sum(one["examples"] for one in having)
    return {**means, "personal_clients": len(sums)}
