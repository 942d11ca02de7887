"""Strategies whose clients start a fresh LoRA in each round, while the sum of the rounds before grows beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.products import Pair, pairs
from fedlora.methods.residual import extend, residual_specs
from fedlora.reduce import Reduced, mean_product, weighted_mean
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from fedlora.strategy import Specs, Strategy

_ADDED = "stacked/added"  # in the server's state: the rank that the last round has added, [1]

Product = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The factors A [R, d_in] and B [d_out, R] of a product B A."""


class Stacked(Strategy, ABC):
    """Clients send A and B of a fresh LoRA; what the server makes of their mean product is added to a residual."""

    keeps_basis = False

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``upload`` for A and B: fresh in each round, sent and never received."""
        return dict.fromkeys(kinds, Role.UPLOAD)

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def accumulated(self, rank: int) -> Specs:
        """Return the factors of the sum of all rounds."""
        return residual_specs(self.setting.specs, rank)

    def added_rank(self, clients: Iterable[int], after: ServerState | None = None) -> int:
        """Return what was added; before a round the sum of the clients' ranks, which is the most."""
        if after is not None:
            return int(after.extra[_ADDED][0])
        ranks = self.setting.ranks
        whole = next(spec.shape[0] for spec in self.setting.specs.values() if spec.kind == "A")
        return sum(ranks[client] if ranks else whole for client in clients)

    @abstractmethod
    def added(self, products: Mapping[Pair, Product]) -> Mapping[Pair, Product]:
        """Return what is added for each layer, given the mean of the clients' products.

        All of one rank, or of as many as a layer has features.
        """

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Add the round's products to those of the rounds before, and average the head."""
        tensors = dict(state.tensors)
        products = {pair: mean_product(reduced.updates, pair.a, pair.b) for pair in pairs(self.setting.specs)}
        added = self.added(products)
        for pair, (a, b) in added.items():
            tensors |= extend(tensors, pair.layer, a, b)
        rank = max(len(a) for a, _ in added.values())
        shared = [name for name, spec in self.expected(server_round).items() if spec.kind == "head"]
        tensors |= weighted_mean(reduced.updates, shared)
        return replace(state, tensors=tensors, extra={**state.extra, _ADDED: np.full(1, float(rank))})
