"""MoS with shards that never leave the client: our personalisation, not the paper's.

The paper's private shards belong to a layer; here they belong to a layer of a client. The shared pools are averaged
as in ``mos``, the layers' own shards are trained and kept. A share ``mos.private / mos.budget`` of the bytes is saved,
each client has a model of its own, and what is measured is each client on its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from fedlora.config import Config
from fedlora.methods import MosOptions
from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy


@final
class MoSPersonal(Strategy):
    """Averages the shared pools; each layer's own shards are personal."""

    name = "mos-personal"
    methods = ("mos",)
    exact = None
    personal = True

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``personal`` for the layers' own shards and ``shared`` for the pools."""
        return {kind: Role.PERSONAL if kind.endswith("_private") else Role.SHARED for kind in kinds}

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse pools in which nothing is personal, or nothing shared."""
        mos = config.options(MosOptions)
        if not 0 < mos.private < mos.budget:
            raise ValueError(
                f"mos.private = {mos.private}: strategy 'mos-personal' needs shards of each layer's own and shared "
                f"ones; set it to 1 or more, and below mos.budget = {mos.budget}."
            )
