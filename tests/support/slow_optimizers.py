"""Server optimizers from their formulas, one Python number at a time, to hold strategies/server_optimizers.py to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedlora.config import ServerConfig


class Slow:
    """The formulas of strategies/server_optimizers.py, one Python number at a time.

    Args:
        settings: The optimizer and its numbers.
    """

    def __init__(self, settings: ServerConfig) -> None:
        self.settings = settings
        self.moments: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}
        self.times: dict[str, int] = {}

    def step(self, name: str, held: Any, mean: Any) -> Any:
        """Return what the server holds after a round that shared a tensor, or the first numbers of its axes."""
        time = self.times[name] = self.times.get(name, 0) + 1
        ended = held.copy()
        for place in np.ndindex(*mean.shape):
            ended[place] += self._number((name, place), float(mean[place] - held[place]), time)
        return ended

    def _number(self, key: tuple[str, tuple[int, ...]], d: float, time: int) -> float:
        s, (m, v) = self.settings, self.moments.get(key, (0.0, 0.0))
        eta = s.learning_rate
        match s.optimizer:
            case "momentum":
                m = s.momentum * m + d
                step = eta * m
            case "adagrad":
                v += d * d
                step = eta * d / (math.sqrt(v) + s.tau)
            case "adam":
                m, v = s.beta1 * m + (1 - s.beta1) * d, s.beta2 * v + (1 - s.beta2) * d * d
                correction = math.sqrt(1 - s.beta2 ** (time + 1)) / (1 - s.beta1 ** (time + 1))
                step = eta * correction * m / (math.sqrt(v) + s.tau)
            case _:
                m = s.beta1 * m + (1 - s.beta1) * d
                v -= (1 - s.beta2) * d * d * math.copysign(1.0, v - d * d)
                step = eta * m / (math.sqrt(v) + s.tau)
        self.moments[key] = (m, v)
        return step


class SecondMomentOfTheFirst(Slow):
    """The fault of OpenFedLLM's FedAdam: v from m^2 instead of d^2."""

    def _number(self, key: tuple[str, tuple[int, ...]], d: float, time: int) -> float:
        s, (m, v) = self.settings, self.moments.get(key, (0.0, 0.0))
        m = s.beta1 * m + (1 - s.beta1) * d
        v = s.beta2 * v + (1 - s.beta2) * m * m
        self.moments[key] = (m, v)
        correction = math.sqrt(1 - s.beta2 ** (time + 1)) / (1 - s.beta1 ** (time + 1))
        return s.learning_rate * correction * m / (math.sqrt(v) + s.tau)
