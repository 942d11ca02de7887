"""What all strategies share: the round loop, sampling, the streaming fold of replies.

A strategy is a real :class:`flwr.serverapp.strategy.Strategy`: its four hooks work under Flower's own loop in
any ServerApp. :meth:`RoleStrategy.start` adds what that loop lacks: replies are folded as they arrive and
dropped (the server's memory does not grow with the number of clients), a reply that is wrong is refused
and named, and too many of them stop the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.exact_sum import ExactSum
from fedlora.fingerprint import code_fingerprint
from fedlora.methods import TensorSpec, soft_threshold, zero_kinds
from fedlora.roles import Role, Roles, with_role
from fedlora.seeded import Seeded
from fedlora.wire import (
    BUDGET_SPENT,
    Instruction,
    Reply,
    WireError,
    check_tensors,
    from_named_arrays,
    message_bytes,
    named_arrays,
    payload_bytes,
)

Tensors = Mapping[str, NDArray[np.floating]]
_POLL_S = 0.1
_logger = logging.getLogger(__name__)


class FederationError(RuntimeError):
    """Too many clients failed for the round to mean anything."""


class BudgetSpentError(FederationError):
    """Too few clients have privacy budget left for another round."""


@dataclass(frozen=True)
class Setting:
    """What a strategy needs to know of the run.

    Attributes:
        specs: The method's tensors.
        num_clients: Number of clients.
        seed: Seed of the sampling.
        clients_per_round: Clients sampled each round; 0: all.
        weights: Whether a client counts by its examples, or all count alike.
        head: Role of the head.
        failure_threshold: Share of a round's clients that may fail.
        dtype: Of the tensors.
        pack: Clients trained together; 0: automatic.
        frozen: Kinds that stay as the seed gives them, whatever the strategy does with them.
        learning_rate: Of local training: the size of the server's proximal step on tensors that have an L1 weight.
        dp: Whether clients train under DP, and so tell nothing but their updates.
    """

    specs: Mapping[str, TensorSpec]
    num_clients: int
    seed: int = 0
    clients_per_round: int = 0
    weights: Literal["examples", "equal"] = "examples"
    head: Role = Role.SHARED
    failure_threshold: float = 0.5
    dtype: str = "float32"
    pack: int = 0
    frozen: frozenset[str] = frozenset()
    learning_rate: float = 0.0
    dp: bool = False


@dataclass
class Tally:
    """What a round has brought so far.

    Attributes:
        round: The round.
        pending: Clients not heard of yet, by the node that stands for them.
        expected: The tensors that a reply must hold.
        total: The exact sum of the updates.
        facts: One record for each client that was heard of.
        refused: Why, by client.
        bytes_up: Payload that clients sent, each counted alone.
        bytes_down: Payload that was sent to clients, each counted alone.
        bytes_down_cached: The part of it that clients would need who keep what they were sent before.
        message_bytes_up: What Flower carried to the server.
        message_bytes_down: What Flower carried to the nodes.
    """

    round: int
    pending: dict[int, tuple[int, ...]]
    expected: Mapping[str, TensorSpec]
    total: ExactSum = field(default_factory=ExactSum)
    facts: dict[int, dict[str, Any]] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_down_cached: int = 0
    message_bytes_up: int = 0
    message_bytes_down: int = 0

    def refuse(self, clients: Iterable[int], reason: str) -> None:
        """Leave clients out of the round, and say so."""
        for client in clients:
            self.refused[client] = reason
            _logger.warning("round %d: client %d is left out: %s", self.round, client, reason)


class RoleStrategy(Strategy):
    """A strategy that is told by its roles and its rule.

    Args:
        setting: What it needs to know of the run.
    """

    name: ClassVar[str]
    """Its name in ``strategy.name``."""
    methods: ClassVar[tuple[str, ...]]
    """Methods it works with; the first is what ``method.name = 'auto'`` stands for."""
    exact: ClassVar[bool | None]
    """Whether the server's mean of tensors is the mean of the clients' updates B A; None: it holds no whole update."""
    personal: ClassVar[bool] = False
    """Whether clients keep trained tensors of their own, so that there is no global model to measure."""
    ragged: ClassVar[bool] = False
    """Whether clients may have ranks of their own (``method.ranks``)."""
    period: ClassVar[int] = 1
    """Rounds after which the roles repeat."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.tally: Tally | None = None
        self._asked: dict[int, tuple[int, ...]] = {}
        self.have_trained: set[int] = set()
        self.knows: dict[int, int] = {}
        """The last round whose outcome a client was sent, by client."""
        self.ledger_heads: dict[int, str] = {}
        """Under DP the hash of the last ledger entry that a client told, by client."""
        self.spent: set[int] = set()
        """Clients whose privacy budget is spent."""
        self.personal_sums: dict[int, dict[str, float]] = {}
        self._server: dict[str, NDArray[np.floating]] = {}
        self._check_gradients()

    # -- what a strategy is -------------------------------------------------------------------------------

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return the role of each kind of the method's tensors in a round; by default all are shared.

        The head's comes from the setting, unless a strategy names it here, too.
        """
        return dict.fromkeys(kinds, Role.SHARED)

    def initial(self, seeded: Tensors) -> Tensors:
        """Return what the server holds before the first round, given what the seed gives."""
        return {name: seeded[name] for name in self.exchanged(1)}

    def changed(self, server_round: int) -> set[str]:
        """Return the kinds of exchanged tensors that the server changes after a round.

        Those that are shared in it, unless :meth:`combine` changes others. After round 0: those that do not start as
        the seed gives them.
        """
        return {kind for kind, role in self.all_roles(server_round).items() if server_round and role is Role.SHARED}

    def lacking(self, server_round: int, known: int) -> dict[str, TensorSpec]:
        """Return the tensors exchanged in a round that a client lacks who has kept what it was sent before.

        Args:
            server_round: The round.
            known: The last round whose outcome the client was sent; 0: what the server started with; -1: nothing, so it
                has what the seed gives.
        """
        since = max(known + 1, server_round - self.period)  # what a whole cycle changes is all that ever changes
        kinds = set().union(*(self.changed(number) for number in range(since, server_round)))
        if known < 0:
            kinds |= self.changed(0)
        return {name: spec for name, spec in self.exchanged(server_round).items() if spec.kind in kinds}

    def bytes_per_round(self, dtype: str) -> tuple[float, float, float]:
        """Return the bytes of a client in a round: up, down, and down for one that keeps what it was sent.

        Means over a cycle of rounds after the first, for a client that takes part in all of them. To evaluate itself a
        client is sent the tensors once more, which is not counted here.
        """
        sums = [
            (
                payload_bytes(self.exchanged(number, Role.SHARED), dtype),
                payload_bytes(self.exchanged(number), dtype),
                payload_bytes(self.lacking(number, number - 2), dtype),
            )
            for number in range(self.period + 1, 2 * self.period + 1)
        ]
        up, down, cached = (sum(column) / len(sums) for column in zip(*sums, strict=True))
        return up, down, cached

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a configuration in which the strategy would not be what it says.

        Raises:
            ValueError: What is wrong, with the cure.
        """

    def combine(self, server: Tensors, mean: Tensors, server_round: int) -> Tensors:
        """Return the server's new tensors, given the clients' mean; by default the mean itself."""
        return {**server, **mean}

    def roles_in_turn(self) -> dict[str, list[Role]]:
        """Return the roles of each kind in the rounds of a cycle."""
        rounds = [self.all_roles(number) for number in range(1, self.period + 1)]
        return {kind: [roles[kind] for roles in rounds] for kind in rounds[0]}

    @property
    def trained_kinds(self) -> set[str]:
        """The kinds that clients train in some round."""
        return {kind for kind, roles in self.roles_in_turn().items() if {Role.SHARED, Role.PERSONAL} & set(roles)}

    @property
    def has_personal(self) -> bool:
        """Whether clients keep trained tensors in this setting: the strategy's private ones, or the head."""
        return Role.PERSONAL in self.all_roles(1).values()

    # -- rounds -------------------------------------------------------------------------------------------

    def all_roles(self, server_round: int) -> dict[str, Role]:
        """Return the role of every kind, head included."""
        kinds = list(dict.fromkeys(spec.kind for spec in self.setting.specs.values()))
        roles = {"head": self.setting.head, **self.roles([kind for kind in kinds if kind != "head"], server_round)}
        return {kind: Role.FROZEN if kind in self.setting.frozen else roles[kind] for kind in kinds}

    def exchanged(self, server_round: int, *wanted: Role) -> dict[str, TensorSpec]:
        """Return the tensors that cross the wire in a round, or those with the ``wanted`` roles."""
        return with_role(self.setting.specs, self.all_roles(server_round), *(wanted or (Role.SHARED, Role.BROADCAST)))

    def sample(self, server_round: int) -> list[int]:
        """Return the round's clients, ascending; they depend on the seed and the round alone."""
        return sampled(server_round, self.setting.seed, self.setting.num_clients, self.setting.clients_per_round)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients, deal them to the nodes, and address one message to each node."""
        self._server = from_named_arrays(arrays)
        sent = self.exchanged(server_round)
        missing = sorted(set(sent) - set(self._server))
        if missing:
            raise ValueError(
                f"the initial arrays lack {missing[0]} and {len(missing) - 1} more of the exchanged tensors"
            )
        clients = self.sample(server_round)
        self._check_budgets(server_round)
        dealt = deal([client for client in clients if client not in self.spent], list(grid.get_node_ids()))
        self.tally = Tally(server_round, dealt, self.exchanged(server_round, Role.SHARED))
        self._count_down(self.tally, dealt, server_round)
        return self._messages(MessageType.TRAIN, server_round, {name: self._server[name] for name in sent}, dealt)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies, one after another, and combine their mean with what the server holds.

        Raises:
            FederationError: More clients failed than the threshold allows.
        """
        assert self.tally is not None, "aggregate_train before configure_train"
        tally = self.tally
        for reply in replies:
            self._accept(tally, reply)
        for clients in tally.pending.values():
            tally.facts |= dict.fromkeys(clients, _NO_FACTS)
            tally.refuse(clients, "no reply arrived in time")
        self._check_budgets(server_round)
        self._check_failures(tally, len(tally.facts.keys() - self.spent), good=tally.total.count)
        self.have_trained |= tally.facts.keys() - tally.refused.keys()
        mean = {name: value.astype(self.setting.dtype) for name, value in tally.total.mean().items()}
        combined = self.combine(self._server, mean, server_round)
        # A mean of sparse tensors is dense where only one of the clients is not zero.
        l1 = {name: spec.l1 for name, spec in tally.expected.items() if spec.l1}
        sparse = {name: soft_threshold(combined[name], self.setting.learning_rate * l1[name]) for name in l1}
        self._server = {name: value.astype(self.setting.dtype) for name, value in {**combined, **sparse}.items()}
        # By client, not by arrival: this mean, too, must not depend on the order of replies.
        told = {}
        if not self.setting.dp:
            losses = [fact["loss"] for client, fact in sorted(tally.facts.items()) if client not in tally.refused]
            told["train_loss"] = float(np.mean(losses))
        metrics = MetricRecord(
            {
                **told,
                "clients_ok": tally.total.count,
                "clients_refused": len(tally.refused),
                "bytes_up": tally.bytes_up,
                "bytes_down": tally.bytes_down,
                "bytes_down_cached": tally.bytes_down_cached,
                "message_bytes_up": tally.message_bytes_up,
                "message_bytes_down": tally.message_bytes_down,
            }
        )
        return named_arrays(self._server), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask clients to evaluate themselves, where they keep tensors that the server cannot evaluate.

        Those are asked that have trained so far: another's private tensors are still the seed's. Under DP nobody is:
        sums over a client's rows are not covered by its guarantee.
        """
        if not self.has_personal or not self.have_trained or self.setting.dp:
            return []
        server = from_named_arrays(arrays)
        sent = {name: server[name] for name in self.exchanged(server_round)}
        self._asked = deal(sorted(self.have_trained), list(grid.get_node_ids()))
        if self.tally is not None:
            self._count_down(self.tally, self._asked, server_round + 1)
        # A client evaluates what it will start the next round with.
        return self._messages(MessageType.EVALUATE, server_round + 1, sent, self._asked)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return each metric's mean over the clients' own rows, as ``personal_<metric>``; None if none was asked.

        Raises:
            FederationError: More clients failed than the threshold allows.
        """
        asked, self._asked = self._asked, {}
        if not asked:
            return None
        tally = Tally(server_round, dict(asked), {})
        self.personal_sums = {}
        for message in replies:
            clients = tally.pending.pop(message.metadata.src_node_id, ())
            try:
                reply = _read(message, clients)
            except WireError as error:
                tally.refuse(clients, f"evaluation: {error}")
                continue
            if self.tally is not None:
                self.tally.message_bytes_up += message_bytes(message.content)
            for place, client in enumerate(reply.clients):
                values = {name: column[place] for name, column in reply.metrics.items()}
                if reply.errors[place] or reply.examples[place] < 1 or not np.isfinite(list(values.values())).all():
                    tally.refuse([client], f"evaluation: {reply.errors[place] or 'not a finite number a row'}")
                    continue
                self.personal_sums[client] = {"examples": reply.examples[place], **values}
        for clients in tally.pending.values():
            tally.refuse(clients, "evaluation: no reply arrived in time")
        total = sum(len(clients) for clients in asked.values())
        self._check_failures(tally, total, good=total - len(tally.refused))
        return MetricRecord(dict(self.personal_means()))

    def personal_means(self) -> dict[str, int | float | list[int] | list[float]]:
        """Return each metric's mean over the clients' own rows, as ``personal_<metric>``, and ``personal_clients``."""
        sums = [self.personal_sums[client] for client in sorted(self.personal_sums)]  # any order of replies, one result
        examples = sum(one["examples"] for one in sums)
        names = [name for name in sums[0] if name != "examples"]
        means = {f"personal_{name}": sum(one[name] for one in sums) / examples for name in names}
        return {**means, "personal_clients": len(sums)}

    def summary(self) -> None:
        """Log what the strategy exchanges."""
        roles = self.all_roles(1)
        sent = payload_bytes(self.exchanged(1), self.setting.dtype)
        _logger.info("%s: %s; %d bytes to a client", self.name, ", ".join(f"{k} {r}" for k, r in roles.items()), sent)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        on_round: Callable[[int, ArrayRecord, Result], None] | None = None,
        completed: int = 0,
    ) -> Result:
        """Run the rounds.

        Args:
            grid: The way to the nodes.
            initial_arrays: The shared and broadcast tensors before the first round, by name.
            num_rounds: Number of rounds.
            timeout: Seconds that a round waits for its clients.
            train_config: Unused; kept for Flower's signature.
            evaluate_config: Unused; kept for Flower's signature.
            evaluate_fn: Evaluates the server's tensors, before the first round (0) and after each.
            on_round: Called with the round's number, the server's tensors and the results so far.
            completed: Rounds that an earlier run of the same federation has completed; ``initial_arrays`` are what
                it held then.

        Returns:
            Flower's result object.

        Raises:
            FederationError: More clients of a round failed than the threshold allows. Where clients have spent their
                privacy budgets after some rounds, the rounds end early instead.
        """
        train_config = train_config or ConfigRecord()
        evaluate_config = evaluate_config or ConfigRecord()
        result = Result()
        result.arrays = initial_arrays
        self.summary()

        def ask(server_round: int, arrays: ArrayRecord) -> None:
            questions = list(self.configure_evaluate(server_round, arrays, evaluate_config, grid))
            personal = self.aggregate_evaluate(server_round, arriving(grid, questions, timeout)) if questions else None
            if personal is not None:
                result.evaluate_metrics_clientapp[server_round] = personal

        if 0 < num_rounds <= completed:
            ask(completed, initial_arrays)  # what clients said after the last round is not in a checkpoint
        for server_round in range(completed + 1 if completed else 0, num_rounds + 1):
            if server_round:
                try:
                    instructions = self.configure_train(server_round, result.arrays, train_config, grid)
                    arrays, metrics = self.aggregate_train(server_round, arriving(grid, instructions, timeout))
                except BudgetSpentError as error:
                    if server_round == 1:
                        raise  # nothing was trained
                    _logger.warning("%s", error)
                    break
                assert arrays is not None, "a round without a result raises"
                assert metrics is not None, "a round without a result raises"
                result.arrays = arrays
                result.train_metrics_clientapp[server_round] = metrics
                ask(server_round, arrays)
            if evaluate_fn is not None:
                evaluated = evaluate_fn(server_round, result.arrays)
                if evaluated is not None:
                    result.evaluate_metrics_serverapp[server_round] = evaluated
            if on_round is not None:
                on_round(server_round, result.arrays, result)
        return result

    # -- helpers ------------------------------------------------------------------------------------------

    def _check_gradients(self) -> None:
        """Refuse roles that let nothing train: a factor fixed at zero hides every gradient that it is multiplied with.

        Raises:
            ValueError: In the first round a factor that starts at zero is fixed, and another is to be trained.
        """
        trained = {kind for kind, role in self.all_roles(1).items() if role in (Role.SHARED, Role.PERSONAL)}
        for product, kinds in zero_kinds(self.setting.specs).items():
            dead = [kind for kind, zero in kinds.items() if zero]
            hidden = [kind for kind, zero in kinds.items() if not zero and kind in trained]
            if dead and hidden and not trained & set(dead):
                raise ValueError(
                    f"strategy {self.name!r} trains {hidden[0]} of {product} in the first round while {dead[0]}, which "
                    f"it is multiplied with, is fixed at zero: nothing would be learned. Train {dead[0]} first."
                )

    def _count_down(self, tally: Tally, dealt: Mapping[int, tuple[int, ...]], server_round: int) -> None:
        """Count what clients are sent for a round, and what of it they would lack if they kept what they were sent."""
        sent = payload_bytes(self.exchanged(server_round), self.setting.dtype)
        needed: dict[int, int] = {}
        for client in (client for clients in dealt.values() for client in clients):
            known = self.knows.get(client, -1)
            if known not in needed:
                needed[known] = payload_bytes(self.lacking(server_round, known), self.setting.dtype)
            tally.bytes_down += sent
            tally.bytes_down_cached += needed[known]
            self.knows[client] = server_round - 1

    def _messages(
        self, message_type: str, server_round: int, tensors: Tensors, dealt: Mapping[int, tuple[int, ...]]
    ) -> Iterator[Message]:
        """Yield one message a node, made when it is asked for."""
        for node, clients in dealt.items():
            instruction = Instruction(
                round=server_round,
                clients=clients,
                roles=self.all_roles(server_round),
                weights=self.setting.weights,
                tensors=dict(tensors),
                fingerprint=code_fingerprint()[0],
                pack=self.setting.pack,
                ledger_heads=tuple(self.ledger_heads.get(client, "") for client in clients) if self.setting.dp else (),
            )
            content = instruction.to_content()
            if self.tally is not None:
                self.tally.message_bytes_down += message_bytes(content)
            yield Message(content, dst_node_id=node, message_type=message_type, group_id=str(server_round))

    def _accept(self, tally: Tally, message: Message) -> None:
        """Fold one reply, or refuse it with its clients' names."""
        clients = tally.pending.pop(message.metadata.src_node_id, ())
        try:
            reply = _read(message, clients)
            # Before anything else is looked at: an update that cannot be used has left all the same.
            self.ledger_heads |= {
                client: head for client, head in zip(reply.clients, reply.ledger_heads, strict=True) if head
            }
            tally.message_bytes_up += message_bytes(message.content)
            facts = {
                client: {
                    "examples": reply.examples[place],
                    "steps": reply.steps[place],
                    **{name: values[place] for name, values in reply.metrics.items()},
                }
                for place, client in enumerate(reply.clients)
            }
            good = [client for client, error in zip(reply.clients, reply.errors, strict=True) if not error]
            tally.bytes_up += payload_bytes(tally.expected, self.setting.dtype) * len(good)
            if good:
                self._fold(tally, reply, good, facts)
        except (WireError, OverflowError) as error:
            tally.facts |= dict.fromkeys(clients, _NO_FACTS)
            tally.refuse(clients, str(error))
            return
        tally.facts |= facts
        for client, reason in zip(reply.clients, reply.errors, strict=True):
            if reason:
                tally.refuse([client], reason)
            if reason.startswith(BUDGET_SPENT):
                self.spent.add(client)

    def _fold(self, tally: Tally, reply: Reply, good: list[int], facts: Mapping[int, Mapping[str, Any]]) -> None:
        """Check a reply's tensors and add them to the round's sum."""
        by_examples = self.setting.weights == "examples"
        if self.setting.dp:
            if any(reply.examples) or reply.metrics:
                raise WireError("it tells of its rows, which a client under DP must not")
            if not all(reply.ledger_heads[reply.clients.index(client)] for client in good):
                raise WireError("it holds an update that no ledger entry pays for")
        elif any(
            facts[client]["examples"] < 1 or not np.isfinite(facts[client].get("loss", np.nan)) for client in good
        ):
            raise WireError("it reports no training examples, or no finite loss")
        weight = sum(facts[client]["examples"] if by_examples else 1 for client in good)
        if reply.update is not None and len(good) == 1:
            check_tensors(reply.update, tally.expected, self.setting.dtype)
            tally.total.add(reply.update, weight)
            return
        if reply.total is None:
            raise WireError("it holds no update")
        check_tensors(reply.total.coarse, tally.expected, "float64")
        check_tensors(reply.total.fine, tally.expected, "float64")
        if (reply.total.weight, reply.total.count) != (weight, len(good)):
            raise WireError("the weight of its sum is not that of its clients")
        if not reply.total.is_sound():
            raise WireError("its sum cannot come from that many updates")
        tally.total.merge(reply.total)

    def _check_budgets(self, server_round: int) -> None:
        """Stop where more of a round's clients than may fail have spent their privacy budgets."""
        clients = self.sample(server_round)
        spent = len(self.spent & set(clients))
        if spent <= self.setting.failure_threshold * len(clients):
            return
        raise BudgetSpentError(
            f"round {server_round}: {spent} of {len(clients)} clients have spent their privacy budgets, and the others "
            "are too few to go on; the rounds so far stand. A larger privacy.epsilon allows more."
        )

    def _check_failures(self, tally: Tally, sampled: int, *, good: int) -> None:
        failed = len(tally.refused.keys() - self.spent)
        if good and failed <= self.setting.failure_threshold * sampled:
            return
        told = sorted((client, reason) for client, reason in tally.refused.items() if client not in self.spent)
        reasons = [f"client {client}: {reason}" for client, reason in told[:3]]
        raise FederationError(
            f"round {tally.round}: {failed} of {sampled} clients failed, more than federation.failure-threshold = "
            f"{self.setting.failure_threshold} allows. {'; '.join(reasons)}{'; ...' if failed > 3 else ''}"
        )


_NO_FACTS: dict[str, Any] = {"examples": 0, "steps": 0, "loss": None}


def sampled(server_round: int, seed: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Return a round's clients, ascending; ``clients_per_round`` = 0: all of them."""
    order = Seeded(seed).permutation("sample", server_round, size=num_clients)
    return sorted(int(client) for client in order[: clients_per_round or num_clients])


def deal(clients: Sequence[int], nodes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return, by node, a run of clients each; sizes differ by one at most and no entry is empty.

    Raises:
        FederationError: There is no node.
    """
    if not nodes:
        raise FederationError("no SuperNode is connected")
    ordered = sorted(nodes)[: len(clients)]
    bounds = np.linspace(0, len(clients), len(ordered) + 1).round().astype(int)
    return {node: tuple(clients[bounds[i] : bounds[i + 1]]) for i, node in enumerate(ordered)}


def arriving(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Send messages and yield each reply as it arrives, until all are there or ``timeout`` seconds passed."""
    waiting = set(grid.push_messages(messages))
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if waiting:
            time.sleep(_POLL_S)


def _read(message: Message, clients: Sequence[int]) -> Reply:
    """Return a node's reply about ``clients``, ascending, in whatever order it names them."""
    if message.has_error():
        raise WireError(f"its node failed: {message.error.reason}")
    reply = Reply.from_content(message.content)
    if sorted(reply.clients) != list(clients):
        raise WireError(f"it answers for clients {reply.clients[:5]}, not {list(clients[:5])}")
    return reply
