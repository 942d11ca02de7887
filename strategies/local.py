"""No federation: each client trains by itself, and nothing is exchanged.

What a federation has to beat. Clients are sampled as in any other strategy, so a client takes as many steps here
as there. A head that others would share is kept by the client here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class Local(Strategy):
    """Keeps every tensor at its client."""

    name = "local"
    methods = ("lora", "mos", "s2-lora")
    exact = None
    personal = True
    ragged = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``personal`` for all kinds, and for the head unless it is frozen."""
        head = Role.PERSONAL if self.setting.head is Role.SHARED else self.setting.head
        return {**dict.fromkeys(kinds, Role.PERSONAL), "head": head}
