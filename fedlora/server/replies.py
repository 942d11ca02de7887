"""The replies of a round: read, checked, folded as they arrive, or refused by client and reason."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Outcome, Tensors
from fedlora.methods import initial_tensors
from fedlora.reduce import REDUCTIONS, Expected, Reduction
from fedlora.seeded import Seeded
from fedlora.server.cohort import Federation
from fedlora.server.nodes import Nodes, SimulationNodes
from fedlora.server.traffic import Payloads, Traffic
from fedlora.shapes import chosen, cut
from fedlora.strategy import Strategy
from fedlora.wire import message_bytes, read_reduction, read_reports

_logger = logging.getLogger(__name__)


@dataclass
class Replies:
    """What a round has brought so far; a reply is folded and dropped.

    The server's memory therefore does not grow with the number of clients, unless the strategy's reduction keeps their
    updates apart.

    Attributes:
        round: The round.
        strategy: The strategy: what a reply must hold.
        federation: The clients: how they count, and what they may report.
        pending: Clients whose reply has not arrived, by the node that stands for them.
        nodes: Which node stands for whom, and what a client may claim.
        sent: What clients were sent, and start with of experts, by client, where their change is bounded.
        total: The updates, reduced.
        reports: What each client reported.
        refused: Why a client is left out, by client.
        traffic: The round's bytes.
    """

    round: int
    strategy: Strategy
    federation: Federation
    pending: dict[int, tuple[int, ...]]
    nodes: Nodes = field(default_factory=SimulationNodes)
    sent: Mapping[int, Tensors] = field(default_factory=dict)
    reports: dict[int, ClientReport] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    total: Reduction = field(init=False)
    _by_rank: dict[int | None, tuple[Expected, int]] = field(init=False, default_factory=dict)

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
        node = message.metadata.src_node_id
        if node not in self.pending:
            _logger.warning("round %d: a reply of node %d, of which none is awaited, is ignored", self.round, node)
            return
        clients = self.pending.pop(node)
        try:
            reports = reports_of(message, clients)
        except WireError as error:
            self._fail(clients, str(error))
            return
        self.traffic.message_bytes_up += message_bytes(message.content)
        self.reports |= {report.client: self._covered(report) for report in reports}
        good = [report for report in reports if report.outcome is Outcome.OK]
        for report in reports:
            if report.outcome is not Outcome.OK:
                self.refuse([report.client], report.reason)
            if report.outcome is Outcome.NOT_JOINED:
                self.nodes.left(report.client, report.reason)
        try:
            self._check_reports(reports, good)
            if good:
                self._fold(message.content, good)
        except (WireError, OverflowError) as error:
            self._fail([report.client for report in good], str(error))

    def end(self) -> None:
        """Refuse the clients whose reply has not arrived."""
        for clients in self.pending.values():
            self._fail(clients, "no reply arrived in time")
        self.pending = {}

    def refuse(self, clients: Iterable[int], reason: str) -> None:
        """Leave clients out of the round, and log it."""
        for client in clients:
            self.refused[client] = reason
            _logger.warning("round %d: %s is left out: %s", self.round, self.nodes.name(client), reason)

    def metrics(self, late: int | None = None) -> MetricRecord:
        """Return the round's numbers; the mean loss by client, not by arrival: any order of replies gives its bits.

        Args:
            late: Replies of deployed sites that have come too late so far.
        """
        losses = {}
        if not self.federation.dp:
            used = [self.reports[client] for client in sorted(self.used)]
            losses["train_loss"] = float(np.mean([report.metrics["loss"] for report in used]))
        counts = {"clients_ok": self.total.count, "clients_refused": len(self.refused)}
        counts |= {} if late is None else {"late_replies": late}
        return MetricRecord({**losses, **counts, **vars(self.traffic)})

    def _fail(self, clients: Iterable[int], reason: str) -> None:
        """Refuse clients and forget what they reported, but for the ledger entries that they have paid with."""
        for client in clients:
            head = self.reports[client].ledger_head if client in self.reports else ""
            self.reports[client] = ClientReport(client, Outcome.FAILED, reason, ledger_head=head)
            self.refuse([client], reason)

    def _check_reports(self, reports: Sequence[ClientReport], good: Sequence[ClientReport]) -> None:
        if self.federation.dp:
            if any(report.examples or report.metrics for report in reports):
                raise WireError("it reports numbers of its rows, which a client under DP must not")
            if not all(report.ledger_head for report in good):
                raise WireError("it holds an update that no ledger entry pays for")
        elif any(report.examples < 1 or not np.isfinite(report.metrics.get("loss", np.nan)) for report in good):
            raise WireError("it reports no training examples, or no finite loss")
        for report in good:
            most = self.nodes.rows(report.client)
            if most is not None and report.examples > most:
                raise WireError(f"it claims {report.examples} rows, and declared {most} when it joined")

    def _covered(self, report: ClientReport) -> ClientReport:
        """Return a report as it may be kept: under DP without numbers of rows, whether or not it should hold any."""
        return replace(report, examples=0, metrics={}) if self.federation.dp else report

    def _fold(self, content: RecordDict, good: Sequence[ClientReport]) -> None:
        """Check a reply's updates and add them to the round's."""
        expected = {report.client: self._expected(report) for report in good}
        self.traffic.bytes_up += sum(self._by_rank[self.strategy.setting.rank(client)][1] for client in expected)
        reduction = read_reduction(content, self.total.name)
        if reduction is None:
            raise WireError("it holds no update")
        reduction.check(expected, self.federation.dtype)
        for client, tensors in reduction.each(list(expected)):
            self._check_change(client, tensors)
        self.total.merge(reduction)

    def _check_change(self, client: int, tensors: Tensors) -> None:
        """Refuse an update that changes what its client was sent by more than one client may."""
        most, sent = self.federation.max_change, self.sent.get(client)
        if not most or sent is None:
            return
        squares, modules = 0.0, self.strategy.modules(self.round, client)
        axes = {name: spec.rank_axis for name, spec in self.strategy.setting.specs.items()}
        for name, value in tensors.items():
            start = np.asarray(sent[name] if name in sent else self._fresh(name))
            start = cut(chosen(start, axes[name], modules), value.shape)
            squares += float(np.square(value.astype(np.float64) - start).sum())
        if not squares <= most**2:
            raise WireError(
                f"it changes the tensors by {squares**0.5:.4g} in L2 norm, more than federation.max-change = {most:g}"
            )

    def _fresh(self, name: str) -> NDArray[np.floating]:
        """Return what clients start a tensor at that is drawn anew for the round, and sent and never received."""
        own = {name: self.strategy.setting.specs[name]}
        return initial_tensors(own, Seeded(self.federation.seed), self.federation.dtype, self.round)[name]

    def _expected(self, report: ClientReport) -> Expected:
        """Return what a client's update must hold."""
        rank, strategy = self.strategy.setting.rank(report.client), self.strategy
        if rank not in self._by_rank:
            whole = Expected(strategy.expected(self.round, report.client), strategy.extra(self.round), weight=1)
            self._by_rank[rank] = whole, Payloads(strategy, self.federation.dtype).up(self.round, report.client)
        return replace(self._by_rank[rank][0], weight=report.examples if self.federation.weights == "examples" else 1)


def reports_of(message: Message, clients: Sequence[int]) -> list[ClientReport]:
    """Return a node's reports about ``clients``, ascending, in whatever order it names them.

    Raises:
        WireError: The message holds none, or about others.
    """
    if message.has_error():
        raise WireError(f"its node failed: {message.error.reason}")
    reports = read_reports(message.content)
    named = [report.client for report in reports]
    if sorted(named) != list(clients):
        raise WireError(f"it answers for clients {named[:5]}, not {list(clients[:5])}")
    return reports
