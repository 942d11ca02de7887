"""S2-LoRA with its three factors trained in turn, a round each: s, then B, then A.

Our choice, after ``rolora``. Within a round two factors are the same for all clients and B diag(s) A is linear in the
third, so each average is exact, and yet all three learn. s comes first: it is the one that starts at zero, and while
it is zero no other factor has a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy

_ORDER = ("s", "B", "A")


@final
class S2Cyclic(Strategy):
    """Trains and averages s, B and A in turn."""

    name = "s2-cyclic"
    methods = ("s2-lora",)
    exact = True
    period = 3

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``shared`` for the factor whose turn it is, ``broadcast`` for the others."""
        turn = _ORDER[(server_round - 1) % 3]
        return {kind: Role.SHARED if kind == turn else Role.BROADCAST for kind in kinds}
