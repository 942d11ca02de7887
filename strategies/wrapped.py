"""A strategy around another: what it does not change is the inner one's."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Self

from fedlora.exchange import Tensors
from fedlora.local_terms import LocalTerms
from fedlora.reduce import Reduced
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from fedlora.strategy import Specs, Strategy


class Wrapped(Strategy, ABC):
    """Passes every question on to the inner strategy.

    Args:
        inner: The strategy.
    """

    def __init__(self, inner: Strategy) -> None:
        self.inner = inner
        self.name, self.methods, self.exact = inner.name, inner.methods, inner.exact
        self.personal, self.period, self.ragged = inner.personal, inner.period, inner.ragged
        self.repeats, self.keeps_basis = inner.repeats, inner.keeps_basis
        self.folds, self.prunes, self.accumulates = inner.folds, inner.prunes, inner.accumulates
        self.most_experts = inner.most_experts
        super().__init__(inner.setting)

    def ranks(self, state: ServerState) -> tuple[int, ...]:
        """Return the ranks of the inner strategy's clients."""
        return self.inner.ranks(state)

    def at(self, state: ServerState) -> Self:
        """Return the strategy around the inner one as the state has that next."""
        inner = self.inner.at(state)
        if inner is self.inner:
            return self
        now = copy(self)
        now.inner, now.setting = inner, inner.setting
        return now

    def expert(self, client: int) -> int | None:
        """Return the expert of the inner strategy's client."""
        return self.inner.expert(client)

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return the inner strategy's roles."""
        return self.inner.roles(kinds, server_round)

    def rank(self, server_round: int, client: int | None = None) -> int | None:
        """Return the rank at which a client of the inner strategy trains."""
        return self.inner.rank(server_round, client)

    def specs(self, server_round: int, client: int | None = None) -> Specs:
        """Return the inner strategy's tensors."""
        return self.inner.specs(server_round, client)

    def modules(self, server_round: int, client: int) -> tuple[int, ...]:
        """Return the modules that a client of the inner strategy trains."""
        return self.inner.modules(server_round, client)

    def blocks(self, server_round: int) -> tuple[str, ...]:
        """Return the blocks that the inner strategy trains."""
        return self.inner.blocks(server_round)

    def reduction(self, server_round: int) -> str:
        """Return the inner strategy's reduction."""
        return self.inner.reduction(server_round)

    def local(self, server_round: int) -> LocalTerms:
        """Return the inner strategy's terms."""
        return self.inner.local(server_round)

    def extra(self, server_round: int) -> Specs:
        """Return what the inner strategy exchanges beside the tensors."""
        return self.inner.extra(server_round)

    def accumulated(self, ranks: Sequence[int]) -> Specs:
        """Return the inner strategy's accumulated tensors."""
        return self.inner.accumulated(ranks)

    def added_ranks(self, clients: Iterable[int], after: ServerState | None = None) -> tuple[int, ...]:
        """Return the ranks that a round adds for the inner strategy."""
        return self.inner.added_ranks(clients, after)

    def initial(self, seeded: Tensors) -> ServerState:
        """Return the inner strategy's start."""
        return self.inner.initial(seeded)

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return what the inner strategy makes of the updates."""
        return self.inner.apply(state, reduced, server_round)

    def changed(self, server_round: int) -> set[str]:
        """Return the kinds that the inner strategy changes."""
        return self.inner.changed(server_round)


def check_shared(strategy: Strategy, key: str, roles: Sequence[Role] = (Role.SHARED,)) -> None:
    """Refuse what works on shared tensors where there are none.

    Args:
        strategy: The strategy that it is to be put around.
        key: The configuration key that asks for it, with its value.
        roles: The roles that it works on.

    Raises:
        ValueError: The strategy shares no tensor in any round.
    """
    if not any(set(roles) & set(turns) for turns in strategy.roles_in_turn().values()):
        raise ValueError(
            f"{key}: strategy {strategy.name!r} shares no tensors, so this would change nothing; leave it at 'none', "
            "or choose a strategy that shares some."
        )
