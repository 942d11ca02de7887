"""SoRA: LoRA with a trained gate for each rank, ``y = W x + (alpha / r) B diag(g) A x``, which a proximal step closes.

Ding, Lv, Wang, Chen, Zhou, Liu & Sun, "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv
2311.11696; read against the authors' code (TsinghuaC3I/SoRA). A starts as LoRA's and B at zero; A, B and g [r] are
trained in each layer. After each optimizer step, g <- sign(g) max(|g| - learning rate * sparsity, 0): a gate at zero
takes its rank out of the layer, until a gradient larger than that opens it again. The server takes the step once more,
on the mean, which is sparse only where all clients are. Neither sees data, so under DP both are free.

What differs from the code:

- its step takes lambda, 3e-4 in its scripts, whatever the learning rate, 8e-4 there; here the threshold follows the
  learning rate and its schedule, as proximal steps do and as for ``s2-lora``. Their ratio is about the default;
- it sets to zero what is below lambda once lambda is taken from it, so all below 2 lambda; here it is the operator
  itself, which sets to zero what is below its threshold;
- its scripts add an L1 term of the gates to the loss, too, and may raise lambda by a schedule. Neither is here;
- it draws g from N(0, 1); here it is uniform, of the same variance, as all seeded tensors are;
- it has dropout before A, which would tie a client's result to how clients are packed.

The three factors are averaged apart, so the mean of updates is exact under no strategy that averages more than one.
Clients of a smaller rank hold the first ranks of A, B and g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from fedlora.config import Config, Options, at_least
from fedlora.methods.base import Fault, Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class SoraOptions(Options):
    """SoRA; read by ``method.name = 'sora'`` only."""

    section: ClassVar[str] = "sora"

    sparsity: float = 0.4
    """Weight of the L1 penalty on the gates, applied as a proximal step after each optimizer step; 0: none."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("sora.sparsity", self.sparsity, 0)


@final
class Sora(LowRankMethod):
    """SoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        alpha: The numerator of the scale.
        sparsity: Weight of the L1 penalty on g.
    """

    strategies = ("fedavg", "fedsa-lora", "zero-padding", "local")
    ragged = True

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, sparsity: float) -> None:
        self.layers = tuple(layers)
        self.rank, self.sparsity = rank, sparsity
        self.scale = alpha / rank

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Sora:
        """Return SoRA of the rank ``method.rank`` with the key of its section."""
        refuse_rslora(config)
        rank, alpha, sparsity = config.method.rank, config.method.alpha, config.options(SoraOptions).sparsity
        return cls(layers, rank=rank, alpha=alpha, sparsity=sparsity)

    @classmethod
    def without_penalties(cls, config: Config) -> Config:
        """Return the configuration without sparsity."""
        return config.with_options(replace(config.options(SoraOptions), sparsity=0.0))

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.sora_A`` [r, d_in], ``.sora_B`` [d_out, r] and ``.sora_g`` [r]."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            name, product, r = layer.name, (layer.name,), self.rank
            specs[f"{name}.sora_A"] = TensorSpec((r, layer.d_in), "A", product, 1 / math.sqrt(layer.d_in), rank_axis=0)
            specs[f"{name}.sora_B"] = TensorSpec((layer.d_out, r), "B", product, 0.0, rank_axis=1)
            specs[f"{name}.sora_g"] = TensorSpec((r,), "g", product, math.sqrt(3), l1=self.sparsity, rank_axis=0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B, with its gates as the scale."""
        factors: dict[str, Factor] = {}
        for layer in self.layers:
            a, b, g = (tensors[f"{layer.name}.sora_{kind}"] for kind in "ABg")
            factors[layer.name] = LowRank(a, b, self.scale * g)
        return factors

    def advice(self, fault: Fault) -> str:
        """Name the key that closes gates."""
        return {Fault.ZEROED: "sora.sparsity", Fault.HIDDEN: "as g is where sora.sparsity is too large"}[fault]
