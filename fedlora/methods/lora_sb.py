"""LoRA-SB: ``y = W x + scale * B R A x`` with a trained core R of r x r numbers between fixed A and B.

Ponkshe, Singhal, Gorbunov, Tumanov, Horvath & Vepakomma, "Initialization using Update Approximation is a Silver Bullet
for Extremely Efficient Low-Rank Fine-Tuning", 2024, arXiv 2411.19557. (LoRA-XS, arXiv 2405.17604, has the same form.)

R starts at zero. A and B start by ``method.init``:

- ``auto``: from the seed, uniform, with rows of A and columns of B of length one on average. They are not orthonormal:
  for 384 features the singular values of A lie between 0.86 and 1.16 at rank 8, 0.6 and 1.4 at 64, 0.3 and 1.7 at 200;
- ``orthonormal``: the same kind of draw, with rows of A and columns of B made orthonormal (Q of its QR). As the former
  it costs no bytes, and every machine draws the same;
- ``gradient``: B has the first left and A the first right singular vectors of each weight's mean gradient over the
  rows of ``data.public-path`` (:mod:`fedlora.engine.starts`), at the model that the run starts with. The server
  sends them, once to a client that keeps them.

What differs from the paper:

- it takes the gradient of training rows, which would cost privacy that no ledger enters. Here it takes rows that are
  declared public, and no others;
- it decomposes the sign of the gradient, which is AdamW's first step, and starts R at the singular values, so that the
  model starts with that step taken. Here it is the gradient itself, and R starts at zero;
- the scale is alpha / r, as for LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, final

from fedlora.config import Config
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import fixed, orthonormal, refuse_rslora
from fedlora.methods.factors import Factor, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@final
class LoraSB(LowRankMethod):
    """LoRA-SB on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, the size of the cores.
        alpha: The numerator of the scale.
        orthonormal: Whether A and B start orthonormal.
        computed: Whether the server computes A and B.
    """

    strategies = ("local",)
    inits = ("orthonormal", "gradient")

    def __init__(
        self, layers: Sequence[Layer], *, rank: int, alpha: float, orthonormal: bool = False, computed: bool = False
    ) -> None:
        self.layers = tuple(layers)
        self.rank, self.orthonormal, self.computed = rank, orthonormal, computed
        self.scale = alpha / rank

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> LoraSB:
        """Return LoRA-SB of the rank ``method.rank``."""
        refuse_rslora(config)
        method, start = config.method, orthonormal(config, layers, config.method.rank)
        return cls(layers, rank=method.rank, alpha=method.alpha, orthonormal=start, computed=method.computed)

    def specs(self) -> dict[str, TensorSpec]:
        """Return for every layer ``<layer>.sb_A`` [r, d_in], ``.sb_B`` [d_out, r] and ``.sb_R`` [r, r]."""
        specs: dict[str, TensorSpec] = {}
        for layer in self.layers:
            name, product = layer.name, (layer.name,)
            for kind, shape in (("A", (self.rank, layer.d_in)), ("B", (layer.d_out, self.rank))):
                spec = fixed(kind, shape, product, self.orthonormal)
                specs[f"{name}.sb_{kind}"] = replace(spec, computed=self.computed)
            specs[f"{name}.sb_R"] = TensorSpec((self.rank, self.rank), "R", product, 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's R A and B."""
        return {
            layer.name: LowRank(
                tensors[f"{layer.name}.sb_R"] @ tensors[f"{layer.name}.sb_A"], tensors[f"{layer.name}.sb_B"], self.scale
            )
            for layer in self.layers
        }
