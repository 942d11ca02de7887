"""AdamW and SGD for a pack: rows of numbers [G, P], with moments and step counts of each client.

torch's optimizers share one step counter and ``clip_grad_norm_`` one norm among all clients of a stack;
here step counts, learning rates, norms and activity are per group. The update of an active group equals
``torch.optim.AdamW`` or ``torch.optim.SGD``; an inactive one's numbers and moments do not move. Numbers with an L1
weight take a proximal step after their update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.methods import soft_threshold


def clip_groups(grads: Tensor, max_norm: float) -> None:
    """Scale each group's gradient, in place, to an L2 norm of at most ``max_norm``."""
    norms = grads.square().sum(1, keepdim=True).sqrt()
    grads.mul_(torch.clamp(max_norm / (norms + 1e-6), max=1.0))  # the constant is torch's


class GroupedOptimizer(ABC):
    """Holds the moments and step counts of a pack for one round.

    Args:
        values: The trained numbers [G, P], updated in place.
        config: Learning rate, weight decay and the like.
        steps_g: Steps that each group will take this round, [G]; the schedule's length.
        l1: Weight of the L1 penalty of each number, [P]; None where none has one.

    Attributes:
        rates_g: Sum of the learning rates of the steps that each group has taken, float64 [G].
    """

    def __init__(self, values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> None:
        self.values = values
        self.config = config
        self.l1 = l1
        self.total_g = steps_g
        self.count_g = torch.zeros_like(steps_g)
        self.rates_g = torch.zeros_like(steps_g, dtype=torch.float64)

    def step(self, grads: Tensor, active_g: Tensor) -> None:
        """Move the active groups (bool [G]) by one step along ``grads`` [G, P]."""
        if self.config.clip_norm > 0:
            clip_groups(grads, self.config.clip_norm)
        rate_g = self._learning_rate()
        rate = rate_g.to(grads.dtype)[:, None]
        self.count_g += active_g
        self.rates_g += rate_g * active_g
        active = active_g[:, None]
        update = self._updated(grads, rate, active)
        if self.l1 is not None:
            update = soft_threshold(update, rate * self.l1)
        self.values.copy_(torch.where(active, update, self.values))

    def _learning_rate(self) -> Tensor:
        """Return each group's learning rate for its next step, float64 [G]."""
        share_g = torch.ones_like(self.count_g, dtype=torch.float64)
        if self.config.schedule == "linear":
            share_g = 1.0 - self.count_g.double() / self.total_g.clamp(min=1).double()
        return share_g * self.config.learning_rate

    @abstractmethod
    def _updated(self, grads: Tensor, rate: Tensor, active: Tensor) -> Tensor:
        """Return the new numbers [G, P], and move the moments of the active groups; ``rate`` and ``active`` [G, 1]."""


@final
class AdamW(GroupedOptimizer):
    """AdamW (Loshchilov & Hutter, 2019) with betas 0.9 and 0.999 and epsilon 1e-8."""

    def __init__(self, values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> None:
        super().__init__(values, config, steps_g, l1)
        self._first, self._second = (torch.zeros_like(values, requires_grad=False) for _ in range(2))

    def _updated(self, grads: Tensor, rate: Tensor, active: Tensor) -> Tensor:
        beta1, beta2, epsilon = 0.9, 0.999, 1e-8
        first, second = self._first, self._second
        first.copy_(torch.where(active, torch.lerp(first, grads, 1 - beta1), first))
        second.copy_(torch.where(active, second * beta2 + grads.square() * (1 - beta2), second))
        count_g = self.count_g.clamp(min=1).double()
        correction1 = (1 - beta1**count_g).to(grads.dtype)[:, None]
        correction2 = (1 - beta2**count_g).sqrt().to(grads.dtype)[:, None]
        decayed = self.values * (1 - rate * self.config.weight_decay)
        return decayed - (rate / correction1) * first / (second.sqrt() / correction2 + epsilon)


@final
class SGD(GroupedOptimizer):
    """SGD with momentum and L2 weight decay."""

    def __init__(self, values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> None:
        super().__init__(values, config, steps_g, l1)
        self._velocity = torch.zeros_like(values, requires_grad=False)

    def _updated(self, grads: Tensor, rate: Tensor, active: Tensor) -> Tensor:
        grads = grads + self.config.weight_decay * self.values
        velocity = self._velocity
        velocity.copy_(torch.where(active, self.config.momentum * velocity + grads, velocity))
        return self.values - rate * velocity


def build_optimizer(values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> GroupedOptimizer:
    """Return the optimizer that ``train.optimizer`` names."""
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(values, config, steps_g, l1)
