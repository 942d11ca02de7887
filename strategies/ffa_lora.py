"""FFA-LoRA: A is frozen at its random start, B is trained and exchanged.

Sun, Li, Li & Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.

With one A for all clients, sum_k p_k (B_k A) = (sum_k p_k B_k) A: the average is exact, at half the bytes of
``fedavg`` for square layers (d_out / (d_in + d_out) in general). A comes from the run's seed and is never sent.
On ``method.name = 'mos'`` the whole A pool is frozen, layers' own shards included, and the same holds.
The paper's treatment of the classification head could not be verified; here ``method.head`` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class FFALora(Strategy):
    """Freezes A, trains and averages the rest."""

    name = "ffa-lora"
    methods = ("lora", "mos")
    exact = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``frozen`` for A and ``shared`` for the others."""
        return {kind: Role.FROZEN if kind.startswith("A") else Role.SHARED for kind in kinds}
