"""The sum in blocks is the sum of one term at a time, to the bit, whatever sizes, weights and blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora import block_sum
from fedlora.exact_sum import ExactSum
from fedlora.reduce import WeightedMean
from tests.support.exact_sum_reference import ExactSum as OneByOne
from tests.test_reduce import filled, sent, update

Terms = list[tuple[dict[str, np.ndarray], int]]


def reference(terms: Terms) -> dict[str, np.ndarray]:
    total = OneByOne()
    for tensors, weight in terms:
        total.add(tensors, weight)
    return total.mean()


def drawn(seed: int, count: int, dtype: str, exponents: tuple[int, int], most: int) -> Terms:
    """Terms whose numbers are of every size between two powers of two, with zeros among them."""
    rng = np.random.default_rng(seed)
    terms: Terms = []
    for _ in range(count):
        tensors = {}
        for name, shape in (("a", (3, 70)), ("b", (7,)), ("c", (0, 4)), ("d", (50, 4))):
            value = rng.standard_normal(shape) * 2.0 ** rng.integers(*exponents, size=shape)
            tensors[name] = np.where(rng.random(shape) < 0.1, 0.0, value).astype(dtype)
        terms.append((tensors, int(rng.integers(1, most + 1))))
    return terms


@settings(deadline=None, max_examples=120)
@given(
    st.integers(0, 2**32),
    st.integers(1, 9),
    st.sampled_from(["float32", "float64"]),
    st.sampled_from([(-60, -20), (-30, 1), (-40, 12), (-60, 20), (-20, 1), (-26, 3), (-8, 12)]),
    st.sampled_from([1, 5, 1000]),
    st.sampled_from([16, 64, 1 << 16]),
    st.integers(1, 5),
)
def test_it_is_the_sum_of_one_term_at_a_time(
    seed: int, count: int, dtype: str, exponents: tuple[int, int], most: int, block: int, together: int
) -> None:
    terms = drawn(seed, count, dtype, exponents, most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sum, "_BLOCK", block)
        patch.setattr(block_sum, "_CLIENTS", together)
        total = ExactSum.of(terms)
    assert total.is_sound()
    found = total.mean()
    for name, value in reference(terms).items():
        assert np.array_equal(found[name], value), name
        assert found[name].shape == value.shape
    shuffled = ExactSum.of(terms[1:] + terms[:1])
    assert all(np.array_equal(found[name], value) for name, value in shuffled.mean().items())


@pytest.mark.parametrize(
    "numbers",
    [
        (64.0, 2.0**-26 * (1 + 2.0**-23), -64.0),
        (7.0, 2.0**-27 * (1 + 2.0**-23), 7.0, -7.0, -7.0),
        (3 * 2.0**-52,) * 4,
        (0.0, 3 * 2.0**-52, 0.0, 2.0**-51),
        (2.0**-149, -(2.0**-149), 1.0),
    ],
    ids=["two that float64 cannot hold together", "a few that it cannot", "rounded each", "zeros between", "subnormal"],
)
@pytest.mark.parametrize("weight", [1, 3])
def test_clients_are_added_up_at_once_only_where_that_is_exact(numbers: tuple[float, ...], weight: int) -> None:
    """One product of weights and numbers would give something else here."""
    terms: Terms = [({"x": np.array([number, -number], np.float32)}, weight) for number in numbers]
    assert np.array_equal(ExactSum.of(terms).mean()["x"], reference(terms)["x"])


@pytest.mark.parametrize("exponent", range(-55, -22))
def test_what_lies_between_two_grid_points_goes_to_the_even_one(exponent: int) -> None:
    """Half a step more or less than a point, for one client and for two, of either sign."""
    step = 2.0**-50
    points = np.array([k * step + half * step for k in (0, 1, 2, 2**20, 2**20 + 1) for half in (-0.5, 0.5)])
    tie = points + 2.0**exponent
    for value in (points, -points, tie, -tie):
        for terms in ([({"x": value}, 1)], [({"x": value}, 3), ({"x": points[::-1].copy()}, 1)]):
            assert np.array_equal(ExactSum.of(terms).mean()["x"], reference(terms)["x"])


def test_the_largest_sums_are_exact_and_larger_ones_refused() -> None:
    near = 2.0**36 - 2.0**-16
    terms: Terms = [({"x": np.array([near, -near, 2.0**35, 1.0])}, 1)]
    assert np.array_equal(ExactSum.of(terms).mean()["x"], reference(terms)["x"])
    for wrong in (2.0**36, np.inf, -np.inf, np.nan):
        with pytest.raises(OverflowError, match="x"):
            ExactSum.of([({"w": np.ones(2), "x": np.array([0.0, wrong])}, 1)])
    with pytest.raises(OverflowError, match="passed"):
        ExactSum.of([*terms, *terms])
    there_and_back = [({"x": np.array([sign * near])}, 1) for sign in (1, 1, 1, -1, -1, -1)]
    with pytest.raises(OverflowError, match="passed"):  # the end is within the range, and the way there is not
        ExactSum.of(there_and_back)


def test_more_terms_than_fit_one_call() -> None:
    terms: Terms = [({"x": np.array([1.75, -1.75, 2.0**-50])}, 1)] * (block_sum.MOST + 3)
    total = ExactSum.of(terms)
    assert (total.count, total.weight) == (len(terms), len(terms))
    assert np.array_equal(total.mean()["x"], [1.75, -1.75, 2.0**-50])


def test_clients_that_send_nothing_are_counted() -> None:
    """A strategy may exchange no tensor at all."""
    total = ExactSum.of([({}, 2), ({}, 3)])
    assert (total.count, total.weight, total.mean()) == (2, 5, {})


def test_a_sum_is_not_changed_by_what_is_added_to_its_copy() -> None:
    first = ExactSum.of([({"x": np.ones(3)}, 1)])
    other = first.copy()
    for _ in range(2):
        other.merge(ExactSum.of([({"x": np.ones(3)}, 2)]))
        first.merge(ExactSum.of([({"x": np.zeros(3)}, 1)]))
    assert np.array_equal(first.coarse["x"], np.ones(3))
    assert np.array_equal(other.coarse["x"], 5 * np.ones(3))


def test_what_a_trainer_has_reduced_is_what_the_server_would_have() -> None:
    """A pack's updates at once, in parts that crossed a wire read-only, and one by one: the same bits."""
    updates = [(update(client), 1 + client) for client in range(5)]
    at_once, parts = WeightedMean(), WeightedMean()
    at_once.add_all(updates)
    for some in (updates[:2], updates[2:4], updates[4:]):
        part = WeightedMean()
        part.add_all(some)
        parts.merge(sent(part))
    straight = filled(WeightedMean)
    for one, weight in updates:
        straight.add(one, weight)
    for found in (at_once, parts):
        mean = found.reduced()
        assert mean.count == 5
        assert all(np.array_equal(mean.mean[name], value) for name, value in straight.reduced().mean.items())
