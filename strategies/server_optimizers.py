"""Server optimizers (FedAvgM, FedAdam, FedYogi, FedAdagrad): an optimizer's step with the mean update as gradient.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar & McMahan, "Adaptive Federated Optimization", ICLR 2021, arXiv
2003.00295 (FedAdam, FedYogi, FedAdagrad); Hsu, Qi & Brown, 2019, arXiv 1909.06335 (FedAvgM). They compose with any
strategy that averages. With d the mean minus what the server held, for every shared number and every round that it is
shared in, t = 1, 2, ...:

- ``momentum``: m <- momentum m + d, step = eta m;
- ``adagrad``: v <- v + d^2, step = eta d / (sqrt(v) + tau);
- ``adam``: m <- beta1 m + (1 - beta1) d, v <- beta2 v + (1 - beta2) d^2,
  step = eta sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) m / (sqrt(v) + tau);
- ``yogi``: m as in ``adam``, v <- v - (1 - beta2) d^2 sign(v - d^2), step = eta m / (sqrt(v) + tau).

m and v start at zero. This is what Flower's own classes compute; the paper starts v at tau^2 and has no correction for
the start in FedAdam. ``server.learning-rate = 0`` is our choice: the eta for which a small d is taken as it is in the
first round. With tau fixed, larger d are divided by more: tau must match the size of d. The step sees noised updates
only under DP, so it costs no privacy. Moments are numbers of a basis: a strategy that changes it between rounds is
refused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import ServerConfig
from fedlora.reduce import Reduced
from fedlora.shapes import cut, placed
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from strategies.wrapped import Wrapped, check_shared

Array = NDArray[np.float64]


@final
class ServerOptimizer(Wrapped):
    """Takes an optimizer's step where the inner strategy would take the mean.

    Args:
        inner: The strategy.
        config: Which optimizer, and its numbers.

    Raises:
        ValueError: The strategy's mean is no step in a fixed basis.
    """

    def __init__(self, inner: Strategy, config: ServerConfig) -> None:
        super().__init__(inner)
        self.config = config
        if not inner.keeps_basis or inner.reduction(1) != "mean":
            raise ValueError(
                f"server.optimizer = {config.optimizer!r}: strategy {inner.name!r} does not average in a fixed "
                "basis, so moments of one round mean nothing in the next; set server.optimizer = 'none', or choose a "
                "strategy that averages, such as 'fedavg' or 'ffa-lora'."
            )
        check_shared(inner, f"server.optimizer = {config.optimizer!r}")

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Move what the server holds by a step along the averaged update; moments go into the state."""
        mean, moments = dict(reduced.mean), dict[str, Array]()
        for name, value in reduced.mean.items():
            # Ranks that no client of the round holds are not in the mean; neither they nor their moments move.
            whole = state.tensors[name].astype(np.float64)
            held = cut(whole, value.shape)
            before = [state.extra.get(f"{what}/{name}", np.zeros_like(whole)).astype(np.float64) for what in ("m", "v")]
            count = int(state.extra.get(f"t/{name}", np.zeros(1))[0]) + 1
            m, v = (cut(one, value.shape) for one in before)
            step, m, v = _step(self.config, value.astype(np.float64) - held, m, v, count)
            mean[name] = (held + step).astype(value.dtype)
            after_m, after_v = (placed(new, old) for new, old in zip((m, v), before, strict=True))
            moments |= {f"m/{name}": after_m, f"v/{name}": after_v, f"t/{name}": np.full(1, float(count))}
        after = self.inner.apply(state, replace(reduced, mean=mean), server_round)
        return replace(after, extra={**after.extra, **moments})


def _step(config: ServerConfig, d: Array, m: Array, v: Array, count: int) -> tuple[Array, Array, Array]:
    """Return the step and the new moments, given the averaged update and how often it was taken, this one included."""
    rate, beta1, beta2, tau = learning_rate(config), config.beta1, config.beta2, config.tau
    if config.optimizer == "momentum":
        m = config.momentum * m + d
        return rate * m, m, v
    if config.optimizer == "adagrad":
        v = v + d**2
        return rate * d / (np.sqrt(v) + tau), m, v
    m = beta1 * m + (1 - beta1) * d
    if config.optimizer == "adam":
        v = beta2 * v + (1 - beta2) * d**2
        rate *= _correction(config, count)
    else:
        v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
    return rate * m / (np.sqrt(v) + tau), m, v


def _correction(config: ServerConfig, count: int) -> float:
    return math.sqrt(1 - config.beta2 ** (count + 1)) / (1 - config.beta1 ** (count + 1))


def learning_rate(config: ServerConfig) -> float:
    """Return eta; where none is set, the one for which a small update is taken as it is in the first round."""
    if config.learning_rate:
        return config.learning_rate
    neutral = {
        "momentum": 1.0,
        "adagrad": config.tau,
        "adam": config.tau / ((1 - config.beta1) * _correction(config, 1)),
        "yogi": config.tau / (1 - config.beta1),
    }
    return neutral[config.optimizer]
