"""LoRA that starts at factors of the base model, PiSSA's or LoRA-GA's: ``y = W x + s ((B0 + B) (A0 + A) - B0 A0) x``.

- ``method.init = 'pissa'``: Meng, Wang & Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of
  Large Language Models", NeurIPS 2024, arXiv 2404.02948. With W = U S V^T, s B0 A0 is the best approximation of rank r
  of the weight: A0 = (S / s)^(1/2) V^T and B0 = U (S / s)^(1/2), of the r largest singular values.
- ``method.init = 'lora-ga'``: Wang, Yu & Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024,
  arXiv 2407.05000. With G = U S V^T, the mean gradient of the weight over rows: A0 = c V[:, :r]^T and
  B0 = c U[:, r:2r], where c = d_out^(1/4) / gamma^(1/2) with gamma = 16 (the paper's stable scale), as in the authors'
  code (Outsider565/LoRA-GA, "ArB2r").

Both papers train A0 + A and B0 + B, and take s B0 A0 off the frozen weight, so that the model starts as its base. Here
the base stays untouched, and A and B are what has been added to A0 and B0; they start at zero. Gradients, steps of
optimizers and means of clients are those of the papers' factors, and what is gained is that nothing has to cancel:
expanded, the update is B (A0 + A) + B0 A, an ordinary LoRA of rank 2 r, which is what a layer computes and what is
exported (PEFT's own conversion has the same rank). It is zero at the start to the last bit, in 16 bits, too, where a
small step of B0 + B would be rounded away beside a large B0; ranks that a client does not hold are zero in A and B, and
so stay in its base; a client that keeps its B starts it at zero as every other tensor.

A0 and B0 are computed by the server and sent, once to a client that keeps them (:mod:`fedlora.engine.starts`): machines
round otherwise, and all must start from the same bits. A0 and B0 of ``pissa`` follow from the weights, so they cost no
privacy; those of ``lora-ga`` from the rows of ``data.public-path`` and no others. What differs from the papers, beside
what is written above:

- weight decay draws A and B to zero, and so the factors to A0 and B0; the papers' draws A0 + A and B0 + B to zero,
  which for PiSSA is a model without the leading part of its weights;
- LoRA-GA takes the gradient of training rows, which would cost privacy that no ledger enters;
- PEFT's ``lora_ga`` multiplies B0 by the singular values, and only B0 by c. The authors' code does not;
- ``ffa-lora`` trains B beside the fixed A0 alone ("PiSSA fixed" in FedSVD's table): of B0 nothing is left then, though
  it is sent.

Not for strategies that take the product B A of the trained factors for the whole update, or rotate or replace them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from fedlora.config import Config, require
from fedlora.methods.base import Layer, Method, TensorSpec
from fedlora.methods.factors import Factor, LowRank, concatenated

if TYPE_CHECKING:
    from torch import Tensor

STARTS = {"pissa": 1, "lora-ga": 2}
"""The starts, with the singular vectors that each takes of a layer for each of its ranks."""
_STRATEGIES = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "zero-padding", "local")


def refuse_strategy(config: Config) -> None:
    """Refuse a strategy that would take the product of the trained factors for the whole update."""
    init, name = config.method.init, config.strategy.name
    rule = f"does not go with strategy {name!r}, which may take B A for the whole update; use {', '.join(_STRATEGIES)}."
    require(name in _STRATEGIES, "method.init", init, rule)


def residual_of(layer: Layer, tensors: Mapping[str, Tensor], scale: float) -> LowRank | None:
    """Return a layer's residual (:mod:`.residual`) where the tensors have one."""
    if f"{layer.name}.residual_A" not in tensors:
        return None
    return LowRank(tensors[f"{layer.name}.residual_A"], tensors[f"{layer.name}.residual_B"], scale)


@final
class StartedLora(Method):
    """LoRA around factors A0 and B0 that the server computes.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        scale: s.
    """

    def __init__(self, layers: Sequence[Layer], *, rank: int, scale: float) -> None:
        self.layers = tuple(layers)
        self.rank, self.scale = rank, scale

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.lora_A`` and ``.lora_A0`` [r, d_in], ``.lora_B`` and ``.lora_B0`` [d_out, r] of every layer.

        B A0 and B0 A are products apart: each has a factor that starts at zero, and one that does not.
        """
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            name, of_b, of_a = layer.name, (layer.name,), (f"{layer.name}.start",)
            a, b = (self.rank, layer.d_in), (layer.d_out, self.rank)
            bound_a, bound_b = 1.0 / math.sqrt(layer.d_in), 1.0 / math.sqrt(layer.d_out)
            specs[f"{name}.lora_A"] = TensorSpec(a, "A", of_a, 0.0, rank_axis=0)
            specs[f"{name}.lora_B"] = TensorSpec(b, "B", of_b, 0.0, rank_axis=1)
            specs[f"{name}.lora_A0"] = TensorSpec(a, "A0", of_b, bound_a, rank_axis=0, computed=True)
            specs[f"{name}.lora_B0"] = TensorSpec(b, "B0", of_a, bound_b, rank_axis=1, computed=True)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's update as one LoRA of rank 2 r, [A0 + A; A] and [B, B0], with its residual."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            a, b, a0, b0 = (tensors[f"{layer.name}.lora_{kind}"] for kind in ("A", "B", "A0", "B0"))
            whole_a, whole_b = concatenated([a0 + a, a], -2), concatenated([b, b0], -1)
            found[layer.name] = LowRank(whole_a, whole_b, self.scale, residual_of(layer, tensors, self.scale))
        return found
