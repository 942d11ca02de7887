"""MoS: layers of one projection type put their A and B together from shards of two common pools.

Wang, Chen, Chen, et al., "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards", ICLR
2025, arXiv 2410.00938; as in the authors' code (Forence1999/MoS).

With e the budget, r >= e the active rank, l shards a vector, p private ranks and L layers of the type:

- the A pool holds e L l shards of d_in / l numbers, the B pool as many of d_out / l;
- row j of A_k is the concatenation of the shards idx_k[j l] ... idx_k[j l + l - 1], column j of B_k likewise;
  ``y = W_k x + (alpha / r) B_k A_k x``, with the active r;
- *subset selection*: the first (r - p) l indices are drawn from the (e - p) L l shared shards, without replacement
  inside a layer; *pair dissociation*: for A and B apart; *vector sharding*: l > 1; *shard privatisation*: the last p l
  are the layer's own, the same for A and B. Each can be switched off; p = e = r, l = 1 is LoRA;
- A starts Kaiming-uniform with the fan-in of the full d_in, not of the short shard, and B at zero.

Parameters are those of LoRA of rank e, whatever r. The indices come from the run's seed, are the same on every machine
and are never sent. The paper's Figure 2 shows a router that neither its text nor the code has; there is none here.
Subset selection switched off is the paper's pure sharing: each layer takes the whole shared pool, so r must be
(e - p) L + p. The layer's own shards are tensors of their own (kinds ``A_private``, ``B_private``), so that a strategy
may keep them at the client, which is our extension: private to a layer is the paper's, private to a client is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, Options, at_least, require
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Factor, LowRank, concatenated
from fedlora.methods.fixed import Fixed
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class MosOptions(Options):
    """Mixture of Shards; read by ``method.name = 'mos'`` only."""

    section: ClassVar[str] = "mos"

    budget: int = 4
    """Rank e of the LoRA that has as many parameters: each pool holds budget x layers ranks."""
    shards: int = 4
    """Shards l that a row of A or a column of B is put together from; 1 switches vector sharding off."""
    private: int = 1
    """Ranks p of the budget that each layer has to itself; 0 switches shard privatisation off."""
    subset: bool = True
    """Whether each layer takes its own random subset of the shared shards; without, each takes all of them."""
    dissociation: bool = True
    """Whether A and B take shards independently of each other."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("mos.budget", self.budget, 1)
        at_least("mos.shards", self.shards, 1)
        at_least("mos.private", self.private, 0)
        require(
            self.private <= self.budget,
            "mos.private",
            self.private,
            f"must be at most mos.budget = {self.budget}, of which it is a part.",
        )


@final
@dataclass(frozen=True)
class _Type:
    """A projection type: layers whose names differ by their number only, of one shape."""

    name: str
    layers: tuple[Layer, ...]
    index: Mapping[str, NDArray[np.int64]]  # by side, "A" or "B": [L, r l], places in the pool, shared shards first


@final
class Mos(LowRankMethod):
    """Mixture of Shards on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the active rank.
        alpha: The numerator of the scale.
        config: Budget, shards, private ranks, and the devices that may be off.
        seeded: Draws the indices.

    Raises:
        ValueError: The numbers do not fit together, or not with the layers.
    """

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, config: MosOptions, seeded: Seeded) -> None:
        if rank < config.budget:
            raise ValueError(
                f"method.rank = {rank}: the active rank of mos must be at least mos.budget = {config.budget}; raise "
                "it, or lower mos.budget."
            )
        self.rank = rank
        self.scale = alpha / rank
        self.config = config
        grouped: dict[tuple[str, int, int], list[Layer]] = {}
        for layer in layers:
            grouped.setdefault((_starred(layer.name), layer.d_out, layer.d_in), []).append(layer)
        starred = [name for name, _, _ in grouped]
        self.types: list[_Type] = []
        for (name, d_out, d_in), own in grouped.items():
            key = name if starred.count(name) == 1 else f"{name}.{d_out}x{d_in}"
            self._check(own)
            self.types.append(_Type(key, tuple(own), self._draw(key, len(own), seeded)))
        by_name = {one.name: one.index for one in self.types}
        self._fixed = Fixed(lambda key: by_name[key[0]][key[1]])

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Mos:
        """Return MoS of the rank ``method.rank`` with the keys of its section; the indices come from the run's seed."""
        refuse_rslora(config)
        rank, alpha = config.method.rank, config.method.alpha
        return cls(layers, rank=rank, alpha=alpha, config=config.options(MosOptions), seeded=Seeded(config.seed))

    def _check(self, layers: Sequence[Layer]) -> None:
        rank, config, count = self.rank, self.config, len(layers)
        shared, taken = (config.budget - config.private) * count, rank - config.private
        where = f"{_starred(layers[0].name)} ({count} layer{'s' if count > 1 else ''})"
        if config.subset and taken > shared:
            raise ValueError(
                f"method.rank = {rank}: of {where} each takes method.rank - mos.private = {taken} ranks without "
                f"repetition from a pool of (mos.budget - mos.private) x layers = {shared}. Lower method.rank to "
                f"{shared + config.private}, raise mos.budget, lower mos.private, or leave these layers out of "
                "method.target-modules."
            )
        if not config.subset and taken != shared:
            raise ValueError(
                f"method.rank = {rank}: with mos.subset = false each layer of {where} takes the whole pool; set "
                f"method.rank = {shared + config.private}."
            )
        for size in (layers[0].d_in, layers[0].d_out):
            if size % config.shards:
                fitting = [str(n) for n in range(1, 17) if layers[0].d_in % n == layers[0].d_out % n == 0]
                raise ValueError(
                    f"mos.shards = {config.shards}: does not divide the {size} features of {where}; "
                    f"{', '.join(fitting)} would."
                )

    def _draw(self, name: str, count: int, seeded: Seeded) -> dict[str, NDArray[np.int64]]:
        """Return the places in the pools from which each of ``count`` layers takes its shards, by side."""
        config = self.config
        public = (config.budget - config.private) * count * config.shards
        taken = (self.rank - config.private) * config.shards
        own = config.private * config.shards
        private = public + np.arange(count * own, dtype=np.int64).reshape(count, own)

        def shared(side: str) -> NDArray[np.int64]:
            if not config.subset and side == "A":
                return np.tile(np.arange(public), (count, 1))
            draws = [seeded.permutation("mos", name, side, layer, size=public)[:taken] for layer in range(count)]
            return np.stack(draws)

        a = shared("A")
        b = shared("B") if config.dissociation else a
        return {"A": np.concatenate([a, private], 1), "B": np.concatenate([b, private], 1)}

    def specs(self) -> dict[str, TensorSpec]:
        """Return each type's pools.

        ``<type>.mos_A`` [(e - p) L l, d_in / l] and ``<type>.mos_A_private`` [p L l, d_in / l]; B likewise, with d_out.
        A pool without shards is not there.
        """
        config, specs = self.config, dict[str, TensorSpec]()
        for one in self.types:
            count = len(one.layers) * config.shards
            layer = one.layers[0]
            for side, size, bound in (("A", layer.d_in, 1.0 / math.sqrt(layer.d_in)), ("B", layer.d_out, 0.0)):
                for kind, ranks in ((side, config.budget - config.private), (f"{side}_private", config.private)):
                    if ranks:
                        shape = (ranks * count, size // config.shards)
                        specs[f"{one.name}.mos_{kind}"] = TensorSpec(shape, kind, (one.name,), bound)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's A and B, assembled from the pools."""
        factors: dict[str, Factor] = {}
        for one in self.types:
            rows_a = self._assembled(one, "A", tensors)
            rows_b = self._assembled(one, "B", tensors)
            for layer, a, b in zip(one.layers, rows_a.unbind(-3), rows_b.unbind(-3), strict=True):
                factors[layer.name] = LowRank(a, b.mT, self.scale)
        return factors

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the indices."""
        return {f"{one.name}.{side}": index for one in self.types for side, index in one.index.items()}

    def _assembled(self, one: _Type, side: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the rows of all layers of a type, [*, L, r, d]: one gather a pool."""
        names = (f"{one.name}.mos_{side}", f"{one.name}.mos_{side}_private")
        pool = concatenated([tensors[name] for name in names if name in tensors], -2)
        index = self._fixed.on(pool.device, one.name, side)
        # Shards are used by many layers, so their gradients are sums. These two ways add in a fixed order, each on its
        # own device; exchanged, they would add in whatever order threads happen to come.
        shards = pool[..., index, :] if pool.is_cuda else pool.index_select(-2, index.flatten())
        return shards.reshape(*pool.shape[:-2], len(one.layers), self.rank, -1)


def _starred(name: str) -> str:
    """Return a layer's name with its number starred, the projection type."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)
