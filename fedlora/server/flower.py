"""A Flower strategy around one of ours: it runs under Flower's own loop in any ServerApp, and under :meth:`start`.

Flower's loop collects all replies of a round before it aggregates, forgets its state, and goes on after failures.
:meth:`FlowerStrategy.start` folds replies as they arrive and drops them (the server's memory does not grow with the
number of clients), continues from a saved state, and stops where too many clients fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerBase
from numpy.typing import NDArray

from fedlora.exchange import ClientReport, Instruction, Tensors
from fedlora.fingerprint import code_fingerprint
from fedlora.methods import proximal_step
from fedlora.server.cohort import Federation, assigned
from fedlora.server.errors import BudgetSpentError, FederationError
from fedlora.server.loop import Observe, run_rounds
from fedlora.server.personal import PersonalEvaluation
from fedlora.server.replies import Replies
from fedlora.server.traffic import ACCUMULATED, Payloads
from fedlora.state import ServerState
from fedlora.strategy import Strategy, cut
from fedlora.wire import from_named_arrays, message_bytes, named_arrays, write_instruction

_logger = logging.getLogger(__name__)


@final
class FlowerStrategy(FlowerBase):
    """One of our strategies as one of Flower's.

    Args:
        strategy: The strategy.
        federation: Its clients.

    Attributes:
        state: What the server holds.
        replies: The last round's; None before the first.
    """

    def __init__(self, strategy: Strategy, federation: Federation) -> None:
        self.strategy = strategy
        self.federation = federation
        self.state = ServerState({})
        self.replies: Replies | None = None
        self.personal: PersonalEvaluation | None = None
        self.payloads = Payloads(strategy, federation.dtype)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort, assign it to the nodes, and address one message to each node.

        Raises:
            ValueError: The arrays are not what the strategy exchanges.
            FederationError: There is no node, or too few clients have budget left.
        """
        self.state = replace(self.state, tensors=from_named_arrays(arrays))
        missing = sorted(set(self.strategy.sent(server_round)) - set(self.state.tensors))
        if missing:
            raise ValueError(
                f"the initial arrays lack {missing[0]} and {len(missing) - 1} more of the exchanged tensors"
            )
        cohort = self.federation.cohort(server_round)
        self._check_budgets(server_round)
        able = [client for client in cohort if client not in self.state.clients.spent]
        nodes = assigned(able, list(grid.get_node_ids()))
        self.replies = Replies(
            server_round, self.strategy, self.federation.dtype, self.federation.weights, self.federation.dp, dict(nodes)
        )
        self._count_down(nodes, server_round)
        return self._messages(MessageType.TRAIN, server_round, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, one after another, and apply the strategy to what they come to.

        Raises:
            FederationError: More clients failed than the threshold allows.
        """
        assert self.replies is not None, "aggregate_train before configure_train"
        own, clients = self.replies, self.state.clients
        try:
            for message in replies:
                own.accept(message)
            own.end()
        finally:  # what was seen of clients stays seen, however the round ends
            self._remember(ledger_heads={**clients.ledger_heads, **own.ledger_heads}, spent=clients.spent | own.spent)
        self._check_budgets(server_round)
        self._check_failures(server_round, own.reports, own.refused, good=own.total.count)
        self._remember(trained=clients.trained | own.used)
        self._apply(server_round, own)
        return named_arrays(self.state.tensors), _metrics(own, self.federation.dp)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate themselves, where they keep tensors that the server cannot evaluate.

        Those are asked that have trained so far: another's personal tensors are still the seed's. Under DP nobody is:
        sums over a client's rows are not covered by its guarantee.
        """
        trained = self.state.clients.trained
        if not self.strategy.has_personal or not trained or self.federation.dp:
            return []
        self.state = replace(self.state, tensors=from_named_arrays(arrays))
        nodes = assigned(sorted(trained), list(grid.get_node_ids()))
        self.personal = PersonalEvaluation(server_round, dict(nodes))
        # A client evaluates what it will start the next round with.
        self._count_down(nodes, server_round + 1)
        return self._messages(MessageType.EVALUATE, server_round + 1, nodes)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return each metric's mean over the clients' own rows, as ``personal_<metric>``; None if none was asked.

        Raises:
            FederationError: More clients failed than the threshold allows.
        """
        personal = self.personal
        if personal is None or personal.done:
            return None
        received = personal.collect(replies)
        if self.replies is not None:
            self.replies.traffic.message_bytes_up += received
        self._check_failures(server_round, personal.asked, personal.refused, good=len(personal.sums))
        return MetricRecord(dict(personal.means()))

    def summary(self) -> None:
        """Log what the strategy exchanges."""
        roles = ", ".join(f"{kind} {role}" for kind, role in self.strategy.all_roles(1).items())
        _logger.info("%s: %s; %d bytes to a client", self.strategy.name, roles, self.payloads.down(1)[0])

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        on_round: Observe | None = None,
        completed: int = 0,
    ) -> Result:
        """Run the rounds.

        Args:
            grid: The way to the nodes.
            initial_arrays: The exchanged tensors before the first round, by name.
            num_rounds: Number of rounds.
            timeout: Seconds that a round waits for its clients.
            train_config: Unused; kept for Flower's signature.
            evaluate_config: Unused; kept for Flower's signature.
            evaluate_fn: Evaluates the server's tensors, before the first round (0) and after each.
            on_round: Called with the round's number and the results so far.
            completed: Rounds that an earlier run of the same federation has completed; :attr:`state` is what it held
                then.

        Returns:
            Flower's result object.

        Raises:
            FederationError: More clients of a round failed than the threshold allows. Where clients have spent their
                privacy budgets after some rounds, the rounds end early instead.
        """
        self.summary()
        return run_rounds(
            self, grid, initial_arrays, num_rounds, timeout, evaluate_fn=evaluate_fn, on_round=on_round, done=completed
        )

    # -- helpers ------------------------------------------------------------------------------------------

    def _apply(self, server_round: int, own: Replies) -> None:
        """Turn the round's updates into the server's new state, in the dtype of its tensors."""
        dtype, strategy = self.federation.dtype, self.strategy
        reduced = own.total.reduced()
        held = self.state.tensors
        reduced = replace(reduced, mean={n: _placed(value.astype(dtype), held[n]) for n, value in reduced.mean.items()})
        ranks = self._ranks()
        state = strategy.apply(self.state, reduced, server_round)
        # A mean of sparse tensors is dense where only one of the clients is not zero.
        rate = self.federation.learning_rate * strategy.local(server_round).learning_rate
        shrunk = proximal_step(state.tensors, strategy.expected(server_round), rate)
        tensors = {name: value.astype(dtype) for name, value in {**state.tensors, **shrunk}.items()}
        self.state = replace(state, tensors=tensors)
        if strategy.accumulated(1):
            history = np.array([*ranks, ranks[-1] + strategy.added_rank(own.used)], dtype=np.float64)
            self.state = replace(self.state, extra={**self.state.extra, ACCUMULATED: history})

    def _ranks(self) -> list[int]:
        """Return the ranks that have been added until the end of each round, of a strategy whose tensors accumulate."""
        return [int(rank) for rank in self.state.extra.get(ACCUMULATED, np.zeros(1))]

    def _remember(self, **changes: Any) -> None:
        self.state = replace(self.state, clients=replace(self.state.clients, **changes))

    def _count_down(self, nodes: Mapping[int, tuple[int, ...]], server_round: int) -> None:
        """Count what clients are sent for a round, and what of it they would lack if they kept what they were sent."""
        received = dict(self.state.clients.received)
        ranks, known = self._ranks(), dict[tuple[int, int | None], tuple[int, int]]()
        for client in (client for clients in nodes.values() for client in clients):
            since = received.get(client, -1)
            rank = self.strategy.setting.ranks[client] if self.strategy.setting.ranks else None
            if (since, rank) not in known:
                known[since, rank] = self.payloads.down(server_round, since, client, ranks)
            if self.replies is not None:
                self.replies.traffic.bytes_down += known[since, rank][0]
                self.replies.traffic.bytes_down_cached += known[since, rank][1]
            received[client] = server_round - 1
        self._remember(received=received)

    def _messages(
        self, message_type: str, server_round: int, nodes: Mapping[int, tuple[int, ...]]
    ) -> Iterator[Message]:
        """Yield one message a node, made when it is asked for."""
        federation, ranks, heads = self.federation, self.strategy.setting.ranks, self.state.clients.ledger_heads
        extra = {name: self.state.extra[name] for name in self.strategy.extra(server_round)}
        for node, clients in nodes.items():
            content = write_instruction(
                Instruction(
                    round=server_round,
                    clients=clients,
                    roles=self.strategy.all_roles(server_round),
                    tensors=self._sent(server_round, clients),
                    weights=federation.weights,
                    reduction=self.strategy.reduction(server_round),
                    local=self.strategy.local(server_round),
                    extra=extra,
                    ranks=tuple(ranks[client] for client in clients) if ranks else (),
                    fingerprint=code_fingerprint()[0],
                    pack=federation.pack,
                    ledger_heads=tuple(heads.get(client, "") for client in clients) if federation.dp else (),
                )
            )
            if self.replies is not None:
                self.replies.traffic.message_bytes_down += message_bytes(content)
            yield Message(content, dst_node_id=node, message_type=message_type, group_id=str(server_round))

    def _sent(self, server_round: int, clients: tuple[int, ...]) -> Tensors:
        """Return the tensors that a node is sent: as much of each as the client with the largest rank holds."""
        ranks = self.strategy.setting.ranks
        widest = max(clients, key=lambda client: ranks[client]) if ranks else None
        accumulated = {name: self.state.tensors[name] for name in self.strategy.accumulated(self._ranks()[-1])}
        return {**cut(self.state.tensors, self.strategy.sent(server_round, widest)), **accumulated}

    def _check_budgets(self, server_round: int) -> None:
        """Stop where more of a round's clients than may fail have spent their privacy budgets."""
        clients = self.federation.cohort(server_round)
        spent = len(self.state.clients.spent & set(clients))
        if spent <= self.federation.failure_threshold * len(clients):
            return
        raise BudgetSpentError(
            f"round {server_round}: {spent} of {len(clients)} clients have spent their privacy budgets, and the others "
            "are too few to go on; the rounds so far stand. A larger privacy.epsilon allows more."
        )

    def _check_failures(
        self, server_round: int, asked: Iterable[int], refused: Mapping[int, str], *, good: int
    ) -> None:
        spent, threshold = self.state.clients.spent, self.federation.failure_threshold
        failed = {client: reason for client, reason in refused.items() if client not in spent}
        sampled_clients = len(set(asked) - spent)
        if good and len(failed) <= threshold * sampled_clients:
            return
        reasons = [f"client {client}: {reason}" for client, reason in sorted(failed.items())[:3]]
        raise FederationError(
            f"round {server_round}: {len(failed)} of {sampled_clients} clients failed, more than "
            f"federation.failure-threshold = {threshold} allows. {'; '.join(reasons)}"
            f"{'; ...' if len(failed) > 3 else ''}"
        )


def _placed(value: NDArray[np.floating], held: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return a mean at the server's rank; ranks that no client of the round holds stay what the server held."""
    if value.shape == held.shape:
        return value
    whole = held.copy()
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole


def _metrics(own: Replies, dp: bool) -> MetricRecord:
    """Return a round's numbers; the mean loss by client, not by arrival: it must not depend on the order of replies."""
    losses = {}
    if not dp:
        reports: list[ClientReport] = [own.reports[client] for client in sorted(own.used)]
        losses["train_loss"] = float(np.mean([report.metrics["loss"] for report in reports]))
    traffic = vars(own.traffic)
    return MetricRecord({**losses, "clients_ok": own.total.count, "clients_refused": len(own.refused), **traffic})
