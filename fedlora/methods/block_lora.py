"""Block-LoRA: ``y = W x + scale * B A_s (x_1 + ... + x_n)``, LoRA whose A is one block for all n parts of the input.

Zhou, Shen, Yu, Bu & Wang, "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
Learning", 2025, arXiv 2501.16720. Its abstract alone was at hand: LoRA's matrices are split into sub-matrices, all of
the down-projection are shared, and multiplications become additions. The form here is our reading of that.

The input's d_in features are cut into n = ``block-lora.blocks`` parts of d_in / n, one after the other, and A_s
[r, d_in / n] is applied to their sum: A is A_s, n times side by side, divided by nothing. A layer trains
r (d_in / n + d_out) numbers; n = 1 is LoRA. Our choice, since it could not be verified: B is not split, A_s starts as
LoRA's A does, uniform on +-1/sqrt(d_in) with the whole d_in, B at zero, the scale is alpha / r, and eight blocks are
the default, after the title.

Strategies do with A_s and B as with LoRA's A and B. With A_s fixed, as in ``ffa-lora``, the mean is exact. Exported as
a LoRA with all of A. Clients of different ranks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from fedlora.config import Config, Options, at_least, require
from fedlora.methods.base import Layer, LowRankMethod, ScaledPair, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class BlockLoraOptions(Options):
    """Block-LoRA; read by ``method.name = 'block-lora'`` only."""

    section: ClassVar[str] = "block-lora"

    blocks: int = 8
    """Parts n of a layer's input that have one block of A in common; divides the inputs of each layer. 1: LoRA."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("block-lora.blocks", self.blocks, 1)


@final
class BlockLora(LowRankMethod):
    """Block-LoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        alpha: The numerator of the scale.
        blocks: n.

    Raises:
        ConfigError: A layer's inputs cannot be cut into so many parts, or have fewer features in a part than r.
    """

    strategies = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "lisa", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, blocks: int) -> None:
        key, inputs = "block-lora.blocks", [layer.d_in for layer in layers]
        fitting = ", ".join(str(n) for n in range(1, 17) if math.gcd(*inputs) % n == 0)
        for layer in layers:
            rule = f"does not divide the {layer.d_in} inputs of {layer.name}; of all layers {fitting} would."
            require(layer.d_in % blocks == 0, key, blocks, rule)
        most = max((size // blocks for size in inputs), default=rank)
        rule = f"leaves {most} inputs to a block, and method.rank = {rank} is above that; lower one of them."
        require(rank <= most, key, blocks, rule)
        self.layers = tuple(layers)
        self.rank, self.blocks = rank, blocks
        self.scale = alpha / rank

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> BlockLora:
        """Return Block-LoRA of the rank ``method.rank`` with the keys of its section."""
        refuse_rslora(config)
        rank, alpha = config.method.rank, config.method.alpha
        return cls(layers, rank=rank, alpha=alpha, blocks=config.options(BlockLoraOptions).blocks)

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.block_A`` [r, d_in / n] and ``<layer>.block_B`` [d_out, r] for every layer."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            product, bound = (layer.name,), 1.0 / math.sqrt(layer.d_in)
            shape = (self.rank, layer.d_in // self.blocks)
            specs[f"{layer.name}.block_A"] = TensorSpec(shape, "A", product, bound)
            specs[f"{layer.name}.block_B"] = TensorSpec((layer.d_out, self.rank), "B", product, 0.0)
        return specs

    def scaled_pairs(self) -> list[ScaledPair]:
        """Return each layer's A_s and B: A is sqrt(n) A_s T, where the rows of T are orthonormal."""
        scale = self.scale * math.sqrt(self.blocks)
        return [ScaledPair(f"{layer.name}.block_A", f"{layer.name}.block_B", scale) for layer in self.layers]

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A, its block n times side by side, and B."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            a, b = tensors[f"{layer.name}.block_A"], tensors[f"{layer.name}.block_B"]
            found[layer.name] = LowRank(a.tile(self.blocks), b, self.scale)
        return found
