"""LoRA: ``y = W x + scale * B A x``, with A and B trained and W frozen.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685.
``scale`` is alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (rsLoRA, Kalajdzievski 2023,
arXiv 2312.03732). A starts Kaiming-uniform with a = sqrt(5), that is uniform on +-1/sqrt(d_in), as in
PEFT (the paper draws it from a Gaussian), or with ``method.init = 'orthonormal'`` with orthonormal rows; B starts at
zero. With ``'pissa'`` or ``'lora-ga'`` both start otherwise: :mod:`fedlora.methods.lora_started`. Adapter dropout is
not offered: it would tie a client's result to how clients are packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.methods.base import Layer, LowRankMethod, Method, ScaledPair, TensorSpec
from fedlora.methods.checks import orthonormal
from fedlora.methods.factors import Factor, LowRank
from fedlora.methods.lora_started import STARTS, StartedLora, refuse_strategy, residual_of
from fedlora.methods.residual import folded

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
        orthonormal: Whether A starts with orthonormal rows.
    """

    ragged = True
    inits = ("orthonormal", *STARTS)

    def __init__(
        self, layers: Sequence[Layer], *, rank: int, alpha: float, rslora: bool, orthonormal: bool = False
    ) -> None:
        self.layers = tuple(layers)
        self.rank, self.orthonormal = rank, orthonormal
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Method:
        """Return LoRA of the rank ``method.rank``, as ``method.init`` has it start."""
        method = config.method
        start = orthonormal(config, layers, method.rank * STARTS.get(method.init, 1))
        lora = cls(layers, rank=method.rank, alpha=method.alpha, rslora=method.rslora, orthonormal=start)
        if method.init not in STARTS:
            return lora
        refuse_strategy(config)
        return StartedLora(layers, rank=method.rank, scale=lora.scale)

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.lora_A`` [r, d_in] and ``<layer>.lora_B`` [d_out, r] for every layer."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            shape, bound = (self.rank, layer.d_in), 1.0 / math.sqrt(layer.d_in)
            a = TensorSpec(shape, "A", (layer.name,), bound, rank_axis=0, orthonormal=self.orthonormal)
            specs[f"{layer.name}.lora_A"] = a
            specs[f"{layer.name}.lora_B"] = TensorSpec((layer.d_out, self.rank), "B", (layer.name,), 0.0, rank_axis=1)
        return specs

    def folded(
        self, tensors: Mapping[str, NDArray[np.floating]], modules: Sequence[int]
    ) -> dict[str, NDArray[np.floating]]:
        """Return as a residual what all ranks but these come to."""
        return folded(self.specs(), tensors, modules)

    def scaled_pairs(self) -> list[ScaledPair]:
        """Return each layer's A and B with the scale."""
        return [ScaledPair(f"{layer.name}.lora_A", f"{layer.name}.lora_B", self.scale) for layer in self.layers]

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B with the scale, and its residual where there is one (:mod:`.residual`)."""
        factors: dict[str, Factor] = {}
        for layer in self.layers:
            residual = residual_of(layer, tensors, self.scale)
            a, b = tensors[f"{layer.name}.lora_A"], tensors[f"{layer.name}.lora_B"]
            factors[layer.name] = LowRank(a, b, self.scale, residual)
        return factors
