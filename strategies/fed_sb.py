"""Fed-SB: the r x r cores of LoRA-SB are trained and averaged; A and B are fixed.

Singhal, Ponkshe, Vartak, Varshney & Vepakomma, "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and
Performance in (Private) Federated LoRA Fine-Tuning", TMLR 2026, arXiv 2502.15436; read against the authors' code
(CERT-Lab/fed-sb).

With one A and one B for all clients, sum_k p_k B R_k A = B (sum_k p_k R_k) A: the average is exact, and the noise of
DP-SGD enters the update linearly. A client sends r^2 numbers a layer, so ranks are high (32 to 200 in the paper). A and
B come from the seed and cost no bytes, or with ``method.init = 'gradient'`` from a gradient on public rows and are
sent, once to a client that keeps them (:mod:`fedlora.methods.lora_sb`, which says what differs from the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class FedSB(Strategy):
    """Trains and averages R; A and B are fixed."""

    name = "fed-sb"
    methods = ("lora-sb",)
    exact = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for R and ``frozen`` for the others."""
        return {kind: Role.SHARED if kind == "R" else Role.FROZEN for kind in kinds}
