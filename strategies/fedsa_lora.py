"""FedSA-LoRA: A is trained and averaged, B is trained and never leaves the client.

Guo, Zeng, Wang, Fan, Wang & Qu, "Selective Aggregation for Low-Rank Adaptation in Federated Learning", ICLR 2025,
arXiv 2410.01463.

A <- sum_k p_k A_k, while each client goes on with its own B: half the bytes of ``fedavg`` for square layers,
d_in / (d_in + d_out) in general. There is no global model; what is measured is each client on its own rows. The
paper keeps the classification head local, too: that is ``method.head = 'personal'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class FedSALora(Strategy):
    """Averages A; the rest is personal."""

    name = "fedsa-lora"
    methods = ("lora", "mos")
    exact = None
    personal = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for A and ``personal`` for the others."""
        return {kind: Role.SHARED if kind.startswith("A") else Role.PERSONAL for kind in kinds}
