"""Zero-padding: clients of different ranks; each is sent the first ranks of the server's A and B, and averaged padded.

The baseline that most papers call HetLoRA, without HetLoRA's pruning and weights (Cho, Liu, Xu, Fahrezi & Joshi,
"Heterogeneous LoRA for Federated Fine-tuning of On-device Foundation Models", EMNLP 2024, arXiv 2401.06432).

A client of rank r_k holds A[:r_k] and B[:, :r_k]; what it returns is padded with zeros to the largest rank of the
round, and A and B are averaged as in ``fedavg``: ranks that only a few clients hold are pulled towards zero by those
that lack them. Ranks that no client of a round holds stay as they were, which is our choice. The scale is alpha /
``method.rank`` for all, so a product means the same at every rank. With equal ranks this is ``fedavg``.
"""

from __future__ import annotations

from typing import final

from fedlora.strategy import Strategy


@final
class ZeroPadding(Strategy):
    """Trains and averages A and B, each client at its own rank."""

    name = "zero-padding"
    methods = ("lora",)
    exact = False
    ragged = True
