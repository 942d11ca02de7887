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

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors
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
        for name_a, name_b in self._pairs():
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
        tensors = state.tensors
        changed = {name: value for pair in self._pairs() for name, value in _refactor(tensors, *pair)}
        return replace(state, tensors={**tensors, **changed})

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the names of each layer's A and B."""
        by_product: dict[tuple[str, ...], dict[str, str]] = {}
        for name, spec in self.setting.specs.items():
            if spec.kind in ("A", "B"):
                by_product.setdefault(spec.factors, {})[spec.kind] = name
        for pair in by_product.values():
            yield pair["A"], pair["B"]


def _refactor(tensors: Tensors, name_a: str, name_b: str) -> Iterator[tuple[str, NDArray[np.floating]]]:
    """Yield A [r, d_in] with orthonormal rows and the B [d_out, r] that leaves B A as it was, each with its name."""
    a, b = (tensors[name].astype(np.float64) for name in (name_a, name_b))
    q_a, r_a = np.linalg.qr(a.T)  # [d_in, r], [r, r]
    q_b, r_b = np.linalg.qr(b)  # [d_out, r], [r, r]
    u, s, vt = np.linalg.svd(r_b @ r_a.T)  # the core: B A = Q_B (R_B R_A^T) Q_A^T
    rows = vt @ q_a.T
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    sign = np.where(largest < 0, -1.0, 1.0)  # [r, 1]
    yield name_a, (sign * rows).astype(tensors[name_a].dtype)
    yield name_b, (q_b @ (u * s) * sign.T).astype(tensors[name_b].dtype)
