"""Factors: what a layer computes from a method's tensors, in one of a few forms that the engine knows.

Shapes are written as in :mod:`.base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fedlora.methods.scaled_bases import ScaledBases
from fedlora.methods.square import Square
from fedlora.methods.top_ranks import TopRanks

if TYPE_CHECKING:
    from torch import Tensor


class LowRank(NamedTuple):
    """What a layer adds to its base: ``y = W x + out_scale * B (scale * A x)``, and the same of a residual."""

    A: Tensor  # [*, r, d_in]
    B: Tensor  # [*, d_out, r]
    scale: float | Tensor  # one number, or one for each rank [*, r]
    residual: LowRank | None = None  # without one of its own; common to all groups, or [*]
    out_scale: Tensor | None = None  # one number for each output [*, d_out]; None: 1

    def scaled_b(self) -> Tensor:
        """Return B with both scales folded in, [*, d_out, r]."""
        b = self.B * (self.scale if isinstance(self.scale, float) else self.scale.unsqueeze(-2))
        return b if self.out_scale is None else b * self.out_scale.unsqueeze(-1)


class WeightDecomposed(NamedTuple):
    """A layer whose weight is split in magnitude and direction: ``y = m (W x + B A x) / |W + B A| + bias``.

    Norms are those of rows, one an output, and constants in gradients.
    """

    update: LowRank  # without a residual
    magnitude: Tensor  # m - |W|, [*, d_out]


class Experts(NamedTuple):
    """What a layer adds to its base where a router weighs several low-rank updates for each token of its input x.

    The router's first M outputs are of the M experts, the rest of the client's own one; the M largest count, by their
    softmax.
    """

    own: LowRank  # the client's own expert
    all: LowRank  # the M experts side by side, A [*, M r, d_in] and B [*, d_out, M r]
    router: Tensor  # [*, 2 M - 1, d_in]
    is_own: Tensor  # [*, M], 1 where it is the client's own, whose weight goes to ``own``, and else 0


class Dense(NamedTuple):
    """A layer that is replaced: ``y = weight x + bias``."""

    weight: Tensor  # [*, d_out, d_in]
    bias: Tensor | None  # [*, d_out]


class Scale(NamedTuple):
    """A norm whose features are scaled anew: ``y = norm(x) * weight + bias``."""

    weight: Tensor  # [*, d]
    bias: Tensor | None  # [*, d]


Factor = LowRank | WeightDecomposed | ScaledBases | Square | TopRanks | Experts | Dense | Scale


def as_low_rank(factor: Factor) -> LowRank | None:
    """Return what a factor adds to its layer as one product, for exports and reports; None: it adds nothing to one.

    That of scaled bases has as many ranks as its layer has features, and more. Of a weight-decomposed layer it is what
    is added before its rows are brought to their magnitudes. Where it is another one for each token there is none.
    """
    if isinstance(factor, ScaledBases | Square):
        return LowRank(*factor.product(), 1.0)
    if isinstance(factor, WeightDecomposed):
        return factor.update
    return factor if isinstance(factor, LowRank) else None


def concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return matrices [*, n, m] one behind the other; some may be common to the groups of a pack and others not.

    Args:
        parts: The matrices.
        dim: Where they are put together, -2 or -1.
    """
    import torch

    lead = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))  # type: ignore[no-untyped-call]
    return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in parts], dim)
