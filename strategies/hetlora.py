"""HetLoRA: zero-padding with weights by the size of each client's update, and clients whose ranks are pruned.

Cho, Liu, Xu, Fahrezi & Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-device Foundation Models", EMNLP
2024, arXiv 2401.06432. With A_k [r_k, d_in] and B_k [d_out, r_k] of client k, and f_k = floor(gamma r_k):

- a client is sent the first r_k ranks, and minimises its loss + lambda |B_k[:, f_k:]| |A_k[f_k:]|, summed over layers;
- the server pads with zeros to the largest rank of the round and averages A and B with the weights w_k = |B_k A_k| /
  sum_j |B_j A_j|, by the norm over the products of all layers;
- where a client's penalised product of norms fell during the round, its rank is max(r_min, f_k) from the next one on,
  with r_min the smallest rank of ``method.ranks``.

All norms are Frobenius norms. The server computes weights and pruning from what it has sent and received, so clients
keep nothing, and under DP both are free: what is received has its noise. The penalty's gradient holds no data and is
added after clip and noise. The clients' ranks are part of the server's state. The authors' code was not at hand; our
choice:

- one weight for all layers of a client, and one rank, for which the product of norms is summed over layers;
- what a client sends in the round that prunes it counts at the rank that it trained with;
- w_k takes the place of the clients' examples for A and B; the head is averaged as in ``fedavg``, and so are A and B of
  a round whose products are all zero;
- ranks that no client of a round holds stay as they were; those that no client at all holds any more are zero;
- a rank of 1 has no last ranks to penalise; the scale is alpha / ``method.rank`` at all ranks, as in ``zero-padding``.

The updates of a round are kept apart until its end. A client whose product is large has a large weight:
``federation.max-change`` bounds what a deployed site may send.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from fedlora.config import Options, require
from fedlora.exchange import Tensors
from fedlora.local_terms import LocalTerms, tail
from fedlora.methods.products import pairs, product_norm
from fedlora.reduce import ClientUpdate, Reduced, weighted_mean
from fedlora.shapes import pad, placed
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy

RANKS = "ranks/clients"
"""Where the server's state keeps the rank that each client holds, [clients]."""


@final
@dataclass(frozen=True)
class HetLoraOptions(Options):
    """HetLoRA; read by ``strategy.name = 'hetlora'`` only."""

    section: ClassVar[str] = "hetlora"

    penalty: float = 0.01
    """Weight of the penalty on the last ranks of each client; 0: none."""
    decay: float = 0.99
    """Share of its ranks that a client keeps when it is pruned, above 0 to 1; 1: no rank is penalised or pruned."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 <= self.penalty < np.inf, "hetlora.penalty", self.penalty, "must be 0 or more.")
        require(0 < self.decay <= 1, "hetlora.decay", self.decay, "must be above 0 and at most 1.")


@final
class HetLoRA(Strategy):
    """Trains and averages A and B, each client at a rank of its own that may fall."""

    name = "hetlora"
    methods = ("lora",)
    exact = False
    ragged = True
    prunes = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._options = setting.config.options(HetLoraOptions)
        self._pairs = pairs(setting.specs)

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def local(self, server_round: int) -> LocalTerms:
        """Return the penalty on the clients' last ranks."""
        penalty, decay = self._options.penalty, self._options.decay
        return LocalTerms(penalty=penalty if decay < 1 else 0.0, decay=decay)

    def ranks(self, state: ServerState) -> tuple[int, ...]:
        """Return the ranks that the state holds; those of the setting before there is one."""
        held = state.extra.get(RANKS)
        return self.setting.ranks if held is None else tuple(held.astype(np.int64).tolist())

    def initial(self, seeded: Tensors) -> ServerState:
        """Return the seed's tensors, and the ranks that clients start with."""
        ranks = {RANKS: np.array(self.setting.ranks, dtype=np.float64)} if self.setting.ranks else {}
        return replace(super().initial(seeded), extra=ranks)

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the means, and the ranks that clients hold after the round."""
        tensors, extra, updates = dict(state.tensors), dict(state.extra), reduced.updates
        shares = self._shares(updates)
        factors = [name for _, a, b in self._pairs for name in (a, b)]
        for name in factors:
            own = [one.tensors[name].astype(np.float64) for one in updates]
            widest = max((value.shape for value in own), key=sum)
            mean = np.sum([share * pad(value, widest) for share, value in zip(shares, own, strict=True)], axis=0)
            tensors[name] = placed(mean, tensors[name].astype(np.float64))
        head = set(self.expected(server_round)) - set(factors)
        tensors |= weighted_mean(updates, sorted(head))
        if self.setting.ranks:
            ranks = self._pruned(state, updates)
            for _, a, b in self._pairs:
                tensors[a][max(ranks) :], tensors[b][:, max(ranks) :] = 0.0, 0.0
            extra[RANKS] = np.array(ranks, dtype=np.float64)
        return replace(state, tensors=tensors, extra=extra)

    def _shares(self, updates: Sequence[ClientUpdate]) -> list[float]:
        """Return the weight of each client's A and B; they sum to 1."""
        norms = [
            float(np.linalg.norm([product_norm(one.tensors[a], one.tensors[b]) for _, a, b in self._pairs]))
            for one in updates
        ]
        sizes = norms if any(norms) else [float(one.weight) for one in updates]
        return [size / sum(sizes) for size in sizes]

    def _pruned(self, state: ServerState, updates: Sequence[ClientUpdate]) -> list[int]:
        """Return the rank that each client holds after the round."""
        ranks = list(self.ranks(state))
        least = min(ranks)  # as at the start: the smallest rank is never pruned
        for one in updates:
            rank = ranks[one.client]
            first = tail(rank, self._options.decay)
            if self._score(one.tensors, first, rank) < self._score(state.tensors, first, rank):
                ranks[one.client] = max(least, first)
        return ranks

    def _score(self, tensors: Tensors, first: int, rank: int) -> float:
        """Return the product of norms of the ranks from ``first`` to ``rank``, summed over layers."""
        return sum(
            float(
                np.linalg.norm(tensors[b][:, first:rank].astype(np.float64))
                * np.linalg.norm(tensors[a][first:rank].astype(np.float64))
            )
            for _, a, b in self._pairs
        )
