"""FedRot-LoRA: each client's A and B are turned towards the server's before they are averaged.

"FedRot-LoRA", 2026, arXiv 2602.23638; its rule is known from notes on the authors' code.

B A = (B Q^T) (Q A) for every rotation Q, so what a client has learned can be written in many bases, and means of A and
B taken apart lose what is written in unlike ones. Here each client's update is turned by the rotation that brings it
nearest to what the client was sent: in odd rounds Q minimises |A_sent - Q A_k|, in even ones |B_sent - B_k Q^T|
(orthogonal Procrustes, det Q = 1), and it is turned part of the way: to the rotation nearest to
(1 - t) I + t Q, with t = ``fedrot.share``, 0.5 in the paper. Then A and B are averaged as in ``fedavg``.

Directions that the product of sent and returned factors leaves open (B of few ranks, layers narrower than r) are not
turned: a hundred-thousandth of its norm on its diagonal decides them, which is our choice.

No bytes more, and no client's product changes, so nothing is lost where all are alike. In the paper clients turn their
update before they send it. Here the server does: it knows what it sent, and clients need to know nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Options, require
from fedlora.exchange import Tensors
from fedlora.methods.products import pairs
from fedlora.reduce import Reduced, weighted_mean
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy

Array = NDArray[np.float64]

_LEAST = 1e-5


@final
@dataclass(frozen=True)
class FedRotOptions(Options):
    """FedRot-LoRA; read by ``strategy.name = 'fedrot-lora'`` only."""

    section: ClassVar[str] = "fedrot"

    share: float = 0.5
    """How far a client's factors are turned towards the server's, 0 to 1."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 <= self.share <= 1, "fedrot.share", self.share, "must be from 0 to 1.")


@final
class FedRotLoRA(Strategy):
    """Turns and averages A and B."""

    name = "fedrot-lora"
    methods = ("lora",)
    exact = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._share = setting.config.options(FedRotOptions).share

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the means of the turned tensors."""
        turned = [
            replace(one, tensors={**one.tensors, **self._turned(state.tensors, one.tensors, server_round)})
            for one in reduced.updates
        ]
        return replace(state, tensors={**state.tensors, **weighted_mean(turned, self.expected(server_round))})

    def _turned(self, sent: Tensors, update: Tensors, server_round: int) -> dict[str, Array]:
        """Return a client's factors, turned towards what it was sent."""
        found: dict[str, Array] = {}
        for _, name_a, name_b in pairs(self.setting.specs):
            a, b = update[name_a].astype(np.float64), update[name_b].astype(np.float64)
            cross = sent[name_a] @ a.T if server_round % 2 else sent[name_b].T @ b  # [r, r]
            cross = cross.astype(np.float64)
            # Directions that nothing determines (B of few ranks, narrow layers) stay as they are, above rounding.
            cross += _LEAST * np.linalg.norm(cross) * np.eye(len(cross))
            q = partly(rotation(cross), self._share)
            found |= {name_a: q @ a, name_b: b @ q.T}
        return found


def rotation(m: Array) -> Array:
    """Return the rotation Q (det Q = 1) that maximises trace(Q^T m), [r, r]; the identity where m is zero.

    It minimises ``|X - Q Y|`` for m = X Y^T (orthogonal Procrustes; Kabsch's sign for the last direction).
    """
    if not np.any(m):
        return np.eye(len(m))
    u, _, vt = np.linalg.svd(m)
    u[:, -1] *= np.sign(np.linalg.det(u @ vt))
    q: Array = u @ vt
    return q


def partly(q: Array, share: float) -> Array:
    """Return the rotation nearest to ``(1 - share) I + share q``."""
    return rotation((1 - share) * np.eye(len(q)) + share * q)
