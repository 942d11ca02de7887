"""S2-LoRA with shared bases and personal rank coefficients: each client weighs common directions its own way.

Our choice, after ``fedsa-lora``. A and B are trained and averaged; s is trained and never leaves the client. There is
no global model; what is measured is each client on its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class S2Personal(Strategy):
    """Averages A and B; s is personal."""

    name = "s2-personal"
    methods = ("s2-lora",)
    exact = None
    personal = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``personal`` for s and ``shared`` for the bases."""
        return {kind: Role.PERSONAL if kind == "s" else Role.SHARED for kind in kinds}
