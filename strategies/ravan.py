"""Ravan: clients train cores and their scales; the server averages the products s_i H_i and starts scales at one again.

Raje, Askin, Jhunjhunwala & Joshi, "Ravan: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025,
arXiv 2506.05568; known from its abstract and notes, neither its text nor the authors' code was at hand. The method is
:mod:`fedlora.methods.ravan`.

With one A and one B for all clients, H_i <- sum_k p_k s_ki H_ki and s_i <- 1 is the exact mean of the clients' updates,
where means of H and s apart would not be. In the paper a client sends s_i H_i; here it sends both, h numbers a layer
more, and the server multiplies.

A weak client trains some of the h heads only, as many as ``method.ranks`` gives it. The others are in its model as the
server has them, and fixed, so that it starts from the server's whole model. The server averages each head over the
clients that have trained it, p_k being their shares among these. With all heads at all clients nothing of this is left.
In the paper the weak train their top heads by a score; how it scores them could not be verified. Our choice: heads are
drawn anew in each round (:mod:`strategies.some_modules`), which sees no data and leaves no head untrained. All heads go
down to every client. With heads by client the mean is not exact: p_k differ by head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedlora.reduce import Reduced, weighted_mean
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from strategies.some_modules import SomeModules


@final
class Ravan(SomeModules):
    """Trains H and s, of all heads or some, and averages their products; A and B are frozen."""

    name = "ravan"
    methods = ("ravan",)
    exact = True
    keeps_basis = False  # moments of H would be those of s H, whose s starts anew in every round

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for H, ``upload`` for s, which starts at one in every round, ``frozen`` for A and B."""
        roles = {"H": Role.SHARED, "s": Role.UPLOAD}
        return {kind: roles.get(kind, Role.FROZEN) for kind in kinds}

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean of the products of scale and core, of each head over those that have trained it."""
        specs = self.expected(server_round)
        scales = {spec.factors[0]: name for name, spec in specs.items() if spec.kind == "s"}
        cores = {name: scales[spec.factors[0]] for name, spec in specs.items() if spec.kind == "H"}
        updates = tuple(
            replace(
                one, tensors={**one.tensors, **{h: _product(one.tensors[h], one.tensors[s]) for h, s in cores.items()}}
            )
            for one in reduced.updates
        )
        if self._some:
            return super().apply(state, replace(reduced, updates=updates), server_round)
        kept = [name for name, spec in specs.items() if spec.kind != "s"]
        return replace(state, tensors={**state.tensors, **weighted_mean(updates, kept)})


def _product(cores: NDArray[np.floating], scales: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return s_i H_i of some heads, [k, r, r]."""
    product: NDArray[np.floating] = scales.astype(np.float64)[:, None, None] * cores
    return product
