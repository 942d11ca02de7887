"""FedSVD: as FFA-LoRA trains, and after each round the server turns the product into orthonormal A and B.

Lee, Park, Lee, et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", NeurIPS 2025,
arXiv 2505.12805; read against the authors' code (seanie12/fed-svd).

Clients train B with A fixed, so the mean of B A is exact. Then B A = U S V^T, B <- U S and A <- V^T: the same product,
with a new A that has orthonormal rows and is broadcast. With orthonormal A the gradient of B is bounded by what the
layer sees, which is what helps under clipping and noise. The server works on noised updates only, so privacy costs
nothing more. What differs from the authors' code:

- the singular vectors come from the r x r core of a QR of B and of A^T, not from the d_out x d_in product. Where
  B is zero, A stays what it was, up to a rotation of its rows, instead of becoming arbitrary unit vectors;
- A starts orthonormal, too. Rows of a Kaiming start have norm 0.58, so the first round's steps would be shorter;
- A is broadcast (d_in r numbers more a round) instead of computed again by each client, and the largest entry of
  each of its rows is made positive, so no two machines can differ in a sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import final

from fedlora.exchange import Tensors
from fedlora.methods.products import decompose, pairs
from fedlora.reduce import Reduced
from fedlora.roles import Role, Roles
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy


@final
class FedSVD(Strategy):
    """Trains and averages B, then refactors B A on the server."""

    name = "fedsvd"
    methods = ("lora",)
    exact = True
    keeps_basis = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        for _, name_a, name_b in pairs(setting.specs):
            (rank, d_in), (d_out, _) = setting.specs[name_a].shape, setting.specs[name_b].shape
            features = min(d_in, d_out)
            if rank > features:
                raise ValueError(
                    f"strategy 'fedsvd': the rank {rank} of {name_a} is above the layer's {features} features, so its "
                    f"A cannot have orthonormal rows; lower method.rank to {features}."
                )

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return ``broadcast`` for A and ``shared`` for the others."""
        return {kind: Role.BROADCAST if kind == "A" else Role.SHARED for kind in kinds}

    def changed(self, server_round: int) -> set[str]:
        """Return what is averaged, and A, which does not start as the seed gives it either."""
        return {"A"} | super().changed(server_round)

    def initial(self, seeded: Tensors) -> ServerState:
        """Return the seed's tensors with orthonormal A."""
        return self._refactored(super().initial(seeded))

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean with each layer's B A refactored."""
        return self._refactored(super().apply(state, reduced, server_round))

    def _refactored(self, state: ServerState) -> ServerState:
        tensors = dict(state.tensors)
        for _, a, b in pairs(self.setting.specs):
            u, s, vt = decompose(tensors[a], tensors[b])
            tensors |= {a: vt.astype(tensors[a].dtype), b: (u * s).astype(tensors[b].dtype)}
        return replace(state, tensors=tensors)
