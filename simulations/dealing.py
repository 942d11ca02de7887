"""Deals a simulation's clients to trainers, and the packs to the SuperNodes that carry them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import final

from flwr.serverapp import Grid

from clients.pool import TrainerPool
from clients.shards import MOST_CLIENTS, deal
from fedlora.server.errors import FederationError
from fedlora.server.nodes import Nodes


@final
class DealtNodes(Nodes):
    """SuperNodes that carry packs: all clients of a round are dealt to the trainers together, not node by node.

    A node's ClientApp hands each pack to the trainer that it was dealt to. The first pack of every trainer is with the
    first node, the second with the second: no trainer waits while Flower has another node's message in hand.

    Args:
        pool: The trainers.
        pack: Clients a pack; 0: automatic.
        work: Predicted work by client.
        most: Clients of a pack of an automatic size, at most.
    """

    def __init__(self, pool: TrainerPool, pack: int, work: Mapping[int, float], most: int = MOST_CLIENTS) -> None:
        self._pool, self._pack, self._work, self._most = pool, pack, work, most

    def assign(self, grid: Grid, clients: Sequence[int], server_round: int) -> dict[int, tuple[int, ...]]:
        """Return the clients of each node's packs.

        Raises:
            FederationError: There is no node.
        """
        nodes = sorted(grid.get_node_ids())
        if not nodes:
            raise FederationError("no SuperNode is connected")
        packs = deal(clients, self._pack, self._pool.shares(), self._work, self._most)
        self._pool.deal(packs)
        carried: dict[int, list[int]] = {}
        turns = Counter[int]()
        for pack in packs:
            carried.setdefault(nodes[turns[pack.trainer] % len(nodes)], []).extend(pack.clients)
            turns[pack.trainer] += 1
        return {node: tuple(sorted(own)) for node, own in carried.items()}
