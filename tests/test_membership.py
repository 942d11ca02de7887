"""Membership inference: scores of known distributions, what a guarantee allows, and attacks on tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from fedlora.privacy.attacks import area_under_curve, found_at, found_at_most, likelihood_ratios, logit
from simulations.membership import ADAPTER, UPDATE, membership
from tests.support.trainers import tiny_flat


def test_logits_are_those_of_the_right_answers_probability() -> None:
    right = np.array([0.01, 0.5, 0.9])
    np.testing.assert_allclose(logit(-np.log(right)), np.log(right / (1 - right)))
    assert np.isfinite(logit(np.array([0.0, 1e9]))).all()


def test_ratios_find_what_models_know_and_nothing_where_they_know_nothing() -> None:
    generator = np.random.default_rng(0)
    seen = generator.random((64, 200)) < 0.5
    rows = 5.0 * generator.standard_normal(200)  # rows differ by far more than what is known of them
    noise = generator.standard_normal(seen.shape)
    known, unknown = (likelihood_ratios(rows + shift * seen + noise, seen) for shift in (3.0, 0.0))
    expected = norm.sf(norm.isf(0.01) - 3.0)
    assert found_at(known, seen) == pytest.approx(expected, abs=0.05)
    assert area_under_curve(known, seen) == pytest.approx(norm.cdf(3.0 / np.sqrt(2)), abs=0.01)
    assert found_at(unknown, seen) == pytest.approx(0.01, abs=0.005)
    assert area_under_curve(unknown, seen) == pytest.approx(0.5, abs=0.02)
    assert area_under_curve(rows + 3.0 * seen + noise, seen) < 0.7, "without what other models say of a row"


def test_a_models_own_score_says_nothing_of_what_is_usual() -> None:
    """Planted: one model's scores are absurd where it has seen the row; ratios of the others do not move by them."""
    generator = np.random.default_rng(0)
    seen = generator.random((32, 50)) < 0.5
    scores = generator.standard_normal(seen.shape)
    before = likelihood_ratios(scores, seen)
    scores[0, seen[0]] += 100.0
    after = likelihood_ratios(scores, seen)
    np.testing.assert_allclose(after[1:], before[1:])
    assert (after[0, seen[0]] > 50).all()


def test_few_models_say_nothing() -> None:
    with pytest.raises(ValueError, match="train more models"):
        likelihood_ratios(np.zeros((4, 3)), np.array([[True, False, True]] * 2 + [[False, True, False]] * 2))


@pytest.mark.parametrize(("epsilon", "share"), [(0.0, 0.01), (1.0, 0.0272), (3.0, 0.2009), (8.0, 0.9997)])
def test_what_a_guarantee_allows(epsilon: float, share: float) -> None:
    """The figures of docs/choosing-epsilon.md."""
    assert found_at_most(epsilon, 0.0) == pytest.approx(share, abs=5e-4)
    assert found_at_most(epsilon, 1e-3) >= found_at_most(epsilon, 0.0)
    assert found_at_most(float("inf"), 0.0) == 1.0


def test_an_over_fitted_adapter_is_found_out_and_a_private_one_is_not(tmp_path: Path) -> None:
    settings = tiny_flat(tmp_path, **{"train.batch-size": 8, "strategy.name": "fedavg"})
    private = {"privacy.mode": "dp", "train.local-steps": 2, "train.optimizer": "sgd", "privacy.noise-multiplier": 20.0}
    guarded, fitted = membership(
        [{**settings, **private}, {**settings, "train.local-steps": 40, "train.learning-rate": 0.05}],
        models=20,
        rows=20,
    )
    for attack in (ADAPTER, UPDATE):
        assert area_under_curve(fitted.ratios[attack], fitted.seen) > 0.55, attack
        assert area_under_curve(guarded.ratios[attack], guarded.seen) < 0.65, attack  # one half, and 0.03 by chance
    assert area_under_curve(fitted.ratios[ADAPTER], fitted.seen) > 0.68
    assert fitted.epsilon == float("inf")
    assert 0 < guarded.epsilon < 1
    frame = guarded.frame()
    assert list(frame["attack"]) == [ADAPTER, UPDATE]
    assert (frame["named_low"] <= frame["named_high"]).all()
    assert (frame["named_at_most"] == found_at_most(guarded.epsilon, guarded.config.privacy.delta)).all()


def test_too_few_models_or_rows_are_refused_before_any_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="models = 8: 10 are needed"):
        membership([tiny_flat(tmp_path)], models=8, rows=20)
    with pytest.raises(ValueError, match=r"method.ranks = '1,2': membership is asked of clients of one rank"):
        membership([tiny_flat(tmp_path, **{"method.ranks": "1,2"})], models=10, rows=20)
    with pytest.raises(ValueError, match="name fewer"):
        membership([tiny_flat(tmp_path)], models=10, rows=10_000)
