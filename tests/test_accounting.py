"""Epsilon against golden values, and the composition of what a client did over a whole run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from fedlora.privacy import Ledger, Use, default_delta, epsilon, least_noise_multiplier, merged

# sample rate, noise multiplier, steps, delta: epsilon by Opacus's PRV, Google's PLD, Opacus's RDP.
GOLDEN = [
    ((0.01, 1.0, 1000, 1e-5), (1.838, 1.828, 2.101)),
    ((0.064, 0.8, 300, 1e-4), (10.352, 10.341, 11.706)),
    ((0.3, 0.6, 200, 1e-5), (90.97, 90.96, 97.9)),
    ((0.001, 0.5, 20000, 1e-6), (7.740, 7.730, 9.025)),
    ((0.05, 30.0, 100, 1e-5), (0.0583, 0.0482, 0.1117)),
]


@pytest.mark.parametrize(("case", "expected"), GOLDEN)
def test_golden_epsilons(case: tuple[float, float, int, float], expected: tuple[float, float, float]) -> None:
    rate, noise, steps, delta = case
    for accountant, value in zip(("prv", "pld", "rdp"), expected, strict=True):
        found = epsilon([Use(noise, rate, steps)], target_delta=delta, accountant=accountant)  # type: ignore[arg-type]
        assert found == pytest.approx(value, rel=1e-3, abs=1e-3)


def test_gdp_is_not_offered() -> None:
    """It reports 1.618 where at least 1.82 was spent."""
    with pytest.raises(ValueError, match="gdp reports less than was spent"):
        epsilon([Use(1.0, 0.01, 1000)], target_delta=1e-5, accountant="gdp")  # type: ignore[arg-type]


def test_nothing_done_costs_nothing() -> None:
    """Opacus's PRV raises on an empty history; a client that never took part has one."""
    assert [epsilon([], target_delta=1e-5, accountant=name) for name in ("pld", "prv", "rdp")] == [0.0] * 3


def test_no_noise_costs_everything() -> None:
    assert epsilon([Use(1.0, 0.1, 5), Use(0.0, 0.1, 1)], target_delta=1e-5) == math.inf
    assert epsilon([Use(1e-6, 0.1, 5)], target_delta=1e-5) == math.inf, "at once"


def by_dp_accounting(uses: list[Use], kind: Any) -> float:
    """Compose each use by itself, the way that dp-accounting is meant to be used."""
    for use in uses:
        event = dp_accounting.PoissonSampledDpEvent(
            use.sample_rate, dp_accounting.GaussianDpEvent(use.noise_multiplier)
        )
        kind.compose(event, use.steps)
    return float(kind.get_epsilon(1e-5))


def by_opacus(uses: list[Use], kind: Any) -> float:
    """Count each step by itself, the way that Opacus's optimizer does."""
    for use in uses:
        for _ in range(use.steps):
            kind.step(noise_multiplier=use.noise_multiplier, sample_rate=use.sample_rate)
    return float(kind.get_epsilon(delta=1e-5))


def test_a_ledger_over_fifty_rounds_is_one_composition(tmp_path: Path) -> None:
    """A client that takes part in some of fifty rounds, its noise raised on the way, against others' own counting."""
    generator, ledger = np.random.default_rng(0), Ledger(tmp_path / "ledger.jsonl", 0)
    for number in range(50):
        if generator.random() < 0.5:
            ledger.charge(number + 1, Use(1.0 if number < 30 else 1.2, 0.064, 10))
    uses = Ledger(tmp_path / "ledger.jsonl", 0).uses()
    assert 15 < len(uses) < 35
    for accountant, expected in {
        "pld": by_dp_accounting(uses, PLDAccountant(value_discretization_interval=1e-3)),
        "prv": by_opacus(uses, PRVAccountant()),
        "rdp": by_opacus(uses, RDPAccountant()),
    }.items():
        found = epsilon(uses, target_delta=1e-5, accountant=accountant)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=1e-3)
        # Selling a round's epsilon as the total is the commonest of mistakes.
        assert found > 2 * epsilon(uses[:1], target_delta=1e-5, accountant=accountant)  # type: ignore[arg-type]


def test_reset_by_round_reports_a_fraction() -> None:
    """the table of what a reset ledger would report: one round, and all of them."""
    said = [epsilon([Use(1.0, 0.064, 10 * n)], target_delta=1e-5) for n in (1, 25, 50)]
    assert said == pytest.approx([2.010, 6.903, 9.922], abs=0.002)


def test_different_mechanisms_compose() -> None:
    """Noise that changed between rounds: more than either part, less than their sum."""
    parts = [Use(0.8, 0.05, 100), Use(1.2, 0.05, 100)]
    each = [epsilon([part], target_delta=1e-5) for part in parts]
    assert max(each) < epsilon(parts, target_delta=1e-5) < sum(each)
    assert epsilon(parts, target_delta=1e-5) == epsilon(parts[::-1], target_delta=1e-5)


def test_merged_adds_steps_of_equal_mechanisms() -> None:
    uses = [Use(1.0, 0.1, 3), Use(0.5, 0.1, 1), Use(1.0, 0.1, 4), Use(1.0, 0.2, 0)]
    assert merged(uses) == (Use(0.5, 0.1, 1), Use(1.0, 0.1, 7))


@pytest.mark.parametrize(
    ("target", "rate", "steps", "delta"),
    [
        *((8.0, 0.02, 400, 1e-4), (3.0, 0.02, 400, 1e-4), (0.5, 0.01, 1000, 1e-5), (8.0, 1.0, 20, 1e-4)),
        (0.11, 0.1, 10, 1e-5),  # below what RDP's orders can say
        pytest.param(0.3, 0.001, 100_000, 1e-6, marks=pytest.mark.slow),  # a coarse grid would show in so many steps
        (0.3, 1.0, 1, 0.5),  # a delta so large that nothing is left of epsilon
        (0.3, 1.0, 1, 0.9),  # nor with the noise at which the search begins
    ],
)
def test_the_least_noise_keeps_to_epsilon_and_hardly_less(target: float, rate: float, steps: int, delta: float) -> None:
    noise = least_noise_multiplier(target_epsilon=target, target_delta=delta, sample_rate=rate, steps=steps)
    assert epsilon([Use(noise, rate, steps)], target_delta=delta) <= target
    assert noise < 0.51 or epsilon([Use(noise * 0.98, rate, steps)], target_delta=delta) > target


def test_an_epsilon_that_no_noise_gives() -> None:
    with pytest.raises(ValueError, match=r"privacy.epsilon = 1e-09: no noise multiplier .* ask for a larger epsilon"):
        least_noise_multiplier(target_epsilon=1e-9, target_delta=1e-5, sample_rate=0.5, steps=1000)


@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 99, 160, 692, 1000, 12345])
def test_the_default_delta_is_below_one_over_the_rows(size: int) -> None:
    assert 0.01 / size < default_delta(size) <= 0.1 / size
