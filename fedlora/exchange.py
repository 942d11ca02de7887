"""What server and clients exchange in a round, before it becomes Flower's records (:mod:`fedlora.wire`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedlora.local_terms import LocalTerms
from fedlora.roles import Role

Tensors = Mapping[str, NDArray[np.floating]]
Weights = Literal["examples", "equal"]


BUDGET_SPENT = "its privacy budget is spent"
"""How the reason begins of a client that trains no more for lack of budget."""


class Outcome(StrEnum):
    """How a client's part in a round ended."""

    OK = "ok"
    """Its update may be used."""
    FAILED = "failed"
    """It did not train, or what it trained must not be used."""
    BUDGET_SPENT = "budget-spent"
    """It will not train any more: one more round would pass its privacy budget."""
    NOT_JOINED = "not-joined"
    """It is a deployed site that does not know the run, such as one whose daemon was given another; it may join."""


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a node: to train clients, or to evaluate them on their own rows.

    Attributes:
        round: The round, from 1.
        clients: The clients that the node stands for, ascending.
        roles: Role of each kind of tensor.
        tensors: Current values of the tensors that the clients are sent.
        weights: Whether a client counts by its examples, or all count alike.
        reduction: How the node reduces its clients' updates, a name in :data:`fedlora.reduce.REDUCTIONS`.
        local: The terms of local training.
        extra: What the server sends beside the tensors, by what it is and the tensor's name
            (``variate/<tensor>``: SCAFFOLD's control variate).
        ranks: The rank that each client holds, one a client; empty: all hold the method's.
        modules: The modules (a row of A and a column of B each, or one of Ravan's heads) that each client trains while
            the others are fixed, by their places, ascending; empty: each trains all that it holds.
        blocks: The blocks of the base model whose shared tensors are trained, while those of others stay as they are
            sent; empty: all are trained.
        experts: Which of the experts that are sent is each client's own (:mod:`fedlora.experts`), one a client; empty:
            none are sent.
        fingerprint: The server's code, see :mod:`fedlora.fingerprint`.
        pack: Clients trained together; 0: automatic.
        ledger_heads: Under DP for each client the hash of the last ledger entry that the server has seen; empty: none.
        job: The digest of the job that a deployed site has joined; empty in a simulation, whose trainers are given it.
    """

    round: int
    clients: tuple[int, ...]
    roles: Mapping[str, Role]
    tensors: Tensors
    weights: Weights = "examples"
    reduction: str = "mean"
    local: LocalTerms = field(default_factory=LocalTerms)
    extra: Tensors = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    modules: tuple[tuple[int, ...], ...] = ()
    blocks: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()
    fingerprint: str = ""
    pack: int = 0
    ledger_heads: tuple[str, ...] = ()
    job: str = ""

    def part(self, clients: Sequence[int]) -> Instruction:
        """Return the instruction for some of its clients, as for a pack of them."""
        places = [self.clients.index(client) for client in clients]

        def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[place] for place in places) if values else ()

        return replace(
            self,
            clients=tuple(clients),
            ranks=chosen(self.ranks),
            modules=chosen(self.modules),
            experts=chosen(self.experts),
            ledger_heads=chosen(self.ledger_heads),
        )

    def rank(self, client: int) -> int | None:
        """Return the rank that a client holds; None: the method's."""
        return self.ranks[self.clients.index(client)] if self.ranks else None

    def modules_of(self, client: int) -> tuple[int, ...]:
        """Return the modules that a client trains, by their places; empty: all that it holds."""
        return self.modules[self.clients.index(client)] if self.modules else ()

    def expert(self, client: int) -> int | None:
        """Return which of the experts is a client's own; None: none are sent."""
        return self.experts[self.clients.index(client)] if self.experts else None


@dataclass(frozen=True)
class ClientReport:
    """What a client reports of its part in a round, beside its tensors.

    Attributes:
        client: Its number.
        outcome: How it ended.
        reason: Why its update must not be used; empty where it may.
        examples: Rows that it trained on, or was evaluated on; 0 under DP.
        steps: Optimizer steps taken.
        metrics: Mean training loss, or sums over its own rows; empty under DP.
        ledger_head: Under DP the hash of the ledger entry that pays for the update; empty: none.
    """

    client: int
    outcome: Outcome = Outcome.OK
    reason: str = ""
    examples: int = 0
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    ledger_head: str = ""

    @classmethod
    def failed(cls, client: int, reason: str, outcome: Outcome = Outcome.FAILED) -> ClientReport:
        """Return the report of a client whose part came to nothing."""
        return cls(client, outcome, reason)


@dataclass(frozen=True)
class Update:
    """What a client sends after a round.

    Attributes:
        report: How its round went.
        tensors: Its shared tensors, at its own rank; empty where there is no update.
        extra: What it sends beside them, named as in :attr:`Instruction.extra`: the change of its control variate.
    """

    report: ClientReport
    tensors: Tensors = field(default_factory=dict)
    extra: Tensors = field(default_factory=dict)

    @property
    def client(self) -> int:
        """The client's number."""
        return self.report.client
