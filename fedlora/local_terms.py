"""What a strategy asks of local training beside the loss: a learning rate, a proximal term, control variates."""

from __future__ import annotations

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
    """

    learning_rate: float = 1.0
    proximal: float = 0.0
    scaffold: int = 0
