"""VeRA: ``y = W_k x + b_k * B (d_k * A x)``, one random A and B for all layers, two trained vectors for each.

Kopiczko, Blankevoort & Asano, "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv 2310.11454; as PEFT has
it (``VeraConfig``), which gives the same outputs and gradients from the same tensors.

A [r, d_in] and B [d_out, r] have the features of the widest layers; a narrower layer takes their first columns and
rows. They start Kaiming-uniform as in PEFT, on +-sqrt(6/d_in) and +-sqrt(6/r), and are never trained. d starts at
``vera.d-initial``, b at zero. There is no scale alpha / r. A layer has r + d_out trained numbers, so ranks are high
(256 to 1,024 in the paper), also above the layers' features, where d still has a number for each.

- A and B come from the run's seed by our own generator, not by PEFT's, which is not the same on all machines. They are
  no tensors of the method, so that no strategy can train or send them; machines compare their digest.
- d counts as a part of A and b as one of B (kinds ``A_d``, ``B_b``): strategies that freeze, share or keep A do so with
  d, as the authors of FedSA-LoRA have it for FFA and FedSA on VeRA. With one of the two fixed, means of the other are
  exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, Options, positive
from fedlora.methods.base import Layer, LowRankMethod, PeftAdapter, TensorSpec
from fedlora.methods.checks import refuse_scale
from fedlora.methods.factors import Factor, LowRank
from fedlora.methods.fixed import Fixed, random_basis
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class VeraOptions(Options):
    """VeRA; read by ``method.name = 'vera'`` only."""

    section: ClassVar[str] = "vera"

    d_initial: float = 0.1
    """What each number of d starts at."""

    def __post_init__(self) -> None:
        """Check the fields."""
        positive("vera.d-initial", self.d_initial)


@final
class Vera(LowRankMethod):
    """VeRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the inner dimension.
        d_initial: What d starts at.
        seeded: Draws A and B.
    """

    strategies = ("fedavg", "ffa-lora", "rolora", "fedsa-lora", "lisa", "local")
    rank_is_bounded = False

    def __init__(self, layers: Sequence[Layer], *, rank: int, d_initial: float, seeded: Seeded) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.d_initial = d_initial
        self._seeded = seeded
        self._fixed = Fixed(lambda key: self._part(key[0], int(key[1])))

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Vera:
        """Return VeRA of the rank ``method.rank`` with the keys of its section; A and B come from the run's seed."""
        refuse_scale(config)
        d_initial = config.options(VeraOptions).d_initial
        return cls(layers, rank=config.method.rank, d_initial=d_initial, seeded=Seeded(config.seed))

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.vera_d`` [r] and ``<layer>.vera_b`` [d_out]."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            product = (layer.name,)
            specs[f"{layer.name}.vera_d"] = TensorSpec((self.rank,), "A_d", product, 0.0, start=self.d_initial)
            specs[f"{layer.name}.vera_b"] = TensorSpec((layer.d_out,), "B_b", product, 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's part of A and B, with d as the scale of ranks and b as that of outputs."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            d, b = tensors[f"{layer.name}.vera_d"], tensors[f"{layer.name}.vera_b"]
            part_a = self._fixed.on(d.device, "A", str(layer.d_in), dtype=d.dtype)
            part_b = self._fixed.on(d.device, "B", str(layer.d_out), dtype=d.dtype)
            found[layer.name] = LowRank(part_a, part_b, d, out_scale=b)
        return found

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return A and B."""
        return dict(self._bases)

    def peft_adapter(self, tensors: Mapping[str, Tensor]) -> PeftAdapter:
        """Return the adapter of PEFT's type VERA, with A and B in it."""
        import torch

        bases = {side: torch.from_numpy(whole).bfloat16() for side, whole in self._bases.items()}
        weights: dict[str, Tensor] = {f"base_model.vera_{side}": whole for side, whole in bases.items()}
        for layer in self.layers:
            for vector in "db":
                name = f"base_model.model.{layer.name}.vera_lambda_{vector}"
                weights[name] = tensors[f"{layer.name}.vera_{vector}"]
        targets = sorted(layer.name for layer in self.layers)
        return PeftAdapter("VERA", {"r": self.rank, "d_initial": self.d_initial, "target_modules": targets}, weights)

    @functools.cached_property
    def _bases(self) -> dict[str, NDArray[np.float32]]:
        d_in, d_out = (max(getattr(layer, side) for layer in self.layers) for side in ("d_in", "d_out"))
        shapes = {"A": (self.rank, d_in), "B": (d_out, self.rank)}
        return {
            side: random_basis(self._seeded, "vera", side, shape=shape, bound=math.sqrt(6 / shape[1]))
            for side, shape in shapes.items()
        }

    def _part(self, side: str, features: int) -> NDArray[np.float32]:
        """Return what layers of so many features take: the first columns of A, or rows of B."""
        whole = self._bases[side]
        return np.ascontiguousarray(whole[:, :features] if side == "A" else whole[:features])
