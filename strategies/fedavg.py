"""FedIT: federated averaging of LoRA, A and B averaged separately.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, arXiv 2305.05644;
McMahan et al., AISTATS 2017, for the average itself.

All tensors are trained and exchanged: A <- sum_k p_k A_k, B <- sum_k p_k B_k. The product of the means is not the
mean of the products, mean(B) mean(A) != mean(B A), so the server's model differs from the clients' average; a test
shows by how much. Of a method that trains one factor alone of each product, and is linear in it, the mean is exact.
"""

from __future__ import annotations

from typing import final

from fedlora.methods import zero_kinds
from fedlora.strategy import Setting, Strategy


@final
class FedAvg(Strategy):
    """Trains and averages every tensor of the method."""

    name = "fedavg"
    methods = ("lora", "mos", "s2-lora")
    exact = False

    def __init__(self, setting: Setting) -> None:
        self.exact = all(len(kinds) == 1 for kinds in zero_kinds(setting.specs).values())
        super().__init__(setting)
