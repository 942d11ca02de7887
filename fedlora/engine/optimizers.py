"""Optimizers on stacked tensors [G, ...] in which every group (client) keeps its own time.

torch's optimizers share one step counter and ``clip_grad_norm_`` one norm among all clients of a stack;
here step counts, learning rates, norms and activity are per group. The update of an active group equals
``torch.optim.AdamW`` or ``torch.optim.SGD``; an inactive one's tensors and moments do not move. A tensor with an L1
weight takes a proximal step after its update.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.methods import soft_threshold


def _over(x_g: Tensor, like: Tensor) -> Tensor:
    """Return [G] broadcast over the trailing dimensions of ``like`` [G, ...], in its dtype."""
    return x_g.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))


def group_norms(grads: Mapping[str, Tensor]) -> Tensor:
    """Return the L2 norm of each group's joint gradient, [G]."""
    return torch.stack([grad.flatten(1).square().sum(1) for grad in grads.values()]).sum(0).sqrt()


def clip_groups(grads: Mapping[str, Tensor], max_norm: float) -> None:
    """Scale each group's gradient, in place, to a joint L2 norm of at most ``max_norm``."""
    norms = group_norms(grads)
    factor_g = torch.clamp(max_norm / (norms + 1e-6), max=1.0)  # the constant is torch's
    for grad in grads.values():
        grad.mul_(_over(factor_g, grad))


class GroupedOptimizer(ABC):
    """Holds the moments and step counts of a pack for one round.

    Args:
        parameters: Name to trained tensor [G, ...], updated in place.
        config: Learning rate, weight decay and the like.
        steps_g: Steps that each group will take this round, [G]; the schedule's length.
        l1: Weight of the L1 penalty of the parameters that have one, by name.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainConfig, steps_g: Tensor, l1: Mapping[str, float]
    ) -> None:
        self.parameters = parameters
        self.config = config
        self.l1 = l1
        self.total_g = steps_g
        self.count_g = torch.zeros_like(steps_g)

    def step(self, grads: Mapping[str, Tensor], active_g: Tensor) -> None:
        """Move the active groups (bool [G]) by one step along ``grads``."""
        if self.config.clip_norm > 0:
            clip_groups(grads, self.config.clip_norm)
        rate_g = self._learning_rate()
        self.count_g += active_g
        for name, parameter in self.parameters.items():
            active = _over(active_g, parameter).bool()
            update = self._updated(name, parameter, grads[name], rate_g, active)
            if self.l1.get(name):
                update = soft_threshold(update, _over(rate_g * self.l1[name], update))
            parameter.copy_(torch.where(active, update, parameter))

    def _learning_rate(self) -> Tensor:
        """Return each group's learning rate for its next step, float64 [G]."""
        share_g = torch.ones_like(self.count_g, dtype=torch.float64)
        if self.config.schedule == "linear":
            share_g = 1.0 - self.count_g.double() / self.total_g.clamp(min=1).double()
        return share_g * self.config.learning_rate

    @abstractmethod
    def _updated(self, name: str, parameter: Tensor, grad: Tensor, rate_g: Tensor, active: Tensor) -> Tensor:
        """Return the new value of one parameter, and move the moments of the active groups."""


@final
class AdamW(GroupedOptimizer):
    """AdamW (Loshchilov & Hutter, 2019) with betas 0.9 and 0.999 and epsilon 1e-8."""

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainConfig, steps_g: Tensor, l1: Mapping[str, float]
    ) -> None:
        super().__init__(parameters, config, steps_g, l1)
        self._first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self._second = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def _updated(self, name: str, parameter: Tensor, grad: Tensor, rate_g: Tensor, active: Tensor) -> Tensor:
        beta1, beta2, epsilon = 0.9, 0.999, 1e-8
        first, second = self._first[name], self._second[name]
        first.copy_(torch.where(active, torch.lerp(first, grad, 1 - beta1), first))
        second.copy_(torch.where(active, second * beta2 + grad.square() * (1 - beta2), second))
        count_g = self.count_g.clamp(min=1).double()
        correction1 = _over(1 - beta1**count_g, parameter)
        correction2 = _over((1 - beta2**count_g).sqrt(), parameter)
        rate = _over(rate_g, parameter)
        decayed = parameter * (1 - rate * self.config.weight_decay)
        return decayed - (rate / correction1) * first / (second.sqrt() / correction2 + epsilon)


@final
class SGD(GroupedOptimizer):
    """SGD with momentum and L2 weight decay."""

    def __init__(
        self, parameters: Mapping[str, Tensor], config: TrainConfig, steps_g: Tensor, l1: Mapping[str, float]
    ) -> None:
        super().__init__(parameters, config, steps_g, l1)
        self._velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}

    def _updated(self, name: str, parameter: Tensor, grad: Tensor, rate_g: Tensor, active: Tensor) -> Tensor:
        grad = grad + self.config.weight_decay * parameter
        velocity = self._velocity[name]
        velocity.copy_(torch.where(active, self.config.momentum * velocity + grad, velocity))
        return parameter - _over(rate_g, parameter) * velocity


def build_optimizer(
    parameters: Mapping[str, Tensor], config: TrainConfig, steps_g: Tensor, l1: Mapping[str, float]
) -> GroupedOptimizer:
    """Return the optimizer that ``train.optimizer`` names."""
    kind = {"adamw": AdamW, "sgd": SGD}[config.optimizer]
    return kind(parameters, config, steps_g, l1)
