"""The sum that does not depend on the order of its terms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.exact_sum import ExactSum

numbers = st.floats(-1e3, 1e3, width=32)
terms = st.lists(st.tuples(st.lists(numbers, min_size=3, max_size=3), st.integers(1, 100_000)), min_size=1, max_size=12)


def folded(items: list[tuple[list[float], int]], dtype: str = "float32") -> ExactSum:
    total = ExactSum()
    for values, weight in items:
        total.add({"x": np.array(values, dtype=dtype)}, weight)
    return total


@given(terms, st.randoms(use_true_random=False), st.integers(0, 12))
def test_order_and_grouping_do_not_matter(items: list[tuple[list[float], int]], random: object, cut: int) -> None:
    """Any order, and any cut into partial sums made elsewhere, gives the same bits."""
    straight = folded(items)
    shuffled = list(items)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    left, right = folded(shuffled[:cut]), folded(shuffled[cut:])
    merged = ExactSum()
    for part in (right, left):
        if part.count:
            merged.merge(part)
    assert np.array_equal(straight.mean()["x"], merged.mean()["x"])
    assert (straight.weight, straight.count) == (merged.weight, merged.count)


@given(terms)
def test_mean_is_the_exact_mean(items: list[tuple[list[float], int]]) -> None:
    """Against rational arithmetic: off by the last grid step and one rounding."""
    mean = folded(items, "float64").mean()["x"]
    weight = sum(w for _, w in items)
    for at in range(3):
        exact = sum((Fraction(values[at]) * w for values, w in items), Fraction(0)) / weight
        assert abs(Fraction(float(mean[at])) - exact) <= Fraction(2) ** -50 + abs(exact) * Fraction(2) ** -52


def test_plain_summation_would_depend_on_the_order() -> None:
    """Control: what is guarded against is real."""
    values = np.random.default_rng(0).standard_normal(1000)
    assert float(np.cumsum(values)[-1]) != float(np.cumsum(values[::-1])[-1])


def test_leaving_the_exact_range_is_an_error_and_loses_nothing() -> None:
    total = folded([([1.0, 2.0, 3.0], 5)])
    before = total.mean()["x"].copy()
    for bad in (1e12, float("inf"), float("nan")):
        with pytest.raises(OverflowError, match="x"):
            total.add({"x": np.array([0.0, bad, 0.0])}, 1)
    assert np.array_equal(total.mean()["x"], before)
    assert (total.weight, total.count) == (5, 1)


def test_all_clients_count() -> None:
    """The mean changes when the last client changes, and weights add up (FLoRA's released code used client 0 alone)."""
    items = [([float(k)] * 3, k + 1) for k in range(5)]
    changed = [*items[:-1], ([99.0] * 3, 5)]
    assert not np.array_equal(folded(items).mean()["x"], folded(changed).mean()["x"])
    assert folded(items).weight == 15
