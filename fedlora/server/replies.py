"""The replies of a round: read, checked, folded as they arrive, or refused by client and reason."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Outcome, Weights
from fedlora.reduce import REDUCTIONS, Expected, Reduction
from fedlora.server.traffic import Payloads, Traffic
from fedlora.strategy import Strategy
from fedlora.wire import Reply, message_bytes

_logger = logging.getLogger(__name__)


@dataclass
class Replies:
    """What a round has brought so far; a reply is folded and dropped, so memory does not grow with the clients.

    Attributes:
        round: The round.
        strategy: The strategy: what a reply must hold.
        dtype: Of the tensors.
        weights: Whether a client counts by its examples, or all alike.
        dp: Whether clients train under DP, and so report nothing of their rows.
        pending: Clients not heard of yet, by the node that stands for them.
        total: The updates, reduced.
        reports: What each client reported.
        refused: Why a client is left out, by client.
        traffic: The round's bytes.
    """

    round: int
    strategy: Strategy
    dtype: str
    weights: Weights
    dp: bool
    pending: dict[int, tuple[int, ...]]
    reports: dict[int, ClientReport] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    total: Reduction = field(init=False)

    def __post_init__(self) -> None:
        """Start with no update."""
        self.total = REDUCTIONS[self.strategy.reduction(self.round)]()

    @property
    def used(self) -> set[int]:
        """The clients whose updates are in the total."""
        return set(self.reports) - set(self.refused)

    @property
    def ledger_heads(self) -> dict[int, str]:
        """The hash of the last ledger entry of each client that reported one, refused updates included.

        An update that cannot be used has left its client all the same.
        """
        return {client: report.ledger_head for client, report in self.reports.items() if report.ledger_head}

    @property
    def spent(self) -> set[int]:
        """The clients that reported that their privacy budget is spent."""
        return {client for client, report in self.reports.items() if report.outcome is Outcome.BUDGET_SPENT}

    def accept(self, message: Message) -> None:
        """Fold one reply, or refuse it with its clients' names."""
        clients = self.pending.pop(message.metadata.src_node_id, ())
        try:
            reply = read(message, clients, self.total.name)
            self.reports |= {report.client: report for report in reply.reports}
            self.traffic.message_bytes_up += message_bytes(message.content)
            good = [report for report in reply.reports if report.outcome is Outcome.OK]
            payloads = Payloads(self.strategy, self.dtype)
            self.traffic.bytes_up += sum(payloads.up(self.round, report.client) for report in good)
            if good:
                self._fold(reply.reduction, good)
        except (WireError, OverflowError) as error:
            for client in clients:
                head = self.reports[client].ledger_head if client in self.reports else ""
                self.reports[client] = ClientReport(client, Outcome.FAILED, str(error), ledger_head=head)
            self.refuse(clients, str(error))
            return
        for report in reply.reports:
            if report.outcome is not Outcome.OK:
                self.refuse([report.client], report.reason)

    def end(self) -> None:
        """Refuse the clients that were not heard of."""
        for clients in self.pending.values():
            reason = "no reply arrived in time"
            self.reports |= {client: ClientReport.failed(client, reason) for client in clients}
            self.refuse(clients, reason)
        self.pending = {}

    def refuse(self, clients: Iterable[int], reason: str) -> None:
        """Leave clients out of the round, and log it."""
        for client in clients:
            self.refused[client] = reason
            _logger.warning("round %d: client %d is left out: %s", self.round, client, reason)

    def _fold(self, reduction: Reduction | None, good: Sequence[ClientReport]) -> None:
        """Check a reply's updates and add them to the round's."""
        if self.dp:
            if any(report.examples or report.metrics for report in good):
                raise WireError("it reports numbers of its rows, which a client under DP must not")
            if not all(report.ledger_head for report in good):
                raise WireError("it holds an update that no ledger entry pays for")
        elif any(report.examples < 1 or not np.isfinite(report.metrics.get("loss", np.nan)) for report in good):
            raise WireError("it reports no training examples, or no finite loss")
        if reduction is None:
            raise WireError("it holds no update")
        reduction.check(self._expected(good), self.dtype)
        self.total.merge(reduction)

    def _expected(self, good: Sequence[ClientReport]) -> Mapping[int, Expected]:
        extra = self.strategy.extra(self.round)
        return {
            report.client: Expected(
                tensors=self.strategy.expected(self.round, report.client),
                extra=extra,
                weight=report.examples if self.weights == "examples" else 1,
            )
            for report in good
        }


def read(message: Message, clients: Sequence[int], reduction: str = "mean") -> Reply:
    """Return a node's reply about ``clients``, ascending, in whatever order it names them.

    Raises:
        WireError: It is none.
    """
    if message.has_error():
        raise WireError(f"its node failed: {message.error.reason}")
    reply = Reply.from_content(message.content, reduction)
    named = [report.client for report in reply.reports]
    if sorted(named) != list(clients):
        raise WireError(f"it answers for clients {named[:5]}, not {list(clients[:5])}")
    return reply
