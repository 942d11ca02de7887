"""NOLA: ``y = W x + scale * B A x`` with ``A = sum_i alpha_i A_i`` and ``B = sum_j beta_j B_j`` over random bases.

Koohpayegani, Navaneet, Nooralinejad, Kolouri & Pirsiavash, "NOLA: Compressing LoRA using Linear Combination of Random
Basis", ICLR 2024, arXiv 2310.02556; read against the authors' code (UCDvision/NOLA).

A layer trains 2 m coefficients, m = ``nola.bases`` of each side, whatever its shape and rank. The bases come from the
run's seed, uniform on +-1/sqrt(m) as in the code: a step of AdamW then moves A and B by about as much as in LoRA. The
scale is alpha / r. What differs from the code:

- the code adds sum_i alpha_i A_i to a fixed random A, with alpha and beta zero at the start. Here A is the combination
  alone: alpha starts uniform and independent by layer, so that A starts with the variance of LoRA's, and beta at zero.
  So nothing but coefficients has to be known, and alpha may stay fixed, as A does in FFA-LoRA;
- layers of one shape have their bases in common, and coefficients of their own. In the code each layer draws bases for
  itself, and again in every forward and backward pass; here a device holds them once, m r (d_in + d_out) numbers for
  each shape, and gradients are those of matrix products, by row, too (the code's own autograd function sums over rows);
- coefficients are not quantised.

The coefficients have no axis of ranks, so clients of different ranks are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, Options, at_least
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank
from fedlora.methods.fixed import Fixed, random_basis
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class NolaOptions(Options):
    """NOLA; read by ``method.name = 'nola'`` only."""

    section: ClassVar[str] = "nola"

    bases: int = 256
    """Random bases m of A and as many of B, each with a trained coefficient in every layer."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("nola.bases", self.bases, 1)


@final
class Nola(LowRankMethod):
    """NOLA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of the combinations.
        alpha: The numerator of the scale.
        bases: m.
        seeded: Draws the bases.
    """

    strategies = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, bases: int, seeded: Seeded) -> None:
        self.rank, self.bases = rank, bases
        self.scale = alpha / rank
        self.classes: dict[str, list[Layer]] = {}
        for layer in layers:
            self.classes.setdefault(f"nola.{layer.d_out}x{layer.d_in}", []).append(layer)
        self._seeded = seeded
        self._fixed = Fixed(lambda key: self._draw(key[0], key[1], bases))

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Nola:
        """Return NOLA of the rank ``method.rank`` with the keys of its section; the bases come from the run's seed."""
        refuse_rslora(config)
        rank, alpha, bases = config.method.rank, config.method.alpha, config.options(NolaOptions).bases
        return cls(layers, rank=rank, alpha=alpha, bases=bases, seeded=Seeded(config.seed))

    def specs(self) -> dict[str, TensorSpec]:
        """Return for each shape ``nola.<d_out>x<d_in>.alpha`` [L, m] and ``.beta`` [L, m], a row for each layer."""
        specs: dict[str, TensorSpec] = {}
        for name, layers in self.classes.items():
            shape, bound = (len(layers), self.bases), math.sqrt(3 / layers[0].d_in)  # as A's numbers: 1 / (3 d_in)
            specs[f"{name}.alpha"] = TensorSpec(shape, "A_alpha", (name,), bound)
            specs[f"{name}.beta"] = TensorSpec(shape, "B_beta", (name,), 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's combinations of its shape's bases."""
        found: dict[str, Factor] = {}
        for name, layers in self.classes.items():
            a = self._combined(name, "A", tensors[f"{name}.alpha"], (self.rank, layers[0].d_in))
            b = self._combined(name, "B", tensors[f"{name}.beta"], (layers[0].d_out, self.rank))
            for layer, own_a, own_b in zip(layers, a.unbind(-3), b.unbind(-3), strict=True):
                found[layer.name] = LowRank(own_a, own_b, self.scale)
        return found

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the first basis of each side and shape; the others go on where its numbers end."""
        return {f"{name}.{side}": self._draw(name, side, 1) for name in self.classes for side in "AB"}

    def _combined(self, name: str, side: str, coefficients: Tensor, shape: tuple[int, int]) -> Tensor:
        """Return combinations of a shape's bases: from coefficients [*, L, m] matrices [*, L, n, k]."""
        bases = self._fixed.on(coefficients.device, name, side, dtype=coefficients.dtype)
        return (coefficients @ bases).reshape(*coefficients.shape[:-1], *shape)

    def _draw(self, name: str, side: str, count: int) -> NDArray[np.float32]:
        """Return the first so many bases of a side, a row for each."""
        layer = self.classes[name][0]
        shape = count, self.rank * (layer.d_in if side == "A" else layer.d_out)
        return random_basis(self._seeded, name, side, shape=shape, bound=1 / math.sqrt(self.bases))
