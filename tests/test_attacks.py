"""Lower bounds of epsilon: what the papers state, what exact mechanisms give, and how often they may be wrong."""

from __future__ import annotations

import numpy as np
import pytest

from fedlora.privacy import epsilon
from fedlora.privacy.accounting import Use
from fedlora.privacy.attacks import epsilon_of_mu, mu_from_scores, one_run_epsilon, shares_in_sum


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_one_run_gives_the_published_bounds(
    canaries: int, guesses: int, correct: int, delta: float, published: float
) -> None:
    assert one_run_epsilon(canaries, guesses, correct, delta=delta, alarm=0.05) == pytest.approx(published, abs=2e-3)


def test_one_run_says_nothing_of_guesses_that_are_no_better_than_chance() -> None:
    for correct in (0, 40, 50, 58):
        assert one_run_epsilon(1000, 100, correct, delta=1e-5, alarm=0.05) == 0.0
    without_delta = [one_run_epsilon(m, m, m, delta=0.0, alarm=0.05) for m in (50, 1000)]
    for bound, m in zip(without_delta, (50, 1000), strict=True):
        likely = 0.05 ** (1 / m)  # of a right guess, where all of them are right by a chance of 0.05
        assert bound == pytest.approx(np.log(likely / (1 - likely)), abs=1e-3)
    assert one_run_epsilon(1000, 100, 75, delta=1e-2, alarm=0.05) < 0.673, "a larger delta explains more"


@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (1.0, 1), (2.0, 4), (5.0, 1)])
def test_epsilon_of_mu_is_the_accountants_where_every_row_is_in_every_batch(noise: float, steps: int) -> None:
    expected = epsilon([Use(noise, 1.0, steps)], target_delta=1e-5)
    assert epsilon_of_mu(steps**0.5 / noise, 1e-5) == pytest.approx(expected, rel=1e-3)


def test_epsilon_of_hardly_any_mu_is_nothing() -> None:
    assert epsilon_of_mu(0.0, 1e-5) == epsilon_of_mu(1e-6, 1e-3) == 0.0


def test_mu_is_below_the_truth_and_not_far_below() -> None:
    """At a stated chance of one in fifty: of 200 bounds a dozen or more above the truth would be next to impossible."""
    generator = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        without, with_ = generator.standard_normal((2, 1000))
        bounds.append(mu_from_scores(without, with_ + 1.0, alarm=0.02))
    assert sum(bound > 1.0 for bound in bounds) < 12
    assert 0.6 < np.median(bounds) < 1.0


def test_mu_of_scores_that_say_nothing() -> None:
    generator = np.random.default_rng(0)
    assert mu_from_scores(*generator.standard_normal((2, 400)), alarm=1e-6) == 0.0
    assert mu_from_scores(np.zeros(400), np.zeros(400), alarm=1e-6) == 0.0, "all alike"
    for one, other in ((0, 1), (1, 0)):
        apart = mu_from_scores(np.full(400, one), np.full(400, other), alarm=1e-6)
        assert 2.5 < apart < 4.0, "bounded by how many there are, whichever is larger"


def test_a_share_is_the_best_linear_estimate() -> None:
    """Of gradients at right angles, of length 2: the prior's half, and what the noise leaves of the inner product."""
    gradients, deviation = 2.0 * np.eye(3, 5), 0.75
    released = np.array([2.0, 0.5, -1.0, 7.0, 7.0])
    expected = 0.5 + 2.0 * (released[:3] - 1.0) / (4.0 + 4 * deviation**2)
    assert shares_in_sum(released, gradients, deviation) == pytest.approx(expected)


def test_rows_are_found_in_a_sum_without_noise() -> None:
    """Directions at random, with a part that all have in common, as gradients have."""
    generator = np.random.default_rng(0)
    gradients = generator.standard_normal((300, 1000)) + 3.0 * generator.standard_normal(1000)
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    there = generator.random(300) < 0.5
    total = gradients[there].sum(0)
    assert ((shares_in_sum(total, gradients, 1e-6) > 0.5) == there).all()
    bare = shares_in_sum(total, gradients, 2.0)  # noise was promised, and there is none
    guesses = np.argsort(bare)
    correct = int(there[guesses[-60:]].sum() + (~there[guesses[:60]]).sum())
    claimed = epsilon([Use(2.0, 1.0, 1)], target_delta=1e-5)
    assert one_run_epsilon(300, 120, correct, delta=1e-5, alarm=0.05) > claimed
