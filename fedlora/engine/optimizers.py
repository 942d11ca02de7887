"""AdamW and SGD for a pack: rows of numbers [G, P], with moments and step counts of each client.

torch's optimizers share one step counter and ``clip_grad_norm_`` one norm among all clients of a stack;
here step counts, learning rates, norms and activity are per group. The update of an active group equals
``torch.optim.AdamW`` or ``torch.optim.SGD``; an inactive one's numbers and moments do not move. Numbers with an L1
weight take a proximal step after their update.

LoRA+ (Hayou, Ghosh & Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354) gives B
a learning rate that is ``train.b-rate-ratio`` times A's. Weight decay goes with the rate, as in torch's parameter
groups. PEFT's optimizer takes B's rate for every vector, too, biases of a head among them; here a head has A's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.fused import fused
from fedlora.methods import soft_threshold
from fedlora.transfer import Places

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8

Update = Callable[..., tuple[Tensor, ...]]
"""From numbers, their moments and their gradients, [a, P] each, and what a client's step has for all its numbers,
[a, 1] each: the new numbers and moments."""


def clip_groups(grads: Tensor, max_norm: float) -> None:
    """Scale each group's gradient, in place, to an L2 norm of at most ``max_norm``."""
    norms = grads.square().sum(1, keepdim=True).sqrt()
    grads.mul_(torch.clamp(max_norm / (norms + 1e-6), max=1.0))  # the constant is torch's


def adamw(
    values: Tensor, moments: Sequence[Tensor], grads: Tensor, rate: Tensor, root: Tensor, kept: Tensor
) -> tuple[Tensor, ...]:
    """Return AdamW's step.

    Args:
        values: The numbers.
        moments: First and second moment.
        grads: The gradients.
        rate: The learning rate by the first moment's correction.
        root: The root of the second moment's correction.
        kept: What weight decay leaves.
    """
    first = torch.lerp(moments[0], grads, 1 - _BETA1)
    second = moments[1] * _BETA2 + grads.square() * (1 - _BETA2)
    return values * kept - rate * first / (second.sqrt() / root + _EPSILON), first, second


def sgd(
    values: Tensor, moments: Sequence[Tensor], grads: Tensor, rate: Tensor, momentum: Tensor, decay: Tensor
) -> tuple[Tensor, ...]:
    """Return the step of SGD with momentum and L2 weight decay."""
    velocity = momentum * moments[0] + (grads + decay * values)
    return values - rate * velocity, velocity


def _step(
    update: Update,
    values: Tensor,
    moments: Sequence[Tensor],
    grads: Tensor,
    scalars: Sequence[Tensor],
    threshold: Tensor | None,
    l1: Tensor | None,
    ratio: Tensor | None,
) -> None:
    """Move numbers and their moments, in place."""
    moved, *renewed = update(values, moments, grads.to(values.dtype), *scalars)
    if ratio is not None:  # a step is linear in its rate, and moments do not see it
        moved = torch.lerp(values, moved, ratio)
    if l1 is not None and threshold is not None:
        moved = soft_threshold(moved, threshold * l1)
    for old, new in zip((values, *moments), (moved, *renewed), strict=True):
        old.copy_(new)


class GroupedOptimizer(ABC):
    """Holds the moments and step counts of a pack for one round.

    Args:
        values: The trained numbers [G, P], updated in place.
        config: Learning rate, weight decay and the like.
        steps_g: Steps that each group will take this round, [G]; the schedule's length.
        l1: Weight of the L1 penalty of each number, [P]; None where none has one.
        ratio: What the learning rate of each number is multiplied with, [P]; None: 1.
        precondition: What is done to the gradients of some groups, [a, P], in place; None: nothing.

    Attributes:
        rates_g: Sum of the learning rates of the steps that each group has taken, float64 [G].
    """

    moments: ClassVar[int]
    """Numbers that it remembers for each trained one."""

    def __init__(
        self,
        values: Tensor,
        config: TrainConfig,
        steps_g: Tensor,
        l1: Tensor | None = None,
        ratio: Tensor | None = None,
        precondition: Callable[[Tensor, Places], None] | None = None,
    ) -> None:
        self.values = values
        self.config = config
        self.l1, self.ratio = l1, ratio
        self.precondition = precondition
        self.total_g = steps_g
        self.count_g = torch.zeros_like(steps_g)
        self.rates_g = torch.zeros_like(steps_g, dtype=torch.float64)
        self._moments = [torch.zeros_like(values) for _ in range(self.moments)]

    def step(self, grads: Tensor, groups: Places) -> None:
        """Move some groups by one step.

        Args:
            grads: Their gradients, [a, P].
            groups: Their places.
        """
        if self.config.clip_norm > 0:
            grads = grads.to(self.values.dtype)  # as they come they may be of 16 bits: too coarse for a norm
            clip_groups(grads, self.config.clip_norm)
        if self.precondition is not None:
            grads = grads.to(self.values.dtype)
            self.precondition(grads, groups)
        rate = self._learning_rate(groups)
        self.count_g[groups] += 1
        self.rates_g[groups] += rate
        # Not in what is fused, which would compute them for each number.
        update, scalars = self._update(rate[:, None].to(self.values.dtype), self.count_g[groups].double()[:, None])
        threshold = None if self.l1 is None else rate[:, None].to(self.values.dtype)
        whole = [self.values, *self._moments]
        values, *moments = here = [numbers[groups] for numbers in whole]
        fused(_step)(update, values, moments, grads, scalars, threshold, self.l1, self.ratio)
        if not isinstance(groups, slice):  # of a slice they are views
            for numbers, moved in zip(whole, here, strict=True):
                numbers[groups] = moved

    def _learning_rate(self, groups: Places) -> Tensor:
        """Return the learning rate of some groups' next step, float64 [a]."""
        count = self.count_g[groups].double()
        share = torch.ones_like(count)
        if self.config.schedule == "linear":
            share = 1.0 - count / self.total_g[groups].clamp(min=1).double()
        return share * self.config.learning_rate

    @abstractmethod
    def _update(self, rate: Tensor, count: Tensor) -> tuple[Update, list[Tensor]]:
        """Return what computes a step, and what a client's has for all its numbers, [a, 1] each.

        Args:
            rate: The learning rates.
            count: The step's number, from 1, in float64.
        """


@final
class AdamW(GroupedOptimizer):
    """AdamW (Loshchilov & Hutter, 2019) with betas 0.9 and 0.999 and epsilon 1e-8."""

    moments = 2

    def _update(self, rate: Tensor, count: Tensor) -> tuple[Update, list[Tensor]]:
        correction1 = (1 - _BETA1**count).to(rate.dtype)
        correction2 = (1 - _BETA2**count).sqrt().to(rate.dtype)
        return adamw, [rate / correction1, correction2, 1 - rate * self.config.weight_decay]


@final
class SGD(GroupedOptimizer):
    """SGD with momentum and L2 weight decay."""

    moments = 1

    def _update(self, rate: Tensor, count: Tensor) -> tuple[Update, list[Tensor]]:
        config = self.config
        return sgd, [rate, torch.full_like(rate, config.momentum), torch.full_like(rate, config.weight_decay)]


def build_optimizer(
    values: Tensor,
    config: TrainConfig,
    steps_g: Tensor,
    l1: Tensor | None = None,
    ratio: Tensor | None = None,
    precondition: Callable[[Tensor, Places], None] | None = None,
) -> GroupedOptimizer:
    """Return the optimizer that ``train.optimizer`` names, see :class:`GroupedOptimizer`."""
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(values, config, steps_g, l1, ratio, precondition)
