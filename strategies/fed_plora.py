"""Fed-PLoRA: a client of rank r_k trains r_k of the adapter's R modules of rank one, on top of all the others.

Zhang, Hu & Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", ICLR 2026, arXiv 2602.16936. A
LoRA of rank R is a sum of R modules, B A = sum_j b_j a_j, with b_j a column of B and a_j a row of A. In a round:

- the server sends the whole adapter to all, of which client k trains r_k modules K_k, drawn at random;
- the client folds the others into its frozen base, W + sum_{j not in K_k} b_j a_j, so that it starts from the server's
  whole model at any rank, and trains and sends its own r_k modules;
- the server averages a_j and b_j over the clients that have trained module j in the round.

With equal ranks R this is ``fedavg``, to the bit. Means of a_j and b_j are not the mean of their products. The paper
was read in summaries and reviews; its text and code (TNI-playground/Fed-PLoRA) were not at hand. Our choice:

- the server draws one set of modules for all layers of a client, from the run's seed by round and client. No data has a
  part in it, so it is free under DP, where clip and noise are for the r_k modules alone;
- the base stays untouched: the folded modules are a fixed residual of the client's own
  (:mod:`fedlora.methods.residual`), which costs d_in + d_out products a token for each of them, as a trained one does;
- the scale is alpha / R for all modules, so that a module means the same wherever it is trained or folded (by alpha /
  r_k the folded ones would not add up to the server's model);
- clients count by ``strategy.weights``, for each module among those that have trained it; a module that nobody has
  trained in a round stays as it was; the head is averaged over all.

The updates of a round are kept apart until its end. Clients keep nothing. What goes down is larger than with
``zero-padding``: R modules to a client of any rank.
"""

from __future__ import annotations

from typing import final

from strategies.some_modules import SomeModules


@final
class FedPLoRA(SomeModules):
    """Trains and averages A and B, each client's own choice of their ranks."""

    name = "fed-plora"
    methods = ("lora",)
    exact = False
