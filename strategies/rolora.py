"""RoLoRA: A and B are trained in turn, a round each.

Chen, Guo, Ju, Dalal, Zhu & Khisti, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA", NeurIPS
2025, arXiv 2502.01755. The authors' code, in a supplement, was not at hand.

In odd rounds B is trained and averaged and A stays, in even rounds the other way round. Within a round one factor is
the same for all clients, so sum_k p_k (B_k A) = (sum_k p_k B_k) A: each average is exact, as in ``ffa-lora``, and
yet A learns. A client sends one factor a round; one that keeps what it was sent needs only the factor that the round
before has changed. On ``method.name = 'mos'`` the pools are trained in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class RoLoRA(Strategy):
    """Trains and averages B in odd rounds and A in even ones."""

    name = "rolora"
    methods = ("lora", "mos")
    exact = True
    period = 2

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for the factor whose turn it is, ``broadcast`` for the other."""
        turn = "B" if server_round % 2 else "A"
        return {kind: Role.SHARED if kind.startswith(turn) else Role.BROADCAST for kind in kinds}
