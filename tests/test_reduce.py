"""Reductions: any order and any spread over nodes gives the same bits, and what cannot be one is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.methods import TensorSpec
from fedlora.reduce import REDUCTIONS, Expected, OneByOne, Reduced, Reduction, WeightedMean, fold, weighted_mean
from tests.support.loop import Arrays, update_of

SPECS = {"a": TensorSpec((3, 4), "A", ("l",), 0.5, rank_axis=0), "b": TensorSpec((5, 3), "B", ("l",), 0.0, rank_axis=1)}
EXTRA = {"variate/b": SPECS["b"]}
both = pytest.mark.parametrize("kind", [WeightedMean, OneByOne])


def at(rank: int) -> dict[str, TensorSpec]:
    return {"a": TensorSpec((rank, 4), "A", ("l",), 0.5), "b": TensorSpec((5, rank), "B", ("l",), 0.0)}


def update(client: int, rank: int = 3, extra: Mapping[str, TensorSpec] | None = None) -> Update:
    return Update(ClientReport(client), update_of(client, 1, at(rank)), update_of(client, 2, extra or {}))


def expected(*clients: int, weight: int = 2, extra: Mapping[str, TensorSpec] | None = None) -> dict[int, Expected]:
    return {client: Expected(SPECS, extra or {}, weight) for client in clients}


def filled(kind: type[Reduction], *updates: Update, weight: int = 2) -> Reduction:
    reduction = kind()
    for one in updates:
        reduction.add(one, weight)
    return reduction


def sent(reduction: Reduction) -> Reduction:
    return type(reduction).decode(*reduction.encode())


def same_bits(one: Reduced, two: Reduced) -> bool:
    def arrays(reduced: Reduced) -> Arrays:
        apart = {f"{u.client}/{u.weight}/{name}": value for u in reduced.updates for name, value in u.tensors.items()}
        return {**reduced.mean, **reduced.extra, **apart}

    return (
        one.count == two.count
        and list(arrays(one)) == list(arrays(two))
        and all(np.array_equal(value, arrays(two)[name]) for name, value in arrays(one).items())
    )


@both
@given(
    ranks=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    nodes=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    order=st.permutations(range(6)),
)
def test_order_and_nodes_do_not_matter(
    kind: type[Reduction], ranks: list[int], nodes: list[int], order: list[int]
) -> None:
    """At ragged ranks, over the wire: the same bits as one node in the order of clients."""
    clients = range(len(ranks))
    straight = filled(kind, *(update(k, ranks[k]) for k in clients))
    parts = {node: kind() for node in nodes}
    for client in (k for k in order if k in clients):
        parts[nodes[client]].add(update(client, ranks[client]), 2)
    merged = kind()
    for node, part in parts.items():
        own = {k: Expected(at(ranks[k]), {}, 2) for k in clients if nodes[k] == node}
        if part.count:
            part = sent(part)
            part.check(own, "float64")
            merged.merge(part)
    assert same_bits(straight.reduced(), merged.reduced())


def test_shorter_ranks_count_as_padded_with_zeros() -> None:
    reduced = filled(WeightedMean, update(0, 1), update(1, 2), weight=3).reduced()
    one, two = update(0, 1).tensors, update(1, 2).tensors
    padded = np.vstack([one["a"], np.zeros((1, 4))])
    assert np.abs(reduced.mean["a"] - (padded + two["a"]) / 2).max() < 1e-14
    assert reduced.mean["b"].shape == (5, 2), "no rank that no client of the round holds"


def test_what_is_sent_beside_counts_all_clients_alike() -> None:
    reduction = WeightedMean()
    for client, weight in ((0, 1), (1, 99)):
        reduction.add(update(client, extra=EXTRA), weight)
    values = [update(k, extra=EXTRA).extra["variate/b"] for k in (0, 1)]
    assert np.abs(reduction.reduced().extra["variate/b"] - np.mean(values, axis=0)).max() < 1e-14


def test_an_only_update_crosses_at_half_the_bytes_of_a_sum() -> None:
    sizes = [
        sum(value.nbytes for group in filled(WeightedMean, *updates).encode()[0].values() for value in group.values())
        for updates in ((update(0),), (update(0), update(1)))
    ]
    assert sizes == [8 * 27, 2 * 8 * 27]


@both
def test_checking_twice_adds_nothing(kind: type[Reduction]) -> None:
    reduction = sent(filled(kind, update(4)))
    for _ in range(2):
        reduction.check(expected(4), "float64")
    assert reduction.count == 1


HOSTILE: list[tuple[type[Reduction], dict[str, Any], dict[str, int], str]] = [
    (WeightedMean, {"update": {}}, {"weight": 2}, "a is missing"),
    (WeightedMean, {"update": update(0).tensors}, {}, "the weight of its update is not that of its client"),
    (WeightedMean, {"update": update(0).tensors}, {"weight": -2}, "the weight of its update"),
    (WeightedMean, {"update": update(0).tensors}, {"weight": 2**62}, "the weight of its update"),
    (WeightedMean, {"update": update(0).tensors, "extra": {"x": np.ones(1)}}, {"weight": 2}, "x is not expected"),
    (WeightedMean, {"update": update(0).tensors, "coarse": {}}, {"weight": 2}, "it holds coarse, which is no part"),
    (WeightedMean, {"coarse": update(0).tensors}, {"weight": 2, "count": 1}, "one part of the sum and not the other"),
    (WeightedMean, {"coarse": {}, "fine": {}}, {"weight": 2, "count": 1}, "a is missing"),
    (WeightedMean, {"coarse": update(0).tensors, "fine": {}}, {"weight": 2, "count": 1}, "a is missing"),
    (WeightedMean, {}, {"weight": 2, "count": 1}, "it holds no update"),
    (WeightedMean, {"elsewhere": {}}, {}, "it holds elsewhere"),
    (OneByOne, {"update.0": {}}, {"weight.0": 2}, "a is missing"),
    (OneByOne, {"update.0": update(0).tensors}, {}, "update.0 is not a client's update with its weight"),
    (OneByOne, {"update.0": update(0).tensors}, {"weight.0": -2}, "the weight of client 0 is -2, not 2"),
    (OneByOne, {"update.0": update(0).tensors}, {"weight.0": 2**62}, "the weight of client 0"),
    (OneByOne, {"update.1": update(1).tensors}, {"weight.1": 2}, "one update for each of its clients"),
    (OneByOne, {"update.00": update(0).tensors}, {"weight.00": 2}, "update.00 is not a client's"),
    (OneByOne, {"update.-0": update(0).tensors}, {"weight.-0": 2}, "update.-0 is not a client's"),
    (OneByOne, {"update.\u0660": update(0).tensors}, {"weight.\u0660": 2}, "is not a client's"),
    (OneByOne, {"update." + "9" * 5000: {}}, {"weight." + "9" * 5000: 2}, "is not a client's"),
    (OneByOne, {"coarse": update(0).tensors}, {"weight": 2}, "coarse is not a client's"),
]


@pytest.mark.parametrize(("kind", "records", "header", "message"), HOSTILE)
def test_what_cannot_be_a_reduction_is_refused(
    kind: type[Reduction], records: dict[str, Any], header: dict[str, int], message: str
) -> None:
    with pytest.raises(WireError, match=message):
        kind.decode(records, header).check(expected(0), "float64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sums: setattr(sums, "weight", 5), "the weight of its sum is not that of its clients"),
        (lambda sums: setattr(sums, "count", 3), "the weight of its sum is not that of its clients"),
        (lambda sums: sums.coarse.update(a=sums.coarse["a"] + 1e-9), "its sum cannot come from that many updates"),
        (lambda sums: sums.fine.update(a=sums.fine["a"] + 1.0), "its sum cannot come from that many updates"),
        (lambda sums: sums.coarse.update(a=sums.coarse["a"].astype(np.float32)), "sum of a has dtype float32"),
        (lambda sums: sums.fine.update(a=sums.fine["a"][:2]), r"a has shape \[2, 4\], not \[3, 4\]"),
        (lambda sums: sums.fine.update(a=sums.fine["a"] * np.inf), "a holds NaN or infinity"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_sum_that_cannot_be_one_is_refused(change: Any, message: str) -> None:
    reduction = filled(WeightedMean, update(0), update(1))
    assert isinstance(reduction, WeightedMean)
    change(reduction.tensors)
    with pytest.raises(WireError, match=message):
        sent(reduction).check(expected(0, 1), "float64")


def test_a_sum_without_what_goes_beside_it_is_refused() -> None:
    with pytest.raises(WireError, match="variate/b is missing"):
        sent(filled(WeightedMean, update(0), update(1))).check(expected(0, 1, extra=EXTRA), "float64")
    with pytest.raises(WireError, match="variate/b is missing"):
        sent(filled(WeightedMean, update(0))).check(expected(0, extra=EXTRA), "float64")
    whole = sent(filled(WeightedMean, update(0, extra=EXTRA), update(1, extra=EXTRA)))
    with pytest.raises(WireError, match="variate/b is not expected"):
        whole.check(expected(0, 1), "float64")


@both
@pytest.mark.parametrize(
    ("value", "message"),
    [(1e15, "the weighted sum of b passed"), (1e308, "the weighted sum of b passed"), (np.nan, "b holds NaN")],
)
def test_numbers_that_diverge_are_refused_before_they_are_added(
    kind: type[Reduction], value: float, message: str
) -> None:
    """At the node, and once more at the server, where they may come from anywhere."""
    bad = Update(ClientReport(0), {**update(0).tensors, "b": np.full((5, 3), value)})
    reduction = kind()
    with pytest.raises(OverflowError, match=message):
        reduction.add(bad, 2)
    assert reduction.count == 0
    name = "update" if kind is WeightedMean else "update.0"
    with pytest.raises((OverflowError, WireError), match=message):
        kind.decode({name: bad.tensors}, {name.replace("update", "weight"): 2}).check(expected(0), "float64")


@both
def test_a_node_folds_what_may_be_used_and_reports_the_rest(kind: type[Reduction]) -> None:
    instruction = Instruction(1, (0, 1, 2, 3), {}, {}, reduction=kind.name)
    diverged = Update(ClientReport(1, examples=5, steps=1), {**update(1).tensors, "b": np.full((5, 3), 1e15)})
    reports, reduction = fold(
        instruction,
        [
            Update(ClientReport(0, examples=4, steps=1), update(0).tensors),
            diverged,
            Update(ClientReport(2), update(2).tensors),
            Update(ClientReport.failed(3, "out of memory")),
        ],
    )
    assert [report.outcome for report in reports] == [Outcome.OK, *[Outcome.FAILED] * 3]
    assert "passed" in reports[1].reason
    assert [report.reason for report in reports[2:]] == ["it has no training rows", "out of memory"]
    assert same_bits(reduction.reduced(), filled(kind, update(0), weight=4).reduced())


def test_weighted_mean_of_updates_that_were_kept_apart() -> None:
    updates = [(update(k), k + 1) for k in range(4)]
    apart, mean = OneByOne(), WeightedMean()
    for one, weight in updates:
        apart.add(one, weight)
        mean.add(one, weight)
    found = weighted_mean(apart.reduced().updates, ["a", "b"])
    assert all(np.abs(found[name] - value).max() < 1e-14 for name, value in mean.reduced().mean.items())
    assert weighted_mean((), []) == {}


def test_names_of_reductions() -> None:
    assert {name: REDUCTIONS[name] for name in REDUCTIONS} == {"mean": WeightedMean, "one-by-one": OneByOne}
