"""Who takes part in a round, and which node stands for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.exchange import Weights
from fedlora.seeded import Seeded
from fedlora.server.errors import FederationError


@dataclass(frozen=True)
class Federation:
    """What the server needs to know of the clients.

    Attributes:
        num_clients: Number of clients.
        seed: Seed of the sampling.
        clients_per_round: Clients sampled each round; 0: all.
        weights: Whether a client counts by its examples, or all count alike.
        failure_threshold: Share of a round's clients that may fail.
        dtype: Of the tensors.
        pack: Clients trained together; 0: automatic.
        learning_rate: Of local training: the size of the server's proximal step on tensors that have an L1 weight.
        dp: Whether clients train under DP, and so report nothing but their updates.
    """

    num_clients: int
    seed: int = 0
    clients_per_round: int = 0
    weights: Weights = "examples"
    failure_threshold: float = 0.5
    dtype: str = "float32"
    pack: int = 0
    learning_rate: float = 0.0
    dp: bool = False

    def cohort(self, server_round: int) -> list[int]:
        """Return the round's clients, ascending."""
        return sampled(server_round, self.seed, self.num_clients, self.clients_per_round)


def sampled(server_round: int, seed: int, num_clients: int, clients_per_round: int) -> list[int]:
    """Return a round's cohort, ascending; ``clients_per_round`` = 0: all clients.

    It depends on the seed and the round alone.
    """
    order = Seeded(seed).permutation("sample", server_round, size=num_clients)
    return sorted(int(client) for client in order[: clients_per_round or num_clients])


def assigned(clients: Sequence[int], nodes: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return, by node, a run of clients each; sizes differ by one at most and no entry is empty.

    Raises:
        FederationError: There is no node.
    """
    if not nodes:
        raise FederationError("no SuperNode is connected")
    ordered = sorted(nodes)[: len(clients)]
    bounds = np.linspace(0, len(clients), len(ordered) + 1).round().astype(int)
    return {node: tuple(clients[bounds[i] : bounds[i + 1]]) for i, node in enumerate(ordered)}
