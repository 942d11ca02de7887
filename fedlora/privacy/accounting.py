"""Privacy accounting (PLD, PRV, RDP): epsilon of the steps taken, and the noise multiplier for a target epsilon.

Every step is a Gaussian mechanism on Poisson-sampled rows (Abadi et al. 2016; Mironov, Talwar & Zhang 2019), and
neighbours differ by one row added or removed. Epsilon is always that of all steps together: the sum or the maximum of
epsilons of parts is not a valid, or not a tight, total. Computed by libraries: privacy loss distributions ("pld",
dp-accounting; Koskela et al. 2020, Doroshenko et al. 2022) with pessimistic rounding, "prv" (Opacus; Gopi, Lee &
Wutschitz 2021), or Renyi DP ("rdp", Opacus), which is fast and a looser bound. The Gaussian-DP approximation reports
less than was spent and is not offered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

Accountant = Literal["pld", "prv", "rdp"]

# Grid on which losses are rounded, always up, for up to a thousand steps; finer for more, because the error grows with
# the steps and the square of the grid. On the table of the tests it costs at most 0.001 of epsilon.
_GRID, _GRID_STEPS = 5e-4, 1000
# Below this noise epsilon is in the hundreds for a single step, and accountants take minutes to say so.
_LEAST_NOISE = 0.05
_MOST_NOISE = 1e4
_PRECISION = 1e-3  # of a noise multiplier that is searched for, relative; always rounded up


class Use(NamedTuple):
    """Steps of one kind.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of the clipping norm.
        sample_rate: Probability with which a row is in a step's batch.
        steps: Number of steps.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int


def merged(uses: Iterable[Use]) -> tuple[Use, ...]:
    """Return the uses with the steps of equal mechanisms added up, in a fixed order."""
    steps: dict[tuple[float, float], int] = {}
    for use in uses:
        key = (use.noise_multiplier, use.sample_rate)
        steps[key] = steps.get(key, 0) + use.steps
    return tuple(Use(*key, count) for key, count in sorted(steps.items()) if count)


def epsilon(uses: Iterable[Use], *, target_delta: float, accountant: Accountant = "pld") -> float:
    """Return the epsilon of all uses together; 0 where there are none, infinity where there is next to no noise.

    Args:
        uses: What was done.
        target_delta: The delta that belongs to it.
        accountant: How it is computed.

    Raises:
        ValueError: The accountant is not known.
    """
    whole = merged(uses)
    if not whole:
        return 0.0
    if any(use.noise_multiplier < _LEAST_NOISE for use in whole):
        return math.inf
    return _epsilon(whole, target_delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(uses: tuple[Use, ...], delta: float, accountant: Accountant) -> float:
    match accountant:
        case "pld":
            steps = sum(use.steps for use in uses)
            grid = _GRID * min(1.0, math.sqrt(_GRID_STEPS / steps))
            first, *others = (_loss_distribution(*use, grid) for use in uses)
            for other in others:
                first = first.compose(other)
            return float(first.get_epsilon_for_delta(delta))
        case "prv" | "rdp":
            from opacus.accountants import PRVAccountant, RDPAccountant

            counter: Any = PRVAccountant() if accountant == "prv" else RDPAccountant()
            counter.history = [tuple(use) for use in uses]
            # PRV takes the logarithm of a loss that cannot be, and drops it.
            with warnings.catch_warnings(), np.errstate(divide="ignore"):
                # RDP's grid of orders ends where noise is very large; the bound is valid, and looser.
                warnings.filterwarnings("ignore", message="Optimal order is the")
                return float(counter.get_epsilon(delta=delta))
    raise ValueError(f"privacy.accountant = {accountant!r}: must be pld, prv or rdp; gdp reports less than was spent.")


@lru_cache(maxsize=256)
def _loss_distribution(noise_multiplier: float, sample_rate: float, steps: int, grid: float) -> Any:
    """Return the privacy loss distribution of so many steps."""
    if steps == 1:
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_gaussian_mechanism(
            noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=grid, pessimistic_estimate=True
        )
    return _loss_distribution(noise_multiplier, sample_rate, 1, grid).self_compose(steps)


@lru_cache(maxsize=1024)
def least_noise_multiplier(
    *, target_epsilon: float, target_delta: float, sample_rate: float, steps: int, accountant: Accountant = "pld"
) -> float:
    """Return the least noise multiplier, to a thousandth, with which ``steps`` cost no more than ``target_epsilon``.

    Raises:
        ValueError: No noise is enough, because epsilon is too small.
    """

    def cost(multiplier: float) -> float:
        return epsilon([Use(multiplier, sample_rate, steps)], target_delta=target_delta, accountant=accountant)

    high = 0.5
    while cost(high) > target_epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise ValueError(
                f"privacy.epsilon = {target_epsilon}: no noise multiplier up to {_MOST_NOISE:g} keeps {steps} steps "
                f"within it at delta {target_delta:g}; ask for a larger epsilon."
            )
    low = high / 2
    while low >= _LEAST_NOISE and cost(low) <= target_epsilon:
        low, high = low / 2, low
    while high - low > _PRECISION * high:
        # Epsilon is close to a power of the multiplier: a secant step in logarithms, kept inside the bracket. Where it
        # is infinite, or zero, the middle.
        over, under = cost(low) / target_epsilon, cost(high) / target_epsilon
        if 1 - under < _PRECISION:
            break  # the upper end is as close to the wanted epsilon as it need be
        share = 0.5
        if math.isfinite(over) and under > 0:
            share = min(0.95, max(0.05, math.log(over) / (math.log(over) - math.log(under))))
        middle = low * (high / low) ** share
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high


def default_delta(client_size: int) -> float:
    """Return the power of ten at or below a tenth of 1 / ``client_size`` (our choice)."""
    return float(10.0 ** math.floor(math.log10(0.1 / client_size) + 1e-12))
