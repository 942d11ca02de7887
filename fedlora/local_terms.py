"""What a strategy asks of local training beside the loss: a learning rate, terms of its gradient, control variates."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LocalTerms:
    """The terms of local training in one round, the same for all clients of the round.

    Attributes:
        learning_rate: What ``train.learning-rate`` is multiplied by in this round (a schedule over rounds).
        proximal: Weight mu of FedProx's term ``mu / 2 |w - w_server|^2`` on the shared tensors; 0: none. Its gradient
            holds no data, so under DP it is added after clip and noise.
        scaffold: How SCAFFOLD's clients renew their control variates: option 1 (a gradient at the server's model) or
            2 (from the steps taken); 0: no control variates.
        penalty: Weight lambda of HetLoRA's penalty on the last ranks of each layer, ``lambda |B[:, f:]| |A[f:]|`` in
            Frobenius norms; 0: none. Its gradient holds no data either.
        decay: Share gamma of a client's ranks that are not its last ones, see :func:`tail`.
    """

    learning_rate: float = 1.0
    proximal: float = 0.0
    scaffold: int = 0
    penalty: float = 0.0
    decay: float = 1.0


def tail(rank: int, decay: float) -> int:
    """Return where a client's last ranks begin: f = floor(gamma r), at least 1; none are last if r or gamma is 1."""
    return max(1, math.floor(decay * rank + 1e-9))  # 0.29 * 100 is less than 29 in floating point
