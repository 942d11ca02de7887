"""Lower bounds of epsilon from an attacker's guesses, each at a stated chance of being wrong.

An accountant says what a mechanism leaks at most; these say what it was seen to leak at least. Where the second is
above the first, the mechanism is not the one that was accounted for. The bound by mu holds for mechanisms that are
Gaussian: that is what the claim is that it refutes, and of others it is no bound.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

_PRECISION = 1e-4
_MOST = 100.0  # of an epsilon that is looked for


def mu_from_scores(without: NDArray[np.float64], with_: NDArray[np.float64], *, alarm: float) -> float:
    """Return the least mu of a Gaussian mechanism whose scores of two neighbouring data sets are as far apart as seen.

    A threshold, and the side of it that speaks for the row, are chosen on every second score; on the others the error
    rates are bounded by Clopper and Pearson's intervals (Nasr et al. 2023, "Tight auditing of differentially private
    machine learning").

    Args:
        without: Scores of releases without the row, independent of each other.
        with_: Of releases with it.
        alarm: The chance that the bound is above the truth.
    """
    first, second = ([scores[at::2] for scores in (without, with_)] for at in (0, 1))
    (more, above), (less, below) = (_chosen(side * first[0], side * first[1], alarm) for side in (1, -1))
    side, threshold = (1, above) if more >= less else (-1, below)
    return max(0.0, float(_mu(side * second[0], side * second[1], np.array([threshold]), alarm)[0]))


def _chosen(without: NDArray[np.float64], with_: NDArray[np.float64], alarm: float) -> tuple[float, float]:
    """Return the largest bound, and the threshold that gives it."""
    thresholds = np.unique(np.concatenate([without, with_]))
    mu = _mu(without, with_, thresholds, alarm)
    return float(mu.max()), float(thresholds[mu.argmax()])


def _mu(
    without: NDArray[np.float64], with_: NDArray[np.float64], thresholds: NDArray[np.float64], alarm: float
) -> NDArray[np.float64]:
    """Return the bound at each threshold, as if it had been chosen before."""
    false = len(without) - np.searchsorted(np.sort(without), thresholds, side="right")
    missed = np.searchsorted(np.sort(with_), thresholds, side="right")
    mu: NDArray[np.float64] = norm.isf(_at_most(false, len(without), alarm / 2))
    mu -= norm.ppf(_at_most(missed, len(with_), alarm / 2))
    return mu


def _at_most(events: NDArray[np.int64], trials: int, alarm: float) -> NDArray[np.float64]:
    """Return the bounds of Clopper and Pearson that an event's chance is above with a chance of ``alarm`` only."""
    bounds: NDArray[np.float64] = beta.isf(alarm, events + 1, np.maximum(trials - events, 1))
    return np.where(events == trials, 1.0, bounds)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return the epsilon of mu-Gaussian DP at a delta, exact (Balle & Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        below = np.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
        return float(norm.cdf(mu / 2 - epsilon / mu) - below) - delta

    if mu <= 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=_PRECISION))


def one_run_epsilon(canaries: int, guesses: int, correct: int, *, delta: float, alarm: float) -> float:
    """Return a lower bound of epsilon from one training run (Steinke, Nasr & Jagielski 2023, theorem 5.2).

    Each of the canaries is in the training data with probability one half, independently; an attacker guesses of some
    whether they are, and abstains from the others. How many are guessed must not depend on how well it goes.

    Args:
        canaries: How many there are.
        guesses: How many were guessed.
        correct: How many guesses are right.
        delta: The delta that belongs to epsilon.
        alarm: The chance that the bound is above the truth.
    """
    assert 0 <= correct <= guesses <= canaries, "guesses are of canaries"
    if not correct:
        return 0.0

    fewer = np.arange(1, correct + 1)

    def chance(epsilon: float) -> float:
        """Return the chance of as many right guesses under this epsilon, at most."""
        right = 1.0 / (1.0 + np.exp(-epsilon))
        as_many = binom.sf(correct - 1, guesses, right)
        just_below = binom.sf(correct - fewer - 1, guesses, right) - as_many
        return float(as_many + 2 * canaries * delta * np.max(just_below / fewer))

    if chance(0.0) >= alarm:
        return 0.0
    low, high = 0.0, _MOST
    while high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) < alarm else (low, middle)
    return low
