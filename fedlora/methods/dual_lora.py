"""Dual LoRA: two LoRA a layer, mixed: ``y = W x + scale * ((1 - a) B A + a B_own A_own) x``.

Yang, Long, Shen, Jiang & Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models" (FedDPA), NeurIPS
2024, arXiv 2403.19211. One is for a federation to share, the other for a client to keep; who trains which, and what
differs from the paper there, is in the strategy (``strategies/feddpa.py``).

The products are mixed, never the factors: ((1 - a) B + a B_own) ((1 - a) A + a A_own) would be another matrix. Both
together are one LoRA of rank 2 r, [A; A_own] and [(1 - a) B, a B_own], which is what a layer computes and what is
exported. a is ``dual-lora.mix``, 0.5 as in the paper, and the scale alpha / r. B and B_own start at zero, A and A_own
each at a draw of its own as in :mod:`fedlora.methods.lora`: the first step moves B and B_own, and from then on all four
learn.

The paper chooses a anew for each row at inference, by the cosine similarity of the row to some rows of the client. That
is not offered: a is one number for all rows, in training and after it, so the model stays a LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from fedlora.config import Config, Options, require
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank, concatenated

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class DualLoraOptions(Options):
    """Dual LoRA; read by ``method.name = 'dual-lora'`` only."""

    section: ClassVar[str] = "dual-lora"

    mix: float = 0.5
    """Weight a of the client's own update, beside 1 - a of the shared one; above 0 and below 1."""

    def __post_init__(self) -> None:
        """Check the fields."""
        rule = "must be above 0 and below 1: at either end one of the two updates would count for nothing."
        require(0 < self.mix < 1, "dual-lora.mix", self.mix, rule)


@final
class DualLora(LowRankMethod):
    """Dual LoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of each of the two.
        alpha: The numerator of the scale.
        mix: a, the weight of the own one.
    """

    strategies = ("local",)

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, mix: float) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.scale = alpha / rank
        self.mix = mix

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> DualLora:
        """Return dual LoRA of the rank ``method.rank`` with the keys of its section."""
        refuse_rslora(config)
        mix = config.options(DualLoraOptions).mix
        return cls(layers, rank=config.method.rank, alpha=config.method.alpha, mix=mix)

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.dual_A`` [r, d_in] and ``.dual_B`` [d_out, r], and ``_own`` of each.

        The two are products apart, so that a B that is trained does not hide that the other is fixed at zero.
        """
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            for which, product in (("", layer.name), ("_own", f"{layer.name}.own")):
                a, b = f"A{which}", f"B{which}"
                bound = 1.0 / math.sqrt(layer.d_in)
                specs[f"{layer.name}.dual_{a}"] = TensorSpec((self.rank, layer.d_in), a, (product,), bound)
                specs[f"{layer.name}.dual_{b}"] = TensorSpec((layer.d_out, self.rank), b, (product,), 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's two LoRA as one of rank 2 r, the shared one first."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            a, b, a_own, b_own = (tensors[f"{layer.name}.dual_{kind}"] for kind in ("A", "B", "A_own", "B_own"))
            both_b = concatenated([(1 - self.mix) * b, self.mix * b_own], -1)
            found[layer.name] = LowRank(concatenated([a, a_own], -2), both_b, self.scale)
        return found
