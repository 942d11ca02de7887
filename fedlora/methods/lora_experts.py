"""LoRA experts with a router: ``y = W x + scale * sum_i w_i(x) B_i A_i x``, with the weights w chosen for each token.

Wang, Bian, Zhang & Xu, "Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning" (FedLEASE), NeurIPS
2025, arXiv 2509.15087. Of M experts one is the client's own and trained; the others are as the server has sent them.
The router G [2 M - 1, d_in] has an output for each expert, and M - 1 more for the client's own one, which so stands M
times among them. The M largest of the outputs G x count, by their softmax:

    w_i = (sum of those outputs of expert i that are among the M largest), the M largest of G x softmaxed.

At least one of them is the client's own, so between 1 and M experts act on a token, as the token has it: an adaptive
top-M. In the authors' code (lei-wang-link/FedLEASE) the softmax comes first and the M largest are divided by their sum,
which is the same. Who owns, trains and sends what is in ``strategies/fedlease.py``.

- A and B are the client's own expert, A_all and B_all all of them. Its own one there is the copy that it started from,
  and has no weight: ``experts.own`` is 1 for it and 0 for the others.
- As the seed has it ``experts.own`` is 1 for all: then all weight is on A and B, and the method is LoRA.
- There are at most ``lora-experts.max-experts`` of them. Where there are fewer, A_all and B_all have fewer, and the
  router's first 2 M - 1 outputs are used.
- The router starts as A does, uniform on +-1/sqrt(d_in), as in the authors' code. Its outputs are computed in float32
  at least, since of 16 bits many would be equal. There is no loss that balances the experts, as in the code.

The update depends on the token, so it is no matrix that PEFT could hold, and there is no export. A token is routed by
its own input alone: rows stay independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from fedlora.config import Config, Options, require
from fedlora.experts import ALL, OWN
from fedlora.methods.base import Layer, LowRankMethod, TensorSpec
from fedlora.methods.checks import refuse_rslora
from fedlora.methods.factors import Experts, Factor, LowRank

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class LoraExpertsOptions(Options):
    """LoRA experts; read by ``method.name = 'lora-experts'`` only."""

    section: ClassVar[str] = "lora-experts"

    max_experts: int = 4
    """Experts at most, at least 2; how many there are is found from the clients' first updates."""

    def __post_init__(self) -> None:
        """Check the fields."""
        rule = "must be at least 2: a router has nothing to choose from one expert; strategy 'fedavg' has one LoRA."
        require(self.max_experts >= 2, "lora-experts.max-experts", self.max_experts, rule)


@final
class LoraExperts(LowRankMethod):
    """LoRA experts on a set of layers.

    Args:
        layers: The adapted layers.
        rank: r, of each expert.
        alpha: The numerator of the scale.
        most: The largest number M of experts.
    """

    no_adapter = "its router weighs several LoRA anew for each token, and a PEFT adapter is one LoRA for all tokens"

    def __init__(self, layers: Sequence[Layer], *, rank: int, alpha: float, most: int) -> None:
        self.layers = tuple(layers)
        self.rank = rank
        self.scale = alpha / rank
        self.most = most

    @classmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> LoraExperts:
        """Return experts of the rank ``method.rank`` with the keys of their section."""
        refuse_rslora(config)
        most = config.options(LoraExpertsOptions).max_experts
        return cls(layers, rank=config.method.rank, alpha=config.method.alpha, most=most)

    def specs(self) -> dict[str, TensorSpec]:
        """Return ``experts.own``, and ``<layer>.expert_A``, ``.expert_B``, both with ``_all`` as well, and ``.router``.

        All of a layer are one product: a B that is zero hides its A and, until some B is not, the router.
        """
        specs = {OWN: TensorSpec((self.most,), "own", (), 0.0, start=1.0)}
        for layer in self.layers:
            a, b, product, bound = f"{layer.name}.expert_A", f"{layer.name}.expert_B", (layer.name,), layer.d_in**-0.5
            specs[a] = TensorSpec((self.rank, layer.d_in), "A", product, bound)
            specs[b] = TensorSpec((layer.d_out, self.rank), "B", product, 0.0)
            for name in (a, b):
                one = specs[name]
                specs[name + ALL] = TensorSpec((self.most, *one.shape), one.kind + ALL, product, one.bound)
            specs[f"{layer.name}.router"] = TensorSpec(
                (2 * self.most - 1, layer.d_in), "router", product, bound, linear=False
            )
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return each layer's own expert, all of them side by side, the router and the place of the own one."""
        found: dict[str, Factor] = {}
        for layer in self.layers:
            a, b = f"{layer.name}.expert_A", f"{layer.name}.expert_B"
            all_a, all_b = tensors[a + ALL], tensors[b + ALL]  # [*, M, r, d_in], [*, M, d_out, r]
            count = all_a.shape[-3]
            found[layer.name] = Experts(
                LowRank(tensors[a], tensors[b], self.scale),
                LowRank(all_a.flatten(-3, -2), all_b.transpose(-3, -2).flatten(-2), self.scale),
                tensors[f"{layer.name}.router"][..., : 2 * count - 1, :],
                tensors[OWN][..., :count],
            )
        return found
