"""What a budget buys, as data frames: against accountants, plans and published figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedlora.privacy import epsilon
from fedlora.privacy.accounting import Use
from simulations.api import configuration, plan
from simulations.budget import accountants, gaussian_dp_epsilon, noise_by_epsilon, schedules
from tests.support.trainers import tiny_flat


def test_noise_keeps_to_its_epsilon() -> None:
    frame = noise_by_epsilon([2.0, 8.0], [0.1, 1.0], steps=10, delta=1e-4)
    assert len(frame) == 4
    for _, row in frame.iterrows():
        spent = epsilon([Use(row["noise_multiplier"], row["sample_rate"], 10)], target_delta=1e-4)
        assert row["epsilon"] * 0.99 < spent <= row["epsilon"]


def test_gaussian_dp_says_less_than_was_spent_and_the_figure_shows_it() -> None:
    """By Opacus' own function: 1.618 where PLD says 1.83, and 9.745 where it says 10.34."""
    assert gaussian_dp_epsilon(Use(1.0, 0.01, 1000), 1e-5) == pytest.approx(1.618, abs=2e-3)
    assert gaussian_dp_epsilon(Use(0.8, 0.064, 300), 1e-4) == pytest.approx(9.745, abs=5e-3)
    frame = accountants(Use(1.0, 0.01, 1000), delta=1e-5, points=2).pivot(
        index="steps", columns="accountant", values="epsilon"
    )
    assert list(frame.index) == [500, 1000]
    assert (frame["gdp"] < frame["pld"]).all()
    assert (frame["rdp"] > frame["pld"]).all()
    np.testing.assert_allclose(frame["prv"], frame["pld"], rtol=0.02)


def test_schedules_are_those_of_plans(tmp_path: Path) -> None:
    settings = tiny_flat(tmp_path, **{"privacy.mode": "dp", "privacy.epsilon": 4.0, "train.batch-size": 8})
    planned = plan(settings)
    frame = schedules(planned, rounds=[2], batch_sizes=[4, 10_000], clients=[1, 4])
    assert len(frame) == 2, "a batch larger than a client is left out"
    for _, row in frame.iterrows():
        changed = {"rounds": int(row["rounds"]), "train.batch-size": int(row["batch_size"])}
        own = plan({**settings, **changed}).privacy
        assert own is not None
        assert row["noise_multiplier"] == own.mechanism.noise_multiplier
        assert row["signal_to_noise"] == own.signal_to_noise(own.steps)
        assert row["signal_to_noise_of_mean"] == pytest.approx(row["signal_to_noise"] * row["clients"] ** 0.5)
    with pytest.raises(ValueError, match=r"privacy\.epsilon"):
        schedules(plan(tiny_flat(tmp_path)), rounds=[1], batch_sizes=[4])


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'train\.batchsize'.*train\.batch-size"):
        configuration({**tiny_flat(tmp_path), "train.batchsize": 8})
