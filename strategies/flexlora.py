"""FlexLoRA: the mean of the clients' products, cut by its singular values to the rank that each client holds.

Bai, Chen, Yang, Zhang, Li & Li, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
Resources", NeurIPS 2024, arXiv 2402.11505; read against the authors' code (FederatedScope, branch FlexLoRA).

The server takes D = sum_k p_k B_k A_k = U S V^T, which is exact, keeps its ``method.rank`` largest singular values, and
sends each client the first r_k of B = U S and A = V^T: what is best for that rank. With ``flexlora.values = 'A'`` the
singular values go to the other side, B = U and A = S V^T, as in HLoRA (NVFlare's ``custom_aggregators.py``), which
makes the steps of the next round others. What differs from the paper and its code:

- the singular vectors come from the core of a QR of the stacked factors, not from the d_out x d_in product;
- the scale is alpha / ``method.rank`` at all ranks, so nothing is divided out for a client (the code fixes alpha = 16);
- where the clients of a round have fewer ranks together than the server, one factor of those behind them is kept and
  the other zero, so that they can be trained: A is kept, or B with ``values = 'A'`` where it is not zero itself.

With unequal ranks, energy collects in the ranks that all clients hold: the others have it only through those who do
(raFLoRA, arXiv 2602.13486).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from fedlora.config import Options, one_of
from fedlora.methods.products import decompose, pairs
from fedlora.reduce import Reduced, mean_product, weighted_mean
from fedlora.shapes import placed
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy


@final
@dataclass(frozen=True)
class FlexLoraOptions(Options):
    """FlexLoRA; read by ``strategy.name = 'flexlora'`` only."""

    section: ClassVar[str] = "flexlora"

    values: str = "B"
    """Factor that gets the singular values: ``B``, as in FlexLoRA, or ``A``, as in HLoRA."""

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("flexlora.values", self.values, ("B", "A"))


@final
class FlexLoRA(Strategy):
    """Trains A and B, and averages their products."""

    name = "flexlora"
    methods = ("lora",)
    exact = False
    ragged = True
    keeps_basis = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._options = setting.config.options(FlexLoraOptions)

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean product of each layer in factors of the server's rank, and the mean of the head."""
        tensors, averaged = dict(state.tensors), set(self.expected(server_round))
        for _, a, b in pairs(self.setting.specs):
            u, s, vt = decompose(*mean_product(reduced.updates, a, b))
            rank = len(tensors[a])
            u, s, vt = u[:, :rank], s[:rank], vt[:rank]
            u, vt = (u * s, vt) if self._options.values == "B" else (u, s[:, None] * vt)
            whole_a, whole_b = tensors[a].astype(np.float64), tensors[b].astype(np.float64)
            keep_b = (self._options.values == "A") & whole_b.any(axis=0)  # [r]: there A holds what may be zero
            whole_a[keep_b], whole_b[:, ~keep_b] = 0.0, 0.0
            tensors |= {a: placed(vt, whole_a), b: placed(u, whole_b)}
            averaged -= {a, b}
        return replace(state, tensors={**tensors, **weighted_mean(reduced.updates, sorted(averaged))})
