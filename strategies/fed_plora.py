"""Fed-PLoRA: a client of rank r_k trains r_k of the adapter's R modules of rank one, on top of all the others.

Zhang, Hu & Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", ICLR 2026, arXiv 2602.16936. A
LoRA of rank R is a sum of R modules, B A = sum_j b_j a_j, with b_j a column of B and a_j a row of A. In a round:

- the server sends the whole adapter to all, of which client k trains r_k modules K_k, drawn at random;
- the client folds the others into its frozen base, W + sum_{j not in K_k} b_j a_j, so that it starts from the server's
  whole model at any rank, and trains and sends its own r_k modules;
- the server averages a_j and b_j over the clients that have trained module j in the round.

With equal ranks R this is ``fedavg``, to the bit. Means of a_j and b_j are not the mean of their products. The paper
was read in summaries and reviews; its text and code (TNI-playground/Fed-PLoRA) were not at hand. Our choice:

- the server draws one set of modules for all layers of a client, from the run's seed by round and client. No data has a
  part in it, so it is free under DP, where clip and noise are for the r_k modules alone;
- the base stays untouched: the folded modules are a fixed residual of the client's own
  (:mod:`fedlora.methods.residual`), which costs d_in + d_out products a token for each of them, as a trained one does;
- the scale is alpha / R for all modules, so that a module means the same wherever it is trained or folded (by alpha /
  r_k the folded ones would not add up to the server's model);
- clients count by ``strategy.weights``, for each module among those that have trained it; a module that nobody has
  trained in a round stays as it was; the head is averaged over all.

The updates of a round are kept apart until its end. Clients keep nothing. What goes down is larger than with
``zero-padding``: R modules to a client of any rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np

from fedlora.exact_sum import ExactSum
from fedlora.reduce import Reduced
from fedlora.seeded import Seeded
from fedlora.shapes import spread
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy


@final
class FedPLoRA(Strategy):
    """Trains and averages A and B, each client's own choice of their ranks."""

    name = "fed-plora"
    methods = ("lora",)
    exact = False
    ragged = True
    folds = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._whole = max(spec.shape[spec.rank_axis] for spec in setting.specs.values() if spec.rank_axis is not None)

    def modules(self, server_round: int, client: int) -> tuple[int, ...]:
        """Return the modules that a client trains, as many as its rank; none where all train all of them."""
        if not self.setting.ranks:
            return ()
        order = Seeded(self.setting.config.seed).permutation("modules", server_round, client, size=self._whole)
        return tuple(sorted(order[: self.setting.rank(client)].tolist()))

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean of each module over the clients that have trained it."""
        trained, total, weight_r = self.expected(server_round), ExactSum(), np.zeros(self._whole)
        for one in reduced.updates:
            modules = self.modules(server_round, one.client)
            weight_r[list(modules or range(self._whole))] += one.weight
            whole = {
                name: spread(one.tensors[name], spec.shape, spec.rank_axis, modules) for name, spec in trained.items()
            }
            total.add(whole, one.weight)
        tensors = dict(state.tensors)
        for name, value in total.total().items():
            axis, held = trained[name].rank_axis, tensors[name].astype(np.float64)
            shape = [-1 if at == axis else 1 for at in range(held.ndim)]
            weight = np.float64(total.weight) if axis is None else weight_r.reshape(shape)
            tensors[name] = np.divide(value, weight, out=held, where=weight > 0)
        return replace(state, tensors=tensors)
