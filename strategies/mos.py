"""MoS in a federation: both pools are trained, exchanged and averaged.

What ``fedavg`` does, with ``method.name = 'mos'`` as its own method: A pool <- sum_k p_k A pool_k, B pool likewise. The
method's indices come from the run's seed and cost no byte, so a client sends as much as for LoRA of rank
``mos.budget``, whatever the active rank. Like any product of means it is not exact. With the same pools, two others
are: ``ffa-lora`` freezes the A pool, ``rolora`` alternates the pools by round.
"""

from __future__ import annotations

from typing import final

from fedlora.strategy import Strategy


@final
class MoS(Strategy):
    """Trains and averages both pools."""

    name = "mos"
    methods = ("mos",)
    exact = False
