"""LoRA-SB: ``y = W x + scale * B R A x`` with a trained core R of r x r numbers between fixed A and B.

Ponkshe, Singhal, Gorbunov, Tumanov, Horvath & Vepakomma, "Initialization using Update Approximation is a Silver Bullet
for Extremely Efficient Low-Rank Fine-Tuning", 2024, arXiv 2411.19557. (LoRA-XS, arXiv 2405.17604, has the same form.)

R starts at zero. What differs from the paper:

- the paper takes A and B from the singular vectors of a gradient of all weights, which is computed on training rows and
  so would cost privacy. Here they come from the seed: uniform, with rows of A and columns of B of length one on
  average. They are not orthonormal: for 384 features the singular values of A lie between 0.86 and 1.16 at rank 8, 0.6
  and 1.4 at 64, 0.3 and 1.7 at 200. So they cost no bytes, and every machine draws the same. That is our choice; the
  paper's start is not offered;
- the scale is alpha / r, as for LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from fedlora.config import Config
from fedlora.methods.base import Factor, Layer, LowRank, LowRankMethod, TensorSpec, refuse_rslora

if TYPE_CHECKING:
    from torch import Tensor


@final
class LoraSB(LowRankMethod):
    """LoRA-SB on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the size of the cores.
        alpha: The numerator of the scale.
    """

    strategies = ("local",)

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.scale = alpha / rank

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> LoraSB:
        """Return LoRA-SB of the rank ``method.rank``."""
        refuse_rslora(config)
        return cls(layers, rank=config.method.rank, alpha=config.method.alpha)

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.sb_A`` [r, d_in], ``.sb_B`` [d_out, r] and ``.sb_R`` [r, r]."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            name, product = layer.name, (layer.name,)
            specs[f"{name}.sb_A"] = TensorSpec((self.rank, layer.d_in), "A", product, math.sqrt(3 / layer.d_in))
            specs[f"{name}.sb_B"] = TensorSpec((layer.d_out, self.rank), "B", product, math.sqrt(3 / layer.d_out))
            specs[f"{name}.sb_R"] = TensorSpec((self.rank, self.rank), "R", product, 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's R A and B."""
        return {
            layer.name: LowRank(
                tensors[f"{layer.name}.sb_R"] @ tensors[f"{layer.name}.sb_A"], tensors[f"{layer.name}.sb_B"], self.scale
            )
            for layer in self.layers
        }
