"""S2-LoRA in a federation: A, B and the rank coefficients s are trained, exchanged and averaged.

What ``fedavg`` does, with ``method.name = 's2-lora'`` as its own method. The update B diag(s) A is a product of three
means, so it is further from the mean of the clients' updates than LoRA's. The mean of sparse coefficients is dense;
the server takes the method's proximal step on it once more, which needs no data. ``s2-frozen`` and ``s2-cyclic`` are
exact.
"""

from __future__ import annotations

from typing import final

from fedlora.strategy import Strategy


@final
class S2(Strategy):
    """Trains and averages A, B and s."""

    name = "s2-lora"
    methods = ("s2-lora",)
    exact = False
