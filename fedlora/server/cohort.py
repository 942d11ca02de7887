"""Client sampling: who takes part in a round, which node stands for whom, and how many may fail."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedlora.exchange import Weights
from fedlora.seeded import Seeded
from fedlora.server.errors import BudgetSpentError, FederationError


@dataclass(frozen=True)
class Federation:
    """The clients of a federation, and how they take part.

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
        fingerprint: The code that clients must run; empty: that of the installed packages (:mod:`fedlora.fingerprint`).
        deployed: Whether clients are sites on other machines, which come and go.
        min_replies: Updates with which a round of deployed sites may close; 0: it waits for all, and
            ``failure_threshold`` says how many may fail.
        grace: Seconds that a round goes on waiting for the others once it has them.
        max_change: Largest L2 norm by which one site may change the tensors that it was sent; 0: any.
        measured_by_sites: Whether clients report how the server's tensors do on the rows that they hold out.
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
    fingerprint: str = ""
    deployed: bool = False
    min_replies: int = 0
    grace: float = 0.0
    max_change: float = 0.0
    measured_by_sites: bool = False

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: Clients under DP are to be weighted by numbers that they must not report.
        """
        if self.dp and self.weights != "equal":
            raise ValueError("strategy.weights = 'examples': clients under DP report no number of rows; set 'equal'.")

    def cohort(self, server_round: int) -> list[int]:
        """Return the round's clients, ascending."""
        return sampled(server_round, self.seed, self.num_clients, self.clients_per_round)

    def check_budgets(self, server_round: int, spent: Collection[int]) -> None:
        """Stop where more of a round's clients than may fail have spent their privacy budgets.

        Raises:
            BudgetSpentError: They have.
        """
        cohort = self.cohort(server_round)
        without = len(set(cohort) & set(spent))
        if without <= self.failure_threshold * len(cohort):
            return
        raise BudgetSpentError(
            f"round {server_round}: {without} of {len(cohort)} clients have spent their privacy budgets, and the "
            "others are too few to go on; the rounds so far stand. A larger privacy.epsilon allows more."
        )

    def check_failures(
        self, server_round: int, asked: Iterable[int], refused: Mapping[int, str], spent: Collection[int], *, good: int
    ) -> None:
        """Stop where more clients than may fail have failed, or none is left; a spent budget is no failure.

        Args:
            server_round: The round.
            asked: The clients that were asked.
            refused: Why a client was left out, by client.
            spent: Clients without privacy budget.
            good: How many clients were not left out.

        Raises:
            FederationError: Too many have failed.
        """
        failed = {client: reason for client, reason in refused.items() if client not in spent}
        able = len(set(asked) - set(spent))
        if good and (good >= self.min_replies if self.min_replies else len(failed) <= self.failure_threshold * able):
            return
        reasons = [f"client {client}: {reason}" for client, reason in sorted(failed.items())[:3]]
        rule = (
            f"fewer than federation.min-replies = {self.min_replies} are left"
            if self.min_replies
            else f"more than federation.failure-threshold = {self.failure_threshold} allows"
        )
        raise FederationError(
            f"round {server_round}: {len(failed)} of {able} clients failed, {rule}. {'; '.join(reasons)}"
            f"{'; ...' if len(failed) > 3 else ''}"
        )


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
