"""Which SuperNode stands for which clients: any of a simulation's, or at each deployed site its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from flwr.serverapp import Grid

from fedlora.server.cohort import assigned


class Nodes(ABC):
    """The SuperNodes of a federation."""

    @abstractmethod
    def assign(self, grid: Grid, clients: Sequence[int], server_round: int) -> dict[int, tuple[int, ...]]:
        """Return, by node, the clients that it stands for in a round, ascending; clients without a node are left out.

        Raises:
            FederationError: There are too few nodes to go on.
        """

    def job(self, clients: Sequence[int]) -> str:
        """Return the digest of the job that these clients' node has joined; empty in a simulation."""
        return ""

    def rows(self, client: int) -> int | None:
        """Return the rows that a client may claim at most; None: any number."""
        return None

    def left(self, client: int, reason: str) -> None:
        """Take note that a client's node has to join anew before it is assigned again."""
        raise AssertionError(f"client {client} of a simulation left: {reason}")

    def name(self, client: int) -> str:
        """Return what to call a client."""
        return f"client {client}"

    def node_name(self, node: int) -> str:
        """Return what to call a node."""
        return f"node {node}"


@final
class SimulationNodes(Nodes):
    """All nodes are alike: clients are spread over them."""

    def assign(self, grid: Grid, clients: Sequence[int], server_round: int) -> dict[int, tuple[int, ...]]:
        """Return a run of clients for each node."""
        return assigned(clients, list(grid.get_node_ids()))
