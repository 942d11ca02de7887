"""MoRA: ``y = W x + C R S x`` with a trained square matrix R between fixed sums S of inputs and copies C of outputs.

Jiang et al., "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", 2024, arXiv 2405.12130; read against the
authors' code (kongds/MoRA), not the paper. R is [q, q] with q the whole number nearest to sqrt((d_in + d_out) r), as in
the code: a layer trains about as many numbers as LoRA of rank r = ``method.rank``, and the update has the rank q. R
starts at zero. S and C are those of :mod:`fedlora.methods.square`; as in the code there is no scale.

That is the code's type 1, "sharing", which its authors use at large r. What is not built:

- type 6, which rotates each part of the input by its place and has R act on it alone, which its authors use at small
  r. Each part of the output sees another part of the input, so that the update has the rank of the whole layer, and no
  LoRA of fewer ranks could hold it in an export;
- types 2 to 4, which sum or repeat neighbours, and merging into the base and starting anew (ReMoRA).

R is all that is trained, and the update is linear in it: ``fedavg`` is exact, and noise of DP-SGD enters linearly.
Exported as a LoRA with A = S and B = C R, of rank q. R's rows belong to outputs, not to ranks, so clients of
different ranks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from fedlora.config import Config, require
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_scale
from fedlora.methods.factors import Factor
from fedlora.methods.square import Square

if TYPE_CHECKING:
    from torch import Tensor


@final
class Mora(LowRankMethod):
    """MoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of the LoRA that has about as many numbers.

    Raises:
        ConfigError: A layer has fewer features than R would have rows.
    """

    strategies = ("fedavg", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int) -> None:
        self.layers = tuple(layers)
        self.sizes = {layer.name: _nearest_root((layer.d_in + layer.d_out) * rank) for layer in layers}
        for layer in layers:
            least, size = min(layer.d_in, layer.d_out), self.sizes[layer.name]
            fitting = least * (least + 1) // (layer.d_in + layer.d_out)
            cure = f"lower it to {fitting}" if fitting else "leave that layer out of method.target-modules"
            rule = f"makes a square matrix of {size} rows for {layer.name}, which has {least} features; {cure}."
            require(size <= least, "method.rank", rank, rule)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Mora:
        """Return MoRA with as many numbers as LoRA of the rank ``method.rank``."""
        refuse_scale(config)
        return cls(layers, rank=config.method.rank)

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.mora_R`` [q, q] for every layer."""
        return {f"{name}.mora_R": TensorSpec((size, size), "R", (name,), 0.0) for name, size in self.sizes.items()}

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's R."""
        return {layer.name: Square(tensors[f"{layer.name}.mora_R"], layer.d_in, layer.d_out) for layer in self.layers}


def _nearest_root(number: int) -> int:
    """Return the nearest whole number to a square root, by whole numbers alone."""
    return (math.isqrt(4 * number) + 1) // 2
