"""FedLEASE: clients in clusters with a LoRA expert each, and a router at every client that mixes the experts.

Wang, Bian, Zhang & Xu, "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning", NeurIPS 2025, arXiv
2509.15087. The paper's text could not be had; what follows is from its abstract, notes on it, and the authors' code
(lei-wang-link/FedLEASE). The method is :mod:`fedlora.methods.lora_experts`.

- Round 1: every client trains a LoRA of its own from the seed, without a router, and sends it.
- After it the server puts clients into clusters: agglomerative with average linkage, by the mean over layers of one
  minus the cosine similarity of their B. Their number M, from 2 to ``lora-experts.max-experts``, is that of the largest
  silhouette. The mean of a cluster's A and B is its expert.
- From round 2 on a client is sent all M experts. It trains its own cluster's and its router, sends back the expert, and
  keeps the router. The server averages each expert over the clients of its cluster.

A cluster may have one client: its expert is then that client's own LoRA, which all others are sent as it is. Where that
must not be, train under DP.

There is no global model: which experts act is the router's choice, and every client has a router of its own. What is
measured is each client on its own rows, and no adapter is exported. Bytes up are those of ``fedavg``, down M times as
many from round 2 on; before the first round M is not known, and a plan counts the most that there may be. The clusters
are part of the server's state. Under DP they are made from what clients release, so they cost no budget; a router is in
the same clip and noise as what leaves, and never leaves. What differs from the paper and its code:

- the router stays at the client; in the code it is sent, too, and averaged over the cluster;
- the first training is one round, from the seed; in the code five rounds, in which clients go on with their own LoRA;
- clients count by ``strategy.weights`` (the code has equal weights);
- the head is what ``method.head`` says. In the code it is never trained, each client's as it was drawn;
- rules for what full participation does not need, our choice: a client without an update in round 1 belongs to the
  largest cluster, an expert of which no client takes part in a round stays as it is, and where the first round has one
  update only there is a second expert that adds nothing.

The updates of a round are kept apart until its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, require
from fedlora.exchange import Tensors
from fedlora.experts import ALL
from fedlora.methods.products import pairs
from fedlora.reduce import ClientUpdate, Reduced, weighted_mean
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from fedlora.strategy import Setting, Specs, Strategy
from strategies.clusters import best_clusters, cosine_distances

EXPERTS = "experts/clients"
"""Where the server's state keeps the expert of each client, [clients]."""


@final
class FedLEASE(Strategy):
    """Averages each expert over its cluster; the routers are personal."""

    name = "fedlease"
    methods = ("lora-experts",)
    exact = None
    personal = True
    period = 2
    repeats = False
    keeps_basis = False

    def __init__(self, setting: Setting) -> None:
        self._pairs = pairs(setting.specs)
        self._count = self.most_experts = setting.specs[self._pairs[0].a + ALL].shape[0]
        self._experts: tuple[int, ...] = ()
        super().__init__(setting)

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a first round that would not show how clients are alike."""
        part, clients = config.federation.clients_per_round, config.federation.num_clients
        rule = "strategy 'fedlease' makes clusters of the clients of round 1, so all must take part; set it to 0."
        require(not part or part == clients, "federation.clients-per-round", part, rule)
        rule = "must be at least 2: round 1 is for the clusters, and the experts are used from round 2 on."
        require(config.rounds >= 2, "rounds", config.rounds, rule)

    def at(self, state: ServerState) -> Self:
        """Return the strategy with the clusters that the state holds; itself before there are any."""
        known = state.extra.get(EXPERTS)
        if known is None:
            return self
        now = copy(self)
        now._experts = tuple(known.astype(np.int64).tolist())
        now._count = len(state.tensors[self._pairs[0].a + ALL])
        return now

    def expert(self, client: int) -> int:
        """Return the expert of a client: its cluster's, or the largest cluster's where it has none of its own."""
        if client < len(self._experts):
            return self._experts[client]
        return int(np.bincount(self._experts).argmax()) if self._experts else 0

    def specs(self, server_round: int, client: int | None = None) -> Specs:
        """Return the tensors, with as many experts as there are: in round 1 the seed's alone."""
        count = 1 if server_round == 1 else self._count
        return {
            name: replace(spec, shape=(count, *spec.shape[1:])) if spec.kind.endswith(ALL) else spec
            for name, spec in super().specs(server_round, client).items()
        }

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return the roles: with one expert a router has nothing to choose, and is not trained."""
        router = Role.FROZEN if server_round == 1 else Role.PERSONAL
        known = {"A": Role.UPLOAD, "B": Role.UPLOAD, "router": router, "own": Role.FROZEN}
        return {kind: known.get(kind, Role.BROADCAST) for kind in kinds}

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def initial(self, seeded: Tensors) -> ServerState:
        """Return the seed's A and B as the only expert, and the head."""
        state = super().initial(seeded)
        experts = {name + ALL: seeded[name][None] for _, a, b in self._pairs for name in (a, b)}
        return replace(state, tensors={**state.tensors, **experts})

    def changed(self, server_round: int) -> set[str]:
        """Return the experts' kinds, and the head where it is shared."""
        return super().changed(server_round) | ({"A" + ALL, "B" + ALL} if server_round else set())

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the experts after the round, and after the first one the clusters, too."""
        if server_round == 1:
            state = self._divided(state, reduced.updates)
        now, factors = self.at(state), [name for _, a, b in self._pairs for name in (a, b)]
        own = [[one for one in reduced.updates if now.expert(one.client) == expert] for expert in range(now._count)]
        means = [weighted_mean(some, factors) if some else {} for some in own]
        head = set(self.expected(server_round)) - set(factors)
        tensors = {**state.tensors, **weighted_mean(reduced.updates, sorted(head))}
        for name in factors:
            held = state.tensors[name + ALL].astype(np.float64)
            tensors[name + ALL] = np.stack([mean.get(name, one) for mean, one in zip(means, held, strict=True)])
        return replace(state, tensors=tensors)

    def _divided(self, state: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
        """Return the state with clusters, and for each of them the expert that all clients have had."""
        known = self._clusters(updates)
        count = max(2, int(known.max()) + 1)
        experts = [name + ALL for _, a, b in self._pairs for name in (a, b)]
        tensors = {name: np.repeat(state.tensors[name], count, axis=0) for name in experts}
        return replace(state, tensors={**state.tensors, **tensors}, extra={**state.extra, EXPERTS: known})

    def _clusters(self, updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
        """Return the cluster of each client up to the last that sent an update, float64 [clients]."""
        labels = best_clusters(
            cosine_distances([one.tensors[b] for one in updates] for _, _, b in self._pairs), self.most_experts
        )
        found = np.full(1 + max(one.client for one in updates), np.bincount(labels).argmax(), dtype=np.float64)
        found[[one.client for one in updates]] = labels
        return found
