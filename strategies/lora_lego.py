"""LoRA-LEGO on the server: clients' ranks, however many each has, are clustered into those of the server.

Zhao et al., ICLR 2025, arXiv 2409.16167, which merges finished LoRAs; the rule, and what could not be checked in it,
is in :mod:`fedlora.lego`. Here it merges the clients' LoRAs at the end of each round:

- every rank of a client is a unit, a row of A beside its column of B; the scale is alpha / ``method.rank`` for all, so
  units of clients of different ranks are comparable as they are;
- units weigh as their clients do, by examples or equally; the head is averaged as in ``fedavg``;
- a rank is averaged over the units that are like it, not over all clients: those who lack it pull nothing to zero, as
  they do with ``zero-padding``, and clients that send what they were sent leave the model as it is at any ranks.

The paper has no rounds, so the rest is our choice:

- k-means starts from what the server has sent, whose units keep their places. A client of rank r_k is therefore sent
  the server's first r_k ranks: those that most clients train, so the largest clusters;
- there are as many clusters as the round's widest client has ranks; ranks of the server behind them stay as they were.
  So k = r, and the output is not reweighted.

Not exact: a mean of units is not a mean of products. A centroid has the mean norm of its members: noise of DP, which
averaging would cancel in part, stays in the model at the size that single clients have added; beyond that all of it is
computed from noised updates. The updates of a round are kept apart until its end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import numpy as np

from fedlora.lego import merge_units
from fedlora.methods.products import pairs
from fedlora.reduce import Reduced, factors, shares, weighted_mean
from fedlora.shapes import placed
from fedlora.state import ServerState
from fedlora.strategy import Strategy


@final
class LoRALego(Strategy):
    """Trains A and B, and clusters the clients' ranks into the server's."""

    name = "lora-lego"
    methods = ("lora",)
    exact = False
    ragged = True
    keeps_basis = False  # a unit may move to another rank

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the centroids of each layer's ranks, and the mean of the head."""
        tensors, updates = dict(state.tensors), reduced.updates
        averaged = set(self.expected(server_round))
        for _, a, b in pairs(self.setting.specs):
            held_a, held_b = tensors[a].astype(np.float64), tensors[b].astype(np.float64)
            own = factors(updates, a, b)
            rank = max(len(one) for one, _ in own)
            merged_a, merged_b = merge_units(own, shares(updates), rank, (held_a[:rank], held_b[:, :rank]))
            tensors |= {a: placed(merged_a, held_a), b: placed(merged_b, held_b)}
            averaged -= {a, b}
        return replace(state, tensors={**tensors, **weighted_mean(updates, sorted(averaged))})
