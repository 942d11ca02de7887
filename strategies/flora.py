"""FLoRA: the server stacks the clients' A and B instead of averaging them, so its update is their exact mean.

Wang, Shen, He, Sun, Wang, Lyu & Li, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", NeurIPS 2024, arXiv 2409.05976; read against the authors' code (ATP-1010/FederatedLLM).

Each round every client starts a fresh LoRA of its own rank r_k on the model so far, and sends A_k and B_k. The server
stacks A = [p_1 A_1; ...; p_K A_K], weighted on that side alone, and B = [B_1, ..., B_K], so that
B A = sum_k p_k B_k A_k, and sends both to all. What differs from the paper:

- the paper's clients merge B A into the base. Here the base stays untouched: what has been stacked in all rounds is a
  second low-rank term, ``residual_A`` and ``residual_B``, which is sent, and exported with the adapter. It grows by
  sum_k r_k ranks a round until a layer has as many as features; from then on it is the whole matrix;
- the fresh start of a round is drawn from the seed and the round, and costs no bytes; the head is averaged;
- the scale is alpha / ``method.rank`` for all ranks (the authors' alpha = 2 r makes it 2 for all).

In the first step of a round B is zero and A has no gradient, in every round anew. FedProx pulls A and B to their fresh
start, which is the server's model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

from fedlora.methods.products import Pair, Product
from strategies.stacked import Stacked


@final
class FLoRA(Stacked):
    """Stacks the clients' factors; clients start a fresh LoRA each round."""

    name = "flora"
    methods = ("lora",)
    exact = True
    ragged = True

    def added(self, products: Mapping[Pair, Product]) -> Mapping[Pair, Product]:
        """Return the stacked factors."""
        return products
