"""DoRA: ``y = m (W x + s B A x) / |W + s B A| + bias``, a trained magnitude m beside a direction that LoRA trains.

Liu, Wang, Yin, Molchanov, Wang, Cheng & Chen, "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv
2402.09353; as PEFT has it (``use_dora = True``), which gives the same outputs and gradients from the same tensors.

The norms |.| are those of the rows of the weight, one for each output. In gradients they are constants, as in PEFT and
in section 4.3 of the paper: A and B get LoRA's gradient times m / |W + s B A|. s is alpha / r, A and B start as in
:mod:`fedlora.methods.lora`, and m at |W|, so that the model starts as its base.

What is trained is m - |W|, which starts at zero: gradients, steps of optimizers and means of clients are those of m,
and no machine has to agree with another on the last digit of |W|. Weight decay differs: it draws m to the base's norm
and not, as in PEFT, to zero. It is of the kind ``B_m``, since it belongs to the outputs as B does: it is trained,
shared and kept together with B.

Because of the norm an update is not linear in A or in B, so means of clients are exact under no strategy, also not
under those that are exact for LoRA (:attr:`fedlora.methods.TensorSpec.linear`). How the engine has the norms:
:mod:`fedlora.engine.decomposed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, final

from fedlora.config import Config
from fedlora.methods.base import Layer, LowRankMethod, ScaledPair, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank, WeightDecomposed
from fedlora.methods.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor


@final
class Dora(LowRankMethod):
    """DoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        alpha: The numerator of the scale.
    """

    strategies = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "lisa", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float) -> None:
        self.layers = tuple(layers)
        self.lora = Lora(layers, rank=rank, alpha=alpha, rslora=False)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Dora:
        """Return DoRA of the rank ``method.rank``."""
        refuse_rslora(config)
        return cls(layers, rank=config.method.rank, alpha=config.method.alpha)

    def specs(self) -> dict[str, TensorSpec]:
        """Return LoRA's tensors, and ``<layer>.lora_magnitude`` [d_out] for every layer: m - |W|."""
        specs = {name: replace(spec, linear=False, rank_axis=None) for name, spec in self.lora.specs().items()}
        for layer in self.layers:
            name = f"{layer.name}.lora_magnitude"
            specs[name] = TensorSpec((layer.d_out,), "B_m", (name,), 0.0)
        return specs

    def scaled_pairs(self) -> list[ScaledPair]:
        """Return LoRA's: norms are constants in gradients, so A and B get those of a product."""
        return self.lora.scaled_pairs()

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's LoRA with its magnitude."""
        found: dict[str, Factor] = {}
        for name, update in self.lora.factors(tensors).items():
            assert isinstance(update, LowRank), "what LoRA adds"
            found[name] = WeightDecomposed(update, tensors[f"{name}.lora_magnitude"])
        return found
