"""S2-LoRA with frozen bases: only the rank coefficients s are trained and exchanged, r numbers a matrix.

Our choice; much like VeRA (Kopiczko, Blankevoort & Asano, ICLR 2024), whose random matrices are shared by all layers,
too. A and B come from the run's seed and are never sent. B diag(s) A is linear in s, so the average is exact; under
differential privacy no other strategy here has as few numbers to put noise on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class S2Frozen(Strategy):
    """Trains and averages s; A and B stay as seeded."""

    name = "s2-frozen"
    methods = ("s2-lora",)
    exact = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for s and ``frozen`` for the bases."""
        return {kind: Role.SHARED if kind == "s" else Role.FROZEN for kind in kinds}
