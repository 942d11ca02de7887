"""FedEx-LoRA: A and B are averaged apart, and what that leaves out of the mean product is sent beside them.

Singhal, Ponkshe & Vepakomma, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models", ACL 2025, arXiv 2410.09432; read against the authors' code (CERT-Lab/fedex-lora).

With the means A and B (as in ``fedavg``) the residual sum_k p_k B_k A_k - B A is added to the model of every client, so
that the server's update is exact, and clients go on from A and B. What differs from the paper and its code:

- the paper adds the residual to the frozen base. Here the base stays untouched: the residuals of all rounds are a
  second low-rank term (:mod:`fedlora.methods.residual`), which is sent, and exported with the adapter. It grows by
  round until a layer has as many ranks as features; from then on it is the whole matrix;
- the residual is written as sum_k p_k (B_k - B) (A_k - A_K), which is the same and has (K - 1) r ranks, not K r;
- clients count by ``strategy.weights`` in the means and in the residual alike (the code has equal weights);
- the residual is scaled as the adapter is, by alpha / r, and is a term B A of its own, so no orientation can be
  mistaken (the released code adds its transpose, which is right for GPT-2's Conv1D and wrong for a linear layer).

``fedex.residual-rank`` keeps the largest singular values of each round's residual alone, the paper's truncated form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Options, at_least
from fedlora.methods.products import pairs
from fedlora.methods.residual import compress, extend, residual_specs
from fedlora.reduce import Reduced, weighted_mean
from fedlora.state import ServerState
from fedlora.strategy import Setting, Specs, Strategy


@final
@dataclass(frozen=True)
class FedExOptions(Options):
    """FedEx-LoRA; read by ``strategy.name = 'fedex-lora'`` only."""

    section: ClassVar[str] = "fedex"

    residual_rank: int = 0
    """Ranks that are kept of each round's residual, by its largest singular values; 0: all, so that it is exact."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("fedex.residual-rank", self.residual_rank, 0)


@final
class FedExLoRA(Strategy):
    """Averages A and B, and adds the residual of their products to the model."""

    name = "fedex-lora"
    methods = ("lora",)
    exact = True
    accumulates = True
    keeps_basis = False  # a server optimizer would move A and B away from what the residual completes

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._kept = setting.config.options(FedExOptions).residual_rank
        self.exact = not self._kept

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def accumulated(self, ranks: Sequence[int]) -> Specs:
        """Return the residuals of all rounds."""
        return residual_specs(self.setting.specs, ranks)

    def added_ranks(self, clients: Iterable[int], after: ServerState | None = None) -> tuple[int, ...]:
        """Return (K - 1) r for all layers, or as much of it as is kept."""
        layers = pairs(self.setting.specs)
        whole = max(0, len(list(clients)) - 1) * self.setting.specs[layers[0].a].shape[0]
        return (min(whole, self._kept) if self._kept else whole,) * len(layers)

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Average all tensors, and add the round's residual to those of the rounds before."""
        updates, total = reduced.updates, sum(one.weight for one in reduced.updates)
        means = weighted_mean(updates, self.expected(server_round))
        tensors = {**state.tensors, **means}
        *others, last = updates
        for layer, name_a, name_b in pairs(self.setting.specs) if others else ():
            a = [one.weight / total * (_double(one.tensors[name_a]) - _double(last.tensors[name_a])) for one in others]
            b = [_double(one.tensors[name_b]) - means[name_b] for one in others]
            added = np.concatenate(a, axis=0), np.concatenate(b, axis=1)
            if self._kept and self._kept < len(added[0]):
                added = compress(*added, rank=self._kept)
            tensors |= extend(tensors, layer, *added)
        return replace(state, tensors=tensors)


def _double(value: NDArray[np.floating]) -> NDArray[np.float64]:
    return value.astype(np.float64)
