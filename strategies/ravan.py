"""Ravan: clients train cores and their scales; the server averages the products s_i H_i and starts scales at one again.

"RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025, arXiv 2506.05568; known from notes, the
authors' code was not at hand. The method is :mod:`fedlora.methods.ravan`.

With one A and one B for all clients, H_i <- sum_k p_k s_ki H_ki and s_i <- 1 is the exact mean of the clients' updates,
where means of H and s apart would not be. In the paper a client sends s_i H_i; here it sends both, h numbers a layer
more, and the server multiplies. The paper's weak clients train some heads only and keep the others fixed, each head
averaged over those that have trained it; that is not offered. (``method.ranks`` as in ``zero-padding`` would not be it:
a client that held the first heads alone would start from another model than the server's. What it takes is what
``fed-plora`` does with ranks.)
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
from fedlora.strategy import Strategy


@final
class Ravan(Strategy):
    """Trains H and s, and averages their products; A and B are frozen."""

    name = "ravan"
    methods = ("ravan",)
    exact = True
    keeps_basis = False  # moments of H would be those of s H, whose s starts anew in every round

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for H, ``upload`` for s, which starts at one in every round, ``frozen`` for A and B."""
        roles = {"H": Role.SHARED, "s": Role.UPLOAD}
        return {kind: roles.get(kind, Role.FROZEN) for kind in kinds}

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean of the clients' products of scale and core, and the mean of the head."""
        specs = self.expected(server_round)
        scales = {spec.factors[0]: name for name, spec in specs.items() if spec.kind == "s"}
        cores = {name: scales[spec.factors[0]] for name, spec in specs.items() if spec.kind == "H"}
        folded = [
            replace(
                one, tensors={**one.tensors, **{h: _product(one.tensors[h], one.tensors[s]) for h, s in cores.items()}}
            )
            for one in reduced.updates
        ]
        kept = [name for name, spec in specs.items() if spec.kind != "s"]
        return replace(state, tensors={**state.tensors, **weighted_mean(folded, kept)})


def _product(cores: NDArray[np.floating], scales: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return s_i H_i of all heads, [h, r, r]."""
    product: NDArray[np.floating] = scales.astype(np.float64)[:, None, None] * cores
    return product
