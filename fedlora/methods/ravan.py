"""Ravan: ``y = W x + scale * sum_i s_i B_i H_i A_i x``, several heads with a trained core and a trained scale each.

"RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning", NeurIPS 2025, arXiv 2506.05568; known from notes, the
authors' code was not at hand.

A head i of h has fixed A_i [r, d_in] and B_i [d_out, r] and trains H_i [r, r], which starts at zero, and s_i, which
starts at one. With r = ``method.rank`` the update has a rank of up to h r, for h (r^2 + 1) trained numbers a layer.
A and B are drawn from the seed and cost no bytes: uniform, with rows and columns of length one on average, or with
``method.init = 'orthonormal'`` so that the rows of all heads' A together are orthonormal, and the columns of B (the
paper's Gram-Schmidt start, as its notes describe it; the paper's other one is Gaussian). The scale is alpha / r, which
is our choice.

A client that trains k of the heads has H [k, r, r] and s [k] of these alone, and two fixed tensors of its own:
``ravan.places`` [k, h], whose row j is 1 at the j-th trained head and else 0, and ``<layer>.ravan_others`` [h, r, r],
the products s_i H_i of the other heads, zero at the trained ones. A and B stay common to all clients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, Options, at_least
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import fixed, orthonormal, refuse_rslora
from fedlora.methods.factors import Factor, LowRank

if TYPE_CHECKING:
    from torch import Tensor


_PLACES = "ravan.places"


@final
@dataclass(frozen=True)
class RavanOptions(Options):
    """Ravan; read by ``method.name = 'ravan'`` only."""

    section: ClassVar[str] = "ravan"

    heads: int = 4
    """Heads h of each layer, of the rank ``method.rank`` each."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("ravan.heads", self.heads, 1)


@final
class Ravan(LowRankMethod):
    """Ravan on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of a head.
        alpha: The numerator of the scale.
        heads: h.
        orthonormal: Whether A and B start orthonormal.
    """

    strategies = ("local",)
    inits = ("orthonormal",)

    def __init__(
        self, layers: Sequence[Layer], *, rank: int, alpha: float, heads: int, orthonormal: bool = False
    ) -> None:
        self.layers = tuple(layers)
        self.rank, self.heads, self.orthonormal = rank, heads, orthonormal
        self.scale = alpha / rank

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Ravan:
        """Return Ravan of the rank ``method.rank`` with the keys of its section."""
        refuse_rslora(config)
        heads, rank = config.options(RavanOptions).heads, config.method.rank
        start = orthonormal(config, layers, heads * rank)
        return cls(layers, rank=rank, alpha=config.method.alpha, heads=heads, orthonormal=start)

    @classmethod
    def whole_rank(cls, config: Config) -> tuple[str, int]:
        """Return the number of heads, some of which a client may train."""
        return "ravan.heads", config.options(RavanOptions).heads

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.ravan_A`` [h r, d_in], ``_B`` [d_out, h r], ``_H`` [h, r, r], ``_s`` [h]."""
        specs: dict[str, TensorSpec] = {}
        h, r = self.heads, self.rank
        for layer in self.layers:
            name, product = layer.name, (layer.name,)
            specs[f"{name}.ravan_A"] = fixed("A", (h * r, layer.d_in), product, self.orthonormal)
            specs[f"{name}.ravan_B"] = fixed("B", (layer.d_out, h * r), product, self.orthonormal)
            specs[f"{name}.ravan_H"] = TensorSpec((h, r, r), "H", product, 0.0, rank_axis=0)
            specs[f"{name}.ravan_s"] = TensorSpec((h,), "s", product, 0.0, rank_axis=0, start=1.0)
        return specs

    def folded(
        self, tensors: Mapping[str, NDArray[np.floating]], modules: Sequence[int]
    ) -> dict[str, NDArray[np.floating]]:
        """Return the places of the trained heads, and each layer's products s_i H_i of the others."""
        found: dict[str, NDArray[np.floating]] = {}
        for layer in self.layers:
            cores, s = (tensors[f"{layer.name}.ravan_{letter}"] for letter in "Hs")
            found[_PLACES] = np.eye(self.heads, dtype=cores.dtype)[list(modules)]
            others = s[:, None, None] * cores
            others[list(modules)] = 0.0
            found[f"{layer.name}.ravan_others"] = others
        return found

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B with the cores and their scales in A, all heads one behind the other."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            a, b, cores, s = (tensors[f"{layer.name}.ravan_{letter}"] for letter in "ABHs")
            if _PLACES in tensors:
                places = tensors[_PLACES]  # [*, k, h]; products and sums, as a matrix product might round in TF32
                others = tensors[f"{layer.name}.ravan_others"]
                cores = others + (places[..., None, None] * cores.unsqueeze(-3)).sum(-4)  # [*, h, r, r]
                s = (places * s.unsqueeze(-1)).sum(-2) + (1.0 - places.sum(-2))  # [*, h]
            heads = a.reshape(*a.shape[:-2], self.heads, self.rank, a.shape[-1])  # [*, h, r, d_in]
            scaled = s[..., None, None] * (cores @ heads)
            found[layer.name] = LowRank(scaled.flatten(-3, -2), b, self.scale)
        return found
