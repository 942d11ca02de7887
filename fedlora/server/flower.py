"""A Flower strategy around one of ours: it runs under Flower's own loop in any ServerApp, and under :meth:`start`.

Flower's loop collects all replies of a round before it aggregates, and cannot continue a run.
:meth:`FlowerStrategy.start` folds replies as they arrive and drops them (the server's memory does not grow with the
number of clients), continues from a saved state, and ends a run early when privacy budgets are spent. Both stop where
too many clients fail.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import final

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerBase

from fedlora.server.cohort import Federation
from fedlora.server.core import Core
from fedlora.server.loop import Observe, run_rounds
from fedlora.server.mail import Mail
from fedlora.server.nodes import Nodes, SimulationNodes
from fedlora.server.personal import PersonalEvaluation
from fedlora.server.replies import Replies
from fedlora.server.traffic import Payloads, Ranks
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import from_named_arrays, message_bytes, named_arrays, write_instruction

Payload = Callable[[int, int, int, Ranks], tuple[int, int]]
"""Bytes that a client is sent, and lacks, from (round, last round received, client, added ranks by round)."""
_logger = logging.getLogger(__name__)


@final
class FlowerStrategy(FlowerBase):
    """One of our strategies as one of Flower's.

    Args:
        strategy: The strategy.
        federation: Its clients.
        state: What the server holds before the first round, ``strategy.initial(...)``, or held after the last one.
        nodes: Which SuperNode stands for whom; None: any of a simulation's.

    Attributes:
        core: The strategy between two rounds, with the server's state.
        replies: The last round's; None before the first.
        personal: The last evaluation by clients of their own models; None before the first.
    """

    def __init__(
        self,
        strategy: Strategy,
        federation: Federation,
        state: ServerState | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.nodes = SimulationNodes() if nodes is None else nodes
        self._ttl: float | None = None
        self._mail: Mail | None = None
        self.federation = federation
        self.core = Core(strategy, federation, ServerState({}) if state is None else state)
        self.replies: Replies | None = None
        self.personal: PersonalEvaluation | None = None

    @property
    def strategy(self) -> Strategy:
        """The strategy, at the ranks that clients hold now."""
        return self.core.strategy

    @property
    def payloads(self) -> Payloads:
        """The bytes of a client's messages, at the ranks that clients hold now."""
        return Payloads(self.strategy, self.federation.dtype)

    @property
    def state(self) -> ServerState:
        """What the server holds."""
        return self.core.state

    @state.setter
    def state(self, state: ServerState) -> None:
        self.core.state = state

    @property
    def arrays(self) -> ArrayRecord:
        """The server's tensors as Flower passes them around."""
        return named_arrays(self.state.tensors)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample the cohort, assign it to the nodes, and address one message to each node.

        Raises:
            ValueError: The arrays are not what the strategy exchanges.
            FederationError: There is no node, or too few clients have budget left.
        """
        self._take(arrays, server_round)
        federation = self.federation
        cohort = federation.cohort(server_round)
        federation.check_budgets(server_round, self.state.clients.spent)
        able = [client for client in cohort if client not in self.state.clients.spent]
        nodes = self.nodes.assign(grid, able, server_round)
        sent = (
            {clients[0]: self.core.start(server_round, clients[0]) for clients in nodes.values()}
            if federation.max_change
            else {}
        )
        self.replies = Replies(server_round, self.strategy, federation, dict(nodes), self.nodes, sent)
        self._count_down(nodes, server_round, self.payloads.down)
        return self._messages(MessageType.TRAIN, server_round, nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, one after another, and apply the strategy to what they come to.

        Raises:
            FederationError: More clients failed than the threshold allows.
        """
        assert self.replies is not None, "aggregate_train before configure_train"
        federation, own, clients = self.federation, self.replies, self.state.clients
        try:
            for message in replies:
                own.accept(message)
            own.end()
        finally:  # what was seen of clients stays seen, however the round ends
            self.core.remember(
                ledger_heads={**clients.ledger_heads, **own.ledger_heads}, spent=clients.spent | own.spent
            )
        federation.check_budgets(server_round, self.state.clients.spent)
        federation.check_failures(
            server_round, own.reports, own.refused, self.state.clients.spent, good=own.total.count
        )
        self.core.apply(server_round, own.total, own.used)
        late = self._mail.late if self._mail is not None and federation.deployed else None
        return self.arrays, own.metrics(late)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate themselves, where they keep tensors that the server cannot evaluate.

        So they are where the server has no rows of its own. Those are asked that have trained so far: another's
        personal tensors are still the seed's. Under DP nobody is: sums over a client's rows are not covered by its
        guarantee.
        """
        trained = self.state.clients.trained
        asked = self.strategy.has_personal or self.federation.measured_by_sites
        if not asked or not trained or self.federation.dp:
            return []
        self._take(arrays, server_round + 1)
        nodes = self.nodes.assign(grid, sorted(trained), server_round)
        self.personal = PersonalEvaluation(server_round, dict(nodes))
        # A client evaluates what it will start the next round with.
        self._count_down(nodes, server_round + 1, self.payloads.evaluation)
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
        self.federation.check_failures(
            server_round, personal.asked, personal.refused, self.state.clients.spent, good=len(personal.sums)
        )
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
        federation = self.federation
        mail = Mail(grid, timeout, federation.grace, federation.deployed, name=self.nodes.node_name)
        self._mail = mail
        if federation.deployed:
            self._ttl = timeout  # a node that comes back later must not train for a round that has closed
        return run_rounds(
            self,
            mail,
            initial_arrays,
            num_rounds,
            enough=self._enough,
            evaluate_fn=evaluate_fn,
            on_round=on_round,
            done=completed,
        )

    # -- helpers ------------------------------------------------------------------------------------------

    def _enough(self) -> bool:
        """Whether the round has as many updates as it needs to close."""
        least = self.federation.min_replies
        return least > 0 and self.replies is not None and self.replies.total.count >= least

    def _take(self, arrays: ArrayRecord, server_round: int) -> None:
        """Hold what the loop passes on.

        Raises:
            ValueError: It lacks something that the round sends.
        """
        self.state = replace(self.state, tensors=from_named_arrays(arrays))
        sent = {*self.strategy.sent(server_round), *self.strategy.accumulated(self.core.ranks[-1])}
        for lacks, held, wanted in (
            ("arrays lack", self.state.tensors, sent),
            ("state lacks", self.state.extra, set(self.strategy.extra(server_round))),
        ):
            lacking = sorted(wanted - set(held))
            if lacking:
                raise ValueError(
                    f"the initial {lacks} {lacking[0]} and {len(lacking) - 1} more of what the strategy exchanges; "
                    "start with FlowerStrategy(strategy, federation, strategy.initial(...)).arrays"
                )

    def _count_down(self, nodes: Mapping[int, tuple[int, ...]], server_round: int, payload: Payload) -> None:
        """Count what clients are sent for a round, and what of it they would lack if they kept what they were sent."""
        received = dict(self.state.clients.received)
        ranks, setting = self.core.ranks, self.strategy.setting
        counted = dict[tuple[int, int | None], tuple[int, int]]()
        for client in (client for clients in nodes.values() for client in clients):
            key = received.get(client, -1), setting.rank(client)
            if key not in counted:
                counted[key] = payload(server_round, key[0], client, ranks)
            if self.replies is not None:
                self.replies.traffic.bytes_down += counted[key][0]
                self.replies.traffic.bytes_down_cached += counted[key][1]
            received[client] = server_round - 1
        self.core.remember(received=received)

    def _messages(
        self, message_type: str, server_round: int, nodes: Mapping[int, tuple[int, ...]]
    ) -> Iterator[Message]:
        """Yield one message a node, made when it is asked for."""
        train = message_type == MessageType.TRAIN
        for node, clients in nodes.items():
            instruction = self.core.instruction(server_round, clients, train=train, job=self.nodes.job(clients))
            content = write_instruction(instruction)
            if self.replies is not None:
                self.replies.traffic.message_bytes_down += message_bytes(content)
            yield Message(
                content, dst_node_id=node, message_type=message_type, ttl=self._ttl, group_id=str(server_round)
            )
