"""S2-LoRA: all matrices of one shape share A and B; each has sparse rank coefficients of its own.

``y = W_k x + (alpha / r) B diag(s_k) A x`` for the matrices k = 1 ... M of one shape [d_out, d_in].

Liu, Qin, Peng & Lee, "Sparsely Shared LoRA on Whisper for Child Speech Recognition", ICASSP 2024, arXiv 2309.11756.
From the abstract: both low-rank matrices are shared globally, each weight matrix has rank coefficients of its own,
which are constrained to be sparse. The paper's equations could not be read and there is no official code, so the
rest is our choice:

- one pair (A, B) for each shape, since one pair cannot serve two;
- s starts at zero, A and B as torch starts linear layers, uniform on +-1/sqrt(fan-in), which is d_in for A and r for B.
  Exactly one factor is zero: with two, no gradient would ever come; with none, the model would not start as its base.
  s is the one, so that s alone can train, with A and B fixed, and so that a step of s is not small beside what it
  multiplies;
- sparsity by a proximal step, s <- sign(s) max(|s| - learning rate * sparsity, 0), after each optimizer step (SoRA,
  Ding et al., EMNLP 2023, does the like), not by a penalty in the loss, which would never give exact zeros;
- AdaLoRA's penalty |A A^T - I|^2 + |B^T B - I|^2 (Zhang et al., ICLR 2023), off by default.
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
class S2Options(Options):
    """S2-LoRA; read by ``method.name = 's2-lora'`` only."""

    section: ClassVar[str] = "s2"

    sparsity: float = 0.1
    """Weight of the L1 penalty on the rank coefficients, applied as a proximal step after each optimizer step."""
    orthogonality: float = 0.0
    """Weight of the penalty that keeps the rows of A and the columns of B orthonormal; 0: none."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("s2.sparsity", self.sparsity, 0)
        at_least("s2.orthogonality", self.orthogonality, 0)


@final
class S2Lora(LowRankMethod):
    """S2-LoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        alpha: The numerator of the scale.
        sparsity: Weight of the L1 penalty on s.
        orthogonality: Weight of the orthogonality penalty on A and B.
    """

    def __init__(
        self, layers: Sequence[Layer], *, rank: int, alpha: float, sparsity: float, orthogonality: float
    ) -> None:
        self.rank = rank
        self.scale = alpha / rank
        self.sparsity = sparsity
        self.orthogonality = orthogonality
        self.classes: dict[str, list[Layer]] = {}
        for layer in layers:
            self.classes.setdefault(f"s2.{layer.d_out}x{layer.d_in}", []).append(layer)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> S2Lora:
        """Return S2-LoRA of the rank ``method.rank`` with the keys of its section."""
        refuse_rslora(config)
        rank, alpha, own = config.method.rank, config.method.alpha, config.options(S2Options)
        return cls(layers, rank=rank, alpha=alpha, sparsity=own.sparsity, orthogonality=own.orthogonality)

    @classmethod
    def without_penalties(cls, config: Config) -> Config:
        """Return the configuration without sparsity and orthogonality."""
        return config.with_options(replace(config.options(S2Options), sparsity=0.0, orthogonality=0.0))

    def specs(self) -> dict[str, TensorSpec]:
        """Return for each shape ``s2.<d_out>x<d_in>.A`` [r, d_in], ``.B`` [d_out, r] and ``.s`` [M, r]."""
        specs: dict[str, TensorSpec] = {}
        for name, layers in self.classes.items():
            d_out, d_in = layers[0].d_out, layers[0].d_in
            specs[f"{name}.A"] = TensorSpec((self.rank, d_in), "A", (name,), 1.0 / math.sqrt(d_in))
            specs[f"{name}.B"] = TensorSpec((d_out, self.rank), "B", (name,), 1.0 / math.sqrt(self.rank))
            specs[f"{name}.s"] = TensorSpec((len(layers), self.rank), "s", (name,), 0.0, l1=self.sparsity)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's shared A and B, with its own coefficients as the scale."""
        return {
            layer.name: LowRank(tensors[f"{name}.A"], tensors[f"{name}.B"], self.scale * s)
            for name, layers in self.classes.items()
            for layer, s in zip(layers, tensors[f"{name}.s"].unbind(-2), strict=True)
        }

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return ``orthogonality (|A A^T - I|^2 + |B^T B - I|^2)``, summed over the shapes, [*]."""
        if not self.orthogonality:
            return None
        import torch

        total = torch.zeros(())
        for name in self.classes:
            for rows in (tensors[f"{name}.A"], tensors[f"{name}.B"].mT):
                gram = rows @ rows.mT
                excess = gram - torch.eye(self.rank, dtype=rows.dtype, device=rows.device)
                total = total.to(rows) + excess.square().sum((-2, -1))
        return self.orthogonality * total

    def advice(self, fault: Fault) -> str:
        """Name the key that takes s to zero."""
        return {Fault.ZEROED: "s2.sparsity", Fault.HIDDEN: "as s is where s2.sparsity is too large"}[fault]
