"""LoRA: ``y = W x + scale * B A x``, with A and B trained and W frozen.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
``scale`` is alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (rsLoRA, Kalajdzievski 2023,
arXiv 2312.03732). A starts Kaiming-uniform with a = sqrt(5), that is uniform on +-1/sqrt(d_in), as in
PEFT (the paper draws it from a Gaussian); B starts at zero. Adapter dropout is not offered: it would tie a
client's result to how clients are packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from fedlora.config import Config
from fedlora.methods.base import Factor, Layer, LowRank, LowRankMethod, Product, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@final
class Lora(LowRankMethod):
    """LoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        alpha: The numerator of the scale.
        rslora: Divide alpha by sqrt(r) instead of r.
    """

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, rslora: bool) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Lora:
        """Return LoRA of the rank ``method.rank``."""
        method = config.method
        return cls(layers, rank=method.rank, alpha=method.alpha, rslora=method.rslora)

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.lora_A`` [r, d_in] and ``<layer>.lora_B`` [d_out, r] for every layer."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            bound = 1.0 / math.sqrt(layer.d_in)
            specs[f"{layer.name}.lora_A"] = TensorSpec((self.rank, layer.d_in), "A", (layer.name,), bound, rank_axis=0)
            specs[f"{layer.name}.lora_B"] = TensorSpec((layer.d_out, self.rank), "B", (layer.name,), 0.0, rank_axis=1)
        return specs

    def products(self) -> list[Product]:
        """Return each layer's A and B with the scale."""
        return [Product(f"{layer.name}.lora_A", f"{layer.name}.lora_B", self.scale) for layer in self.layers]

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B with the scale, and its residual where there is one (:mod:`.residual`)."""
        factors: dict[str, Factor] = {}
        for layer in self.layers:
            residual = None
            if f"{layer.name}.residual_A" in tensors:
                a, b = tensors[f"{layer.name}.residual_A"], tensors[f"{layer.name}.residual_B"]
                residual = LowRank(a, b, self.scale)
            a, b = tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"]
            factors[layer.name] = LowRank(a, b, self.scale, residual)
        return factors
