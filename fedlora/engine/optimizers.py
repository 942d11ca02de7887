"""AdamW and SGD for a pack: rows of numbers [G, P], with moments and step counts of each client.

torch's optimizers share one step counter and ``clip_grad_norm_`` one norm among all clients of a stack;
here step counts, learning rates, norms and activity are per group. The update of an active group equals
``torch.optim.AdamW`` or ``torch.optim.SGD``; an inactive one's numbers and moments do not move. Numbers with an L1
weight take a proximal step after their update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.fused import fused
from fedlora.methods import soft_threshold

Update = Callable[..., tuple[Tensor, Tensor]]
"""From numbers [a, P], moments [m, a, P], gradients [a, P], and rates and step counts (float64 [a, 1]): the new numbers
and moments."""


def clip_groups(grads: Tensor, max_norm: float) -> None:
    """Scale each group's gradient, in place, to an L2 norm of at most ``max_norm``."""
    norms = grads.square().sum(1, keepdim=True).sqrt()
    grads.mul_(torch.clamp(max_norm / (norms + 1e-6), max=1.0))  # the constant is torch's


def adamw(
    values: Tensor, moments: Tensor, grads: Tensor, rate: Tensor, count: Tensor, weight_decay: float
) -> tuple[Tensor, Tensor]:
    """Return the step of AdamW (Loshchilov & Hutter, 2019) with betas 0.9 and 0.999 and epsilon 1e-8."""
    beta1, beta2, epsilon = 0.9, 0.999, 1e-8
    first = torch.lerp(moments[0], grads, 1 - beta1)
    second = moments[1] * beta2 + grads.square() * (1 - beta2)
    correction1 = (1 - beta1**count).to(grads.dtype)
    correction2 = (1 - beta2**count).sqrt().to(grads.dtype)
    rate = rate.to(grads.dtype)
    decayed = values * (1 - rate * weight_decay)
    moved = decayed - (rate / correction1) * first / (second.sqrt() / correction2 + epsilon)
    return moved, torch.stack([first, second])


def sgd(
    values: Tensor, moments: Tensor, grads: Tensor, rate: Tensor, count: Tensor, weight_decay: float, momentum: float
) -> tuple[Tensor, Tensor]:
    """Return the step of SGD with momentum and L2 weight decay."""
    velocity = momentum * moments[0] + (grads + weight_decay * values)
    return values - rate.to(grads.dtype) * velocity, velocity[None]


def _step(
    update: Update,
    values: Tensor,
    moments: Tensor,
    grads: Tensor,
    groups: Tensor,
    rate: Tensor,
    count: Tensor,
    l1: Tensor | None,
    **settings: float,
) -> None:
    """Move the numbers and moments of some groups, in place."""
    moved, renewed = update(values[groups], moments[:, groups], grads, rate, count, **settings)
    if l1 is not None:
        moved = soft_threshold(moved, rate.to(grads.dtype) * l1)
    values[groups] = moved
    moments[:, groups] = renewed


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

    moments: ClassVar[int]
    """Numbers that it remembers for each trained one."""

    def __init__(self, values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> None:
        self.values = values
        self.config = config
        self.l1 = l1
        self.total_g = steps_g
        self.count_g = torch.zeros_like(steps_g)
        self.rates_g = torch.zeros_like(steps_g, dtype=torch.float64)
        self._moments = values.new_zeros((self.moments, *values.shape))

    def step(self, grads: Tensor, groups: Tensor) -> None:
        """Move some groups by one step.

        Args:
            grads: Their gradients, [a, P].
            groups: Their places, int64 [a], each once.
        """
        if self.config.clip_norm > 0:
            clip_groups(grads, self.config.clip_norm)
        rate = self._learning_rate(groups)
        self.count_g[groups] += 1
        self.rates_g[groups] += rate
        update, settings = self._update()
        count = self.count_g[groups].double()[:, None]
        fused(_step)(update, self.values, self._moments, grads, groups, rate[:, None], count, self.l1, **settings)

    def _learning_rate(self, groups: Tensor) -> Tensor:
        """Return the learning rate of some groups' next step, float64 [a]."""
        share = torch.ones_like(groups, dtype=torch.float64)
        if self.config.schedule == "linear":
            share = 1.0 - self.count_g[groups].double() / self.total_g[groups].clamp(min=1).double()
        return share * self.config.learning_rate

    @abstractmethod
    def _update(self) -> tuple[Update, dict[str, float]]:
        """Return what computes a step, and its settings."""


@final
class AdamW(GroupedOptimizer):
    """AdamW for a pack."""

    moments = 2

    def _update(self) -> tuple[Update, dict[str, float]]:
        return adamw, {"weight_decay": self.config.weight_decay}


@final
class SGD(GroupedOptimizer):
    """SGD for a pack."""

    moments = 1

    def _update(self) -> tuple[Update, dict[str, float]]:
        return sgd, {"weight_decay": self.config.weight_decay, "momentum": self.config.momentum}


def build_optimizer(values: Tensor, config: TrainConfig, steps_g: Tensor, l1: Tensor | None = None) -> GroupedOptimizer:
    """Return the optimizer that ``train.optimizer`` names."""
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(values, config, steps_g, l1)
