"""FLoRIST: FLoRA's stacked mean, cut to the singular values that hold most of its energy.

"FLoRIST: Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language Models", 2025.
From its formulas; the authors' code was not at hand.

As in ``flora`` clients start a fresh LoRA on the model so far and send A and B, and the server stacks them into
D = sum_k p_k B_k A_k. Of D it keeps the fewest singular values p with sum_{i <= p} s_i^2 >= energy sum_i s_i^2, and
sends those: B_g = U_p S_p and A_g = V_p^T in the paper, the root of S on both sides here, which is the same product.
Each layer has a p of its own. The singular vectors come from the core of a QR of the stacked factors. What differs from
the paper: it merges B_g A_g into the base. Here it joins the second term, as ``flora``'s does
(:mod:`strategies.flora`), and the sum of all rounds is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from fedlora.config import Options, require
from fedlora.methods.products import Pair, Product, decompose
from fedlora.methods.residual import compress
from fedlora.strategy import Setting
from strategies.stacked import Stacked


@final
@dataclass(frozen=True)
class FloristOptions(Options):
    """FLoRIST; read by ``strategy.name = 'florist'`` only."""

    section: ClassVar[str] = "florist"

    energy: float = 0.99
    """Share of the squared singular values of each layer's mean update that is kept, above 0 to 1."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(0 < self.energy <= 1, "florist.energy", self.energy, "must be above 0 and at most 1.")


@final
class FLoRIST(Stacked):
    """Stacks the clients' factors and keeps the largest singular values of their product."""

    name = "florist"
    methods = ("lora",)
    exact = False
    ragged = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._energy = setting.config.options(FloristOptions).energy

    def added(self, products: Mapping[Pair, Product]) -> Mapping[Pair, Product]:
        """Return each layer's product at the rank that holds its energy."""
        return {pair: compress(*product, rank=self._needed(product)) for pair, product in products.items()}

    def _needed(self, product: Product) -> int:
        """Return the fewest singular values that hold the energy of a product; 1 where it is zero."""
        energy = np.square(decompose(*product).s).cumsum()
        return int(np.searchsorted(energy, self._energy * energy[-1])) + 1 if energy[-1] else 1
