"""RandLoRA: an update of full rank, ``y = W x + scale * sum_j B_j L_j A G_j x``, a sum of N random bases, scaled.

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel & Abbasnejad, "RandLoRA: Full-Rank Parameter-Efficient
Fine-Tuning of Large Models", ICLR 2025, arXiv 2502.00987; known from notes, and from the authors' code in PEFT, which
tests hold this against.

A [r, d] and B_j [D, r] are random and fixed, the same for all layers, each of which takes the first of their rows and
columns; d is the smaller of a layer's sides and D the larger. L_j and G_j are trained diagonals: L, [r, N], starts at
zero, G, [N, d], at 1 / d, as in PEFT. N = d / r, rounded up, so that the sum has full rank: a *higher* ``method.rank``
trains fewer numbers, about (d / r + 1) d a layer (r = 32 in the paper). The scale is alpha / r; the paper takes an
alpha of about 20 r. Where a layer has fewer outputs than inputs the sum is transposed, as in PEFT.

As PEFT has it, and the paper has not: B_j takes every N-th column of the bases as they are drawn, beginning with the
j-th, where the paper would take r side by side; the columns are random, so it is another draw of the same. What differs
from PEFT:

- bases come from the run's seed, uniform with a variance of one, where PEFT's are divided by the deviation of the
  draw; sparse bases are not offered;
- what is computed never has a factor of d x d numbers for a client (:mod:`fedlora.methods.scaled_bases`); PEFT makes
  one a layer, in an autograd function of its own that knows one client and no single rows.

The sum is linear in L given G, and in G given L. L and G have no axis that a client could have less of without another
sum, so clients of different ranks are refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.methods.base import Layer, LowRankMethod, PeftAdapter, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor
from fedlora.methods.fixed import Fixed, random_basis
from fedlora.methods.scaled_bases import ScaledBases
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


@final
class RandLora(LowRankMethod):
    """RandLoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of a basis.
        alpha: The numerator of the scale.
        seeded: Draws the bases.
    """

    strategies = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "lisa", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, seeded: Seeded) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.scale = alpha / rank
        self._seeded = seeded
        self._fixed = Fixed(lambda key: self._part(key[0], *map(int, key[1:])))

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> RandLora:
        """Return RandLoRA of the rank ``method.rank``; the bases come from the run's seed."""
        refuse_rslora(config)
        return cls(layers, rank=config.method.rank, alpha=config.method.alpha, seeded=Seeded(config.seed))

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.randlora_gamma`` [N, d] and ``.randlora_lambda`` [r, N]."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            name, product, d = layer.name, (layer.name,), min(layer.d_in, layer.d_out)
            specs[f"{name}.randlora_gamma"] = TensorSpec((self._count(d), d), "A_gamma", product, 0.0, start=1 / d)
            specs[f"{name}.randlora_lambda"] = TensorSpec((self.rank, self._count(d)), "B_lambda", product, 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's sum of scaled bases."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            scales, features = (tensors[f"{layer.name}.randlora_{which}"] for which in ("lambda", "gamma"))
            small, large = sorted((layer.d_in, layer.d_out))
            a = self._fixed.on(scales.device, "A", str(small), dtype=scales.dtype)
            b = self._fixed.on(scales.device, "B", str(small), str(large), dtype=scales.dtype)
            found[layer.name] = ScaledBases(a, b, scales.mT, features, self.scale, layer.d_out < layer.d_in)
        return found

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the bases in PEFT's shapes: ``A`` [r, 1, d] and ``B`` [D, N, r], with the d and D of PEFT.

        They are the larger of the layers' largest numbers of inputs and of outputs, and the smaller of these two.
        """
        return dict(self._bases)

    def peft_adapter(self, tensors: Mapping[str, Tensor]) -> PeftAdapter:
        """Return the adapter of PEFT's type RANDLORA, whose alpha is its rank, with the scale in lambda.

        PEFT expects the bases under the name of each layer, too, and warns where one lacks them.
        """
        import torch

        bases = {side: torch.from_numpy(whole).bfloat16() for side, whole in self._bases.items()}
        weights: dict[str, Tensor] = {}
        for name in ("", *(f"model.{layer.name}." for layer in self.layers)):
            weights |= {f"base_model.{name}randlora_{side}": whole.clone() for side, whole in bases.items()}
        for layer in self.layers:
            for which, scale in (("lambda", self.scale), ("gamma", 1.0)):
                name = f"{layer.name}.randlora_{which}"
                weights[f"base_model.model.{name}"] = scale * tensors[name]
        targets = sorted(layer.name for layer in self.layers)
        settings = {"r": self.rank, "randlora_alpha": self.rank, "target_modules": targets}
        return PeftAdapter("RANDLORA", settings, weights)

    @functools.cached_property
    def _bases(self) -> dict[str, NDArray[np.float32]]:
        d, large = sorted(max(getattr(layer, side) for layer in self.layers) for side in ("d_in", "d_out"))
        shapes = {"A": (self.rank, 1, d), "B": (large, self._count(d), self.rank)}
        draw = self._seeded
        return {
            name: random_basis(draw, "randlora", name, shape=shape, bound=math.sqrt(3))
            for name, shape in shapes.items()
        }

    def _count(self, features: int) -> int:
        """Return N, the bases of a layer whose smaller side has so many features."""
        return -(-features // self.rank)

    def _part(self, side: str, small: int, large: int = 0) -> NDArray[np.float32]:
        """Return what layers of one shape take of the bases: A [r, d], or B [D, N r], the r columns of B_j together."""
        whole = self._bases[side]
        if side == "A":
            return np.ascontiguousarray(whole[:, 0, :small])
        count = self._count(small)
        columns = whole[:large, :count].reshape(large, self.rank, count)  # the j-th of the last axis is B_j
        return np.ascontiguousarray(columns.swapaxes(1, 2)).reshape(large, count * self.rank)
