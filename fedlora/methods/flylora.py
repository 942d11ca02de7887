"""FlyLoRA: ``y = W x + scale * B top_k(A x)`` with a fixed, sparse, random A; B is trained, for each token by k ranks.

Zou, Zang, Xu, Zhu & Ji, "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
Mixture-of-Experts", NeurIPS 2025, arXiv 2510.08396; read against the authors' code (gfyddha/FlyLoRA), not the paper. A
is router and down-projection in one: of the r numbers A x of a token the k = ``flylora.active`` largest in magnitude
count. A row of A has d_in k / r entries that are not zero, rounded down, at random places. B starts at zero, the scale
is alpha / r. The authors have r = 32, k = 8 and alpha = 2 r.

A comes from the run's seed, is the same on every machine and of no tensor, so that no strategy can train or send it:
with an A of its own for each client a mean of B would mean nothing. With one for all, ``fedavg`` on B is exact, since
the update is linear in B for every token. With k = r it is LoRA under ``ffa-lora``, with another A.

What differs from the code:

- it adds a bias to A x when it chooses, and after every batch moves it towards ranks that were chosen less. That is
  state that follows from the rows: under DP it would leave the client without noise, and rows of a batch, or clients of
  a pack, would depend on each other. Our choice: the bias stays zero, where it starts;
- entries of A are uniform with the code's standard deviation 1/r, in place of normal, so that every machine draws the
  same bits, and such as bfloat16 holds;
- its version for PEFT chooses the largest numbers in place of the largest magnitudes, and computes A x without a
  gradient, so that layers below learn nothing through the adapter. Here it is as in its minimal version.

The update depends on the token by more than a matrix, so there is no export. Clients of different ranks are refused:
which ranks a token uses would differ between them.
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
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor
from fedlora.methods.fixed import Fixed, random_basis
from fedlora.methods.top_ranks import TopRanks
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class FlyLoraOptions(Options):
    """FlyLoRA; read by ``method.name = 'flylora'`` only."""

    section: ClassVar[str] = "flylora"

    active: int = 2
    """Ranks k of ``method.rank`` that each token uses, and the share k / r of A's entries that are not zero."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("flylora.active", self.active, 1)


@final
class FlyLora(LowRankMethod):
    """FlyLoRA on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r.
        alpha: The numerator of the scale.
        active: k.
        seeded: Draws A.

    Raises:
        ConfigError: There are fewer ranks than are to be active.
    """

    strategies = ("fedavg", "local")
    no_adapter = "each token chooses which ranks count for it, and a PEFT adapter is one LoRA for all tokens"

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, active: int, seeded: Seeded) -> None:
        rule = f"is above method.rank = {rank}, of which a token uses so many ranks; lower it."
        require(active <= rank, "flylora.active", active, rule)
        self.layers = tuple(layers)
        self.rank, self.active = rank, active
        self.scale = alpha / rank
        self._seeded = seeded
        self._fixed = Fixed(lambda key: self._drawn[key[0]])

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> FlyLora:
        """Return FlyLoRA of the rank ``method.rank`` with the keys of its section; A comes from the run's seed."""
        refuse_rslora(config)
        rank, alpha, active = config.method.rank, config.method.alpha, config.options(FlyLoraOptions).active
        return cls(layers, rank=rank, alpha=alpha, active=active, seeded=Seeded(config.seed))

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``<layer>.fly_B`` [d_out, r] for every layer."""
        return {
            f"{layer.name}.fly_B": TensorSpec((layer.d_out, self.rank), "B", (layer.name,), 0.0)
            for layer in self.layers
        }

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B, with the number of ranks that a token uses."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            b = tensors[f"{layer.name}.fly_B"]
            found[layer.name] = TopRanks(
                self._fixed.on(b.device, layer.name, dtype=b.dtype), b, self.scale, self.active
            )
        return found

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the A of every layer."""
        return {f"{name}.fly_A": a for name, a in self._drawn.items()}

    @functools.cached_property
    def _drawn(self) -> dict[str, NDArray[np.float32]]:
        return {layer.name: self._sparse(layer) for layer in self.layers}

    def _sparse(self, layer: Layer) -> NDArray[np.float32]:
        """Return a layer's A: in each row the entries at the first places of a random order."""
        shape = self.rank, layer.d_in
        dense = random_basis(self._seeded, "flylora", layer.name, shape=shape, bound=3**0.5 / self.rank)
        order = self._seeded.uniform("flylora places", layer.name, shape=shape, bound=1.0).argsort(1, kind="stable")
        places = order[:, : max(1, shape[1] * self.active // self.rank)]
        sparse = np.zeros_like(dense)
        np.put_along_axis(sparse, places, np.take_along_axis(dense, places, 1), 1)
        return sparse
