"""Membership inference by likelihood ratios (LiRA), offline form, from models trained on random halves of known rows.

Each model has seen about half of the rows. For a row the models that have not seen it say how a model behaves on a row
that it does not know; one that behaves better than that is taken to have seen it (Carlini et al. 2022, "Membership
inference attacks from first principles", section V-C). Each model is attacked by means of all the others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

_LEAST_PROBABILITY = 1e-12
LEAST_MODELS = 4
"""Other models that have not seen a row, so that something can be said of it."""


def logit(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log(p / (1 - p)) of the probability p = exp(-loss) that a model gives to the right answer.

    Losses themselves are far from normal; these are near to it (the same paper, section V-A).
    """
    right = np.clip(np.exp(-losses), _LEAST_PROBABILITY, 1.0 - _LEAST_PROBABILITY)
    confidence: NDArray[np.float64] = np.log(right) - np.log1p(-right)
    return confidence


def likelihood_ratios(scores: NDArray[np.float64], seen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return how unlikely each model's score of a row is for a model that has not seen the row, in deviations.

    A row's scores under models that have not seen it are taken as normal, with a mean of the row's own and one
    deviation for all rows, as the paper does where models are few.

    Args:
        scores: Larger for rows that a model knows, [models, rows].
        seen: Which model has seen which row, [models, rows].

    Raises:
        ValueError: A row was not seen by nearly all models.
    """
    out = ~seen
    others = out.sum(0) - out  # without the model that is attacked
    if others.min() < LEAST_MODELS:
        raise ValueError(
            f"{len(scores)} models, and {int(others.min())} others that have not seen some row: at least "
            f"{LEAST_MODELS} are needed; train more models."
        )
    masked = np.where(out, scores, 0.0)
    mean = (masked.sum(0) - masked) / others
    apart = np.where(out, scores - masked.sum(0) / out.sum(0), 0.0)
    freedom = out.sum() - scores.shape[1]  # a mean is taken off each row
    deviation = float(np.sqrt(np.square(apart).sum() / freedom))
    ratios: NDArray[np.float64] = (scores - mean) / max(deviation, float(np.finfo(float).tiny))
    ratios /= np.sqrt(1.0 + 1.0 / others)  # the mean is an estimate, too
    return ratios


def found_at(scores: NDArray[np.float64], seen: NDArray[np.bool_], false_positives: float = 0.01) -> float:
    """Return the share of seen rows that are named where this share of those not seen is named, too."""
    threshold = np.quantile(scores[~seen], 1.0 - false_positives, method="higher")
    return float((scores[seen] > threshold).mean())


def area_under_curve(scores: NDArray[np.float64], seen: NDArray[np.bool_]) -> float:
    """Return the chance that a row that was seen scores above one that was not; one half: nothing is known."""
    ranks, many = rankdata(scores.ravel())[seen.ravel()], int(seen.sum())
    return float((ranks.sum() - many * (many + 1) / 2) / (many * (seen.size - many)))


def found_at_most(epsilon: float, delta: float, false_positives: float = 0.01) -> float:
    """Return the largest share that any attacker can name under (epsilon, delta)-DP at this share of false ones.

    Source: Kairouz, Oh & Viswanath 2015, "The composition theorem for differential privacy", theorem 2.1.
    """
    by_few = np.exp(min(epsilon, 700.0)) * false_positives + delta
    by_rest = 1.0 - np.exp(-epsilon) * (1.0 - delta - false_positives)
    return float(min(1.0, by_few, by_rest))


def interval(
    values: NDArray[np.float64], seen: NDArray[np.bool_], false_positives: float = 0.01, draws: int = 200
) -> tuple[float, float]:
    """Return the middle 95 % of :func:`found_at` over models drawn again with replacement (bootstrap).

    Args:
        values: Scores [models, rows].
        seen: Which model has seen which row.
        false_positives: The share of rows not seen that may be named.
        draws: How often models are drawn.
    """
    generator = np.random.default_rng(0)
    chosen = (generator.integers(0, len(values), len(values)) for _ in range(draws))
    low, high = np.quantile([found_at(values[one], seen[one], false_positives) for one in chosen], [0.025, 0.975])
    return float(low), float(high)
