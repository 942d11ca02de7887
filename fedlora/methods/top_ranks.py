"""The update of a layer in which each token uses a few of the ranks: ``B (scale * top_k(A x))``.

Of the r numbers A x of a token the k largest in magnitude count, the others are zero. So the update is not linear in x,
but it is in B. A token is routed by its own input alone, in steps of fixed shapes, and rows stay independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class TopRanks(NamedTuple):
    """What a layer adds to its base where each token uses the ``active`` ranks of its largest ``|A x|``."""

    A: Tensor  # [*, r, d_in]
    B: Tensor  # [*, d_out, r]
    scale: float
    active: int  # k

    def of(self, x: Tensor) -> Tensor:
        """Return what is added for inputs [*, T, d_in], [*, T, d_out]; gradients pass to x by the ranks in use.

        A x is computed in float32 at least: of 16 bits many numbers would be equal, and chance would choose.
        """
        import torch

        wide = torch.promote_types(x.dtype, torch.float32)
        low = x.to(wide) @ self.A.to(wide).mT
        largest = low.detach().abs().topk(self.active, -1).indices
        mask = torch.zeros_like(low).scatter(-1, largest, 1.0)
        return (low * mask).to(x.dtype) @ (self.scale * self.B).to(x.dtype).mT
