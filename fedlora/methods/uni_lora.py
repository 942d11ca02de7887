"""Uni-LoRA: ``y = W x + B A x``, with every entry of all A and B taken from one trained vector theta.

Li, Han, Su, Li, Cai & Ji, "Uni-LoRA: One Vector Is All You Need", NeurIPS 2025, arXiv 2506.00799; known from its
abstract, and from PEFT (``UniLoraConfig``), which gives the same outputs and gradients from the same theta and places.

With D = ``uni-lora.length`` numbers in theta and N = r sum_k (d_in + d_out) entries in the factors of all layers, an
entry is theta_j / sqrt(n_j), where j is its place in theta and n_j how many entries have that place. So theta's way
into the factors is a fixed isometry, as in the paper. As in PEFT, places are a random order of 0, 1, ... D - 1, 0, 1
..., so that each comes N / D times, rounded down or up, and there is no scale alpha / r. They come from the run's seed,
are the same on every machine and are never sent.

- theta starts uniform on +-0.02, as in PEFT. The update then is not zero, as that of every other method is, but small:
  its numbers are below r 0.02^2 D / N, 1e-5 for MiniLM. It cannot start at zero: an update of second order in theta
  has no gradient there, and none would ever come.
- A and B are the same vector, so no strategy can fix, share or keep one of them apart from the other: ``fedavg`` and
  ``local`` are the strategies for it, and means are not exact.
- Not verified: how even the paper's places are, and which D it takes; the default is PEFT's.
- Exported as a LoRA: PEFT's own type draws places by NumPy's generator, and with places of ours in its files takes
  more bytes than A and B do.

theta has no axis of ranks, so clients of different ranks are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, Options, at_least, require
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_scale
from fedlora.methods.factors import Factor, LowRank
from fedlora.methods.fixed import Fixed
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor

_BOUND = 0.02


@final
@dataclass(frozen=True)
class UniLoraOptions(Options):
    """Uni-LoRA; read by ``method.name = 'uni-lora'`` only."""

    section: ClassVar[str] = "uni-lora"

    length: int = 256
    """Numbers D of the vector that all entries of A and B are taken from, and all that is trained beside the head."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("uni-lora.length", self.length, 1)


@final
class UniLora(LowRankMethod):
    """Uni-LoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of the factors.
        length: D.
        seeded: Draws the places.

    Raises:
        ConfigError: There are fewer entries than numbers.
    """

    strategies = ("fedavg", "local")

    def __init__(self, layers: Sequence[Layer], *, rank: int, length: int, seeded: Seeded) -> None:
        self.layers = tuple(layers)
        self.rank, self.length = rank, length
        self.entries = rank * sum(layer.d_in + layer.d_out for layer in layers)
        rule = f"the A and B of all layers have {self.entries} entries together, too few for each number; lower it."
        require(not layers or length <= self.entries, "uni-lora.length", length, rule)
        self._seeded = seeded
        self._fixed = Fixed(lambda key: self._order if key[0] == "order" else self._scale)

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> UniLora:
        """Return Uni-LoRA of the rank ``method.rank`` with the keys of its section; places come from the run's seed."""
        refuse_scale(config)
        length = config.options(UniLoraOptions).length
        return cls(layers, rank=config.method.rank, length=length, seeded=Seeded(config.seed))

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``uni.theta`` [D]."""
        return {"uni.theta": TensorSpec((self.length,), "theta", ("uni",), _BOUND, linear=False)}

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B: its entries of a random order of theta, repeated as often as there is need.

        Each number of what is repeated is taken once, so that its gradients are sums in a fixed order on any device.
        """
        theta = tensors["uni.theta"]
        order = self._fixed.on(theta.device, "order")
        scaled = theta * self._fixed.on(theta.device, "scale", dtype=theta.dtype)
        lead, times = theta.shape[:-1], -(-self.entries // self.length)
        repeated = scaled.unsqueeze(-2).expand(*lead, times, self.length).flatten(-2)
        entries = repeated.gather(-1, order.expand(*lead, self.entries))
        sizes = [self.rank * features for layer in self.layers for features in (layer.d_in, layer.d_out)]
        parts, found = iter(entries.split(sizes, -1)), dict[str, Factor]()  # type: ignore[no-untyped-call]
        for layer in self.layers:
            a, b = next(parts), next(parts)
            shapes = (self.rank, layer.d_in), (layer.d_out, self.rank)
            found[layer.name] = LowRank(a.unflatten(-1, shapes[0]), b.unflatten(-1, shapes[1]), 1.0)
        return found

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the places of the first layer's A; they stand for the others, which are of the same order."""
        return {"uni.places": self._order[: self.rank * self.layers[0].d_in] % self.length}

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        """The entries' order, [N]: of A_1, B_1, A_2 ..., row by row."""
        return self._seeded.permutation("uni-lora", size=self.entries)

    @functools.cached_property
    def _scale(self) -> NDArray[np.float64]:
        """What each number is multiplied with, [D]: one over the root of how many entries have its place."""
        often, once_more = divmod(self.entries, self.length)
        scale: NDArray[np.float64] = 1 / np.sqrt(often + (np.arange(self.length) < once_more))
        return scale
