"""A strategy at the server between two rounds, whatever carries its messages: instructions out, updates in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np

from fedlora.exchange import Instruction, Tensors
from fedlora.experts import copied
from fedlora.fingerprint import code_fingerprint
from fedlora.methods import proximal_step
from fedlora.reduce import Reduction
from fedlora.server.cohort import Federation
from fedlora.server.traffic import ACCUMULATED
from fedlora.shapes import cut, placed
from fedlora.state import ServerState
from fedlora.strategy import Strategy


@final
class Core:
    """What the server makes of a strategy in a round.

    Args:
        strategy: The strategy.
        federation: Its clients.
        state: What the server holds before the first round, ``strategy.initial(...)``, or held after the last one.

    Attributes:
        state: What the server holds.
    """

    def __init__(self, strategy: Strategy, federation: Federation, state: ServerState) -> None:
        self._strategy, self.federation, self.state = strategy, federation, state

    @property
    def strategy(self) -> Strategy:
        """The strategy, as the state has it: with the ranks and experts of its clients now."""
        return self._strategy.at(self.state)

    @property
    def ranks(self) -> list[tuple[int, ...]]:
        """The ranks that have been added until the end of each round, of a strategy whose tensors accumulate."""
        return [tuple(map(int, ranks)) for ranks in self.state.extra.get(ACCUMULATED, np.zeros((1, 0)))]

    def sent(self, server_round: int, clients: Sequence[int], *, train: bool = True) -> Tensors:
        """Return the tensors that clients are sent together: as much of each as the one with the largest rank holds.

        Args:
            server_round: The round.
            clients: The clients.
            train: Whether they train, which may take fewer ranks than to be measured.
        """
        strategy = self.strategy
        ranks = strategy.held
        widest = max(clients, key=lambda client: ranks[client]) if ranks else None
        accumulated = {name: self.state.tensors[name] for name in strategy.accumulated(self.ranks[-1])}
        sent = (strategy.sent if train else strategy.measured)(server_round, widest)
        return {**{name: cut(self.state.tensors[name], spec.shape) for name, spec in sent.items()}, **accumulated}

    def start(self, server_round: int, client: int) -> Tensors:
        """Return what a client is sent, and what it starts with of the experts among it."""
        sent, expert = self.sent(server_round, (client,)), self.strategy.expert(client)
        return sent if expert is None else {**sent, **copied(sent, expert)}

    def instruction(
        self, server_round: int, clients: Sequence[int], *, train: bool = True, job: str = ""
    ) -> Instruction:
        """Return what clients are told together.

        Args:
            server_round: The round that they train, or would start next where they are only measured.
            clients: The clients, ascending.
            train: Whether they train; else they need none of what is exchanged beside the tensors, and use all ranks.
            job: Digest of the job that they have joined; empty in a simulation.
        """
        strategy, federation = self.strategy, self.federation
        heads = self.state.clients.ledger_heads
        modules = tuple(strategy.modules(server_round, client) for client in clients) if train else ()
        return Instruction(
            round=server_round,
            clients=tuple(clients),
            roles=strategy.all_roles(server_round),
            tensors=self.sent(server_round, clients, train=train),
            weights=federation.weights,
            reduction=strategy.reduction(server_round),
            local=strategy.local(server_round),
            extra={name: self.state.extra[name] for name in (strategy.extra(server_round) if train else ())},
            ranks=self._held_ranks(server_round, clients, train),
            modules=modules if any(modules) else (),
            blocks=strategy.blocks(server_round),
            experts=strategy.experts(clients),
            fingerprint=federation.fingerprint or code_fingerprint()[0],
            pack=federation.pack,
            ledger_heads=tuple(heads.get(client, "") for client in clients) if federation.dp else (),
            job=job,
        )

    def _held_ranks(self, server_round: int, clients: Sequence[int], train: bool) -> tuple[int, ...]:
        """Return the rank that each client computes with; empty: all with the method's."""
        strategy = self.strategy
        if train and not strategy.folds:
            ranks = [strategy.rank(server_round, client) for client in clients]
            return tuple(rank for rank in ranks if rank is not None)
        return tuple(strategy.held[client] for client in clients) if strategy.held else ()

    def apply(self, server_round: int, total: Reduction, used: Collection[int]) -> None:
        """Turn a round's updates into the new state, in the dtype of its tensors.

        Args:
            server_round: The round.
            total: The updates, reduced.
            used: The clients that they are of.
        """
        dtype, strategy = self.federation.dtype, self.strategy
        reduced = total.reduced()
        reduced = replace(reduced, mean={name: value.astype(dtype) for name, value in reduced.mean.items()})
        ranks = self.ranks
        state = strategy.apply(self.state, reduced, server_round)
        # A mean of sparse tensors is dense where only one of the clients is not zero.
        rate = self.federation.learning_rate * strategy.local(server_round).learning_rate
        # Of clients of smaller ranks less than the whole has arrived; the rest stays as it was.
        held, sparse = state.tensors, {name: s for name, s in strategy.expected(server_round).items() if s.l1}
        arrived = {name: cut(held[name], reduced.mean.get(name, held[name]).shape) for name in sparse}
        shrunk = proximal_step(arrived, sparse, rate)
        whole = {name: placed(value, held[name]) for name, value in shrunk.items()}
        tensors = {name: value.astype(dtype) for name, value in {**held, **whole}.items()}
        self.state = replace(state, tensors=tensors)
        if strategy.accumulates:
            added = np.array(strategy.added_ranks(used, state), dtype=np.float64)
            history = np.array([rank or np.zeros_like(added) for rank in ranks])
            history = np.concatenate([history, history[-1:] + added])
            self.state = replace(self.state, extra={**self.state.extra, ACCUMULATED: history})
        self.remember(trained=self.state.clients.trained | set(used))

    def remember(self, **changes: Any) -> None:
        """Change what is remembered of the clients."""
        self.state = replace(self.state, clients=replace(self.state.clients, **changes))
