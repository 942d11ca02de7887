"""Rules that make one LoRA of several, layer by layer: means, LoRA-LEGO, and what PEFT has.

Each is given the layer's products, the scale in B, and the share of each LoRA; the shares sum to 1.

- ``weighted``: sum p_i B_i A_i exactly, by stacking; its rank is the sum of the ranks.
- ``svd``: the nearest matrix of a rank to that sum (Eckart & Young), from the core of a QR, never d_out x d_in numbers.
- ``lego``: :mod:`fedlora.lego`.
- ``ties``, ``dare-ties``, ``dare-linear``: PEFT's functions of these names (Yadav et al., "TIES-Merging", 2023; Yu et
  al., "DARE", 2024) on A and on B apart, as its ``add_weighted_adapter`` has them. Rank i of one LoRA meets rank i of
  another there, which means something only where they have trained from the same start. PEFT multiplies A and B by the
  root of a weight each, and TIES divides by the LoRAs that agree: its weights are p_i^2, or (n p_i)^2, so that what is
  pruned from equal LoRAs aside, they merge to themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.lego import merge_units
from fedlora.methods.products import Product, decompose, stack
from fedlora.registry import Registry


class Rule(NamedTuple):
    """A way to merge.

    Attributes:
        merge: Returns the merged product, given products, shares, and what the rule takes.
        takes: What that is: ``rank``, ``density`` (the share of entries that pruning keeps), or nothing.
    """

    merge: Callable[[Sequence[Product], Sequence[float], float], Product]
    takes: str = ""


RULES: Registry[Rule] = Registry("--by")


def _svd(products: Sequence[Product], shares: Sequence[float], rank: float) -> Product:
    u, s, vt = decompose(*stack(products, shares))
    return vt[: int(rank)], (u * s)[:, : int(rank)]


def _by_peft(name: str) -> Rule:
    """Return one of PEFT's rules, by its name there."""

    def merge(products: Sequence[Product], shares: Sequence[float], density: float) -> Product:
        import torch
        from peft.utils import merge_utils

        weights = torch.tensor(shares) * (1 if name == "dare_linear" else len(shares))

        def factor(values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
            merged: NDArray[np.float64] = rule(list(map(torch.from_numpy, values)), weights, density).numpy()
            return merged

        rule = getattr(merge_utils, name)
        return factor([a for a, _ in products]), factor([b for _, b in products])

    return Rule(merge, "density")


RULES.register("weighted")(Rule(lambda products, shares, _: stack(products, shares)))
RULES.register("svd")(Rule(_svd, "rank"))
RULES.register("lego")(Rule(lambda products, shares, rank: merge_units(products, shares, int(rank)), "rank"))
for _name in ("ties", "dare_ties", "dare_linear"):
    RULES.register(_name.replace("_", "-"))(_by_peft(_name))
