"""Strategies whose clients start a fresh LoRA in each round, while the sum of the rounds before grows beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedlora.methods.products import Pair, Product, pairs
from fedlora.methods.residual import extend, residual_specs
from fedlora.reduce import Reduced, mean_product, weighted_mean
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from fedlora.strategy import Specs, Strategy

_ADDED = "stacked/added"  # in the server's state: the ranks that the last round has added, [layers]


class Stacked(Strategy, ABC):
    """Clients send A and B of a fresh LoRA; what the server makes of their mean product is added to a residual."""

    accumulates = True
    keeps_basis = False

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``upload`` for A and B: fresh in each round, sent and never received."""
        return dict.fromkeys(kinds, Role.UPLOAD)

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def accumulated(self, ranks: Sequence[int]) -> Specs:
        """Return the factors of the sum of all rounds."""
        return residual_specs(self.setting.specs, ranks)

    def added_ranks(self, clients: Iterable[int], after: ServerState | None = None) -> tuple[int, ...]:
        """Return what was added; before a round the sum of the clients' ranks, which is the most."""
        if after is not None:
            return tuple(after.extra[_ADDED].astype(np.int64).tolist())
        ranks, layers = self.setting.ranks, pairs(self.setting.specs)
        whole = self.setting.specs[layers[0].a].shape[0]
        return (sum(ranks[client] if ranks else whole for client in clients),) * len(layers)

    @abstractmethod
    def added(self, products: Mapping[Pair, Product]) -> Mapping[Pair, Product]:
        """Return what is added for each layer, given the mean of the clients' products."""

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Add the round's products to those of the rounds before, and average the head."""
        tensors = dict(state.tensors)
        products = {pair: mean_product(reduced.updates, pair.a, pair.b) for pair in pairs(self.setting.specs)}
        added = self.added(products)
        for pair, (a, b) in added.items():
            tensors |= extend(tensors, pair.layer, a, b)
        ranks = np.array([len(added[pair][0]) for pair in products], dtype=np.float64)
        shared = [name for name, spec in self.expected(server_round).items() if spec.kind == "head"]
        tensors |= weighted_mean(reduced.updates, shared)
        return replace(state, tensors=tensors, extra={**state.extra, _ADDED: ranks})
