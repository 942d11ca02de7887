"""The update of a layer as a sum of scaled bases: ``sum_j B_j diag(l_j) A diag(g_j) x``, bases common to all groups.

Written as one product it has a factor of d x d numbers for each group, as the sum has full rank. Here the bases stay
what they are, one matrix for the rows of all groups, and only the scales differ by group: a pass holds about as many
numbers for each token as one more layer of the base does, and none of d x d for a group.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 8  # bases of a sum that are computed at once: a few large steps, of so many times what a token has


class ScaledBases(NamedTuple):
    """What a layer adds to its base: ``y = W x + scale * sum_j B_j diag(l_j) A diag(g_j) x``.

    With d the smaller of d_in and d_out and D the larger. Where the outputs are fewer than the inputs, the sum is
    transposed, ``sum_j diag(g_j) A^T diag(l_j) B_j^T x``, so that A and g are on the side of the fewer features.
    """

    A: Tensor  # [r, d]
    B: Tensor  # [D, N r], the N bases side by side
    rank_scales: Tensor  # l, [*, N, r]
    feature_scales: Tensor  # g, [*, N, d]
    scale: float
    transposed: bool

    def of(self, x: Tensor) -> Tensor:
        """Return what is added for inputs [*, T, d_in], [*, T, d_out]."""
        import torch
        from torch.utils.checkpoint import checkpoint

        a, b, ranks, features = (one.to(x.dtype) for one in self[:4])
        ranks = self.scale * ranks.unsqueeze(-3)  # [*, 1, N, r]
        chunks = [slice(at, at + _TOGETHER) for at in range(0, features.shape[-2], _TOGETHER)]
        if not self.transposed:
            parts = [(x.unsqueeze(-2) * features[..., None, chunk, :]) @ a.mT for chunk in chunks]
            return (torch.cat(parts, -2) * ranks).flatten(-2) @ b.mT
        seen = (x @ b).reshape(*x.shape[:-1], *ranks.shape[-2:]) * ranks  # [*, T, N, r]
        # Computed again for the gradient of g: kept, it would be N times the output.
        parts = [
            checkpoint(
                _summed,
                seen[..., chunk, :],
                a,
                features[..., None, chunk, :],
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for chunk in chunks
        ]
        return functools.reduce(torch.add, parts)

    def product(self) -> tuple[Tensor, Tensor]:
        """Return factors [*, R, d_in] and [*, d_out, R] of the whole sum, R = N r: d x d numbers and more."""
        inner = self.rank_scales.unsqueeze(-1) * self.A * self.feature_scales.unsqueeze(-2)  # [*, N, r, d]
        small = inner.flatten(-3, -2)
        return (self.B.mT, self.scale * small.mT) if self.transposed else (small, self.scale * self.B)


def _summed(seen: Tensor, a: Tensor, features: Tensor) -> Tensor:
    """Return ``sum_j diag(g_j) A^T z_j`` of some bases: from z [*, T, n, r] and g [*, 1, n, d], [*, T, d]."""
    return ((seen @ a) * features).sum(-2)
