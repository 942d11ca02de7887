"""FedIT: federated averaging of LoRA, A and B averaged separately.

Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023, arXiv 2305.05644;
McMahan et al., AISTATS 2017, for the average itself.

All tensors are trained and exchanged: A <- sum_k p_k A_k, B <- sum_k p_k B_k. The product of the means is not the
mean of the products, mean(B) mean(A) != mean(B A), so the server's model differs from the clients' average; a test
shows by how much.
"""

from __future__ import annotations

from typing import final

from fedlora.strategy import Strategy


@final
class FedAvg(Strategy):
    """Trains and averages every tensor of the method."""

    name = "fedavg"
    methods = ("lora", "mos", "s2-lora")
    exact = False
