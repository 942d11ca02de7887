"""LoRA-LEGO: clustered ranks against k-means by hand, its symmetries, and wrong rules planted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedlora import lego
from fedlora.lego import Clusters, merge_units
from fedlora.methods.products import Product, pairs
from fedlora.reduce import ClientUpdate, Reduced
from fedlora.shapes import cut
from strategies import LoRALego
from tests.test_product_rules import RANK, RANKS, SHARES, SPECS, normal, off, reduced, setting, start_of

D_IN, D_OUT = 12, 7


def lora(rank: int, *key: int) -> Product:
    return normal(rank, *key, shape=(rank, D_IN)), normal(rank, 1, *key, shape=(D_OUT, rank))


def whole(product: Product) -> Any:
    return product[1] @ product[0]


def by_hand(products: Sequence[Product], shares: Sequence[float], start: Product) -> Product:
    """Return what LEGO merges, one unit and one sign at a time, in as many steps as k-means takes."""
    pool = [
        (share, np.concatenate([a[i], b[:, i]]))
        for share, (a, b) in zip(shares, products, strict=True)
        for i in range(len(a))
    ]
    centroids = [np.concatenate([start[0][i], start[1][:, i]]) for i in range(len(start[0]))]
    for _ in range(50):
        members = []  # what a unit adds to its distance, its cluster, its weight, itself with its sign
        for share, unit in pool:
            gaps = {
                (at, sign): ((sign * unit - centroid) ** 2).sum()
                for at, centroid in enumerate(centroids)
                for sign in (1, -1)
            }
            at, sign = min(gaps, key=lambda one: gaps[one])
            members.append([share * gaps[at, sign], at, share, sign * unit, unit])
        for empty in set(range(len(centroids))) - {one[1] for one in members}:
            others = [one for one in members if sum(one[1] == other[1] for other in members) > 1]
            moved = max(others, key=lambda one: one[0])
            moved[1], moved[3] = empty, moved[4]
        clusters = [[(one[2], one[3]) for one in members if one[1] == at] for at in range(len(centroids))]
        centroids = [sum(w * u for w, u in one) / sum(w for w, _ in one) for one in clusters]
    lengths = [sum(w * np.linalg.norm(u) for w, u in one) / sum(w for w, _ in one) for one in clusters]
    scaled = np.array([c * n / np.linalg.norm(c) for c, n in zip(centroids, lengths, strict=True)])
    width, most = start[0].shape[1], max(len(a) for a, _ in products)
    return scaled[:, :width], np.sqrt(most / len(scaled)) * scaled[:, width:].T


@pytest.mark.parametrize("ranks", [(), RANKS, (1, 3, 2)])
def test_the_server_clusters_ranks_as_by_hand(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the widest client has fewer ranks than the server, whose other ranks stay as they were."""
    strategy = LoRALego(setting(ranks=ranks))
    found, state = reduced(strategy), start_of(strategy)
    most = max(ranks, default=RANK)
    expected = {}
    for layer, a, b in pairs(SPECS):
        own = [(one.tensors[a], one.tensors[b]) for one in found.updates]
        expected[layer] = by_hand(own, SHARES, (state.tensors[a][:most], state.tensors[b][:, :most]))

    def worst() -> float:
        tensors = strategy.apply(state, found, 1).tensors
        for _, a, b in pairs(SPECS):
            assert np.array_equal(tensors[a][most:], state.tensors[a][most:])
            assert np.array_equal(tensors[b][:, most:], state.tensors[b][:, most:])
        return max(
            max(off(tensors[a][:most], expected[layer][0]), off(tensors[b][:, :most], expected[layer][1]))
            for layer, a, b in pairs(SPECS)
        )

    assert worst() < 1e-12
    right = lego._assigned
    for wrong in (
        lambda units, weights, centroids: right(units, np.ones_like(weights), centroids)._replace(
            signs=np.ones(len(units))
        ),
        lambda units, weights, centroids: right(units, weights, np.ones_like(centroids)),
    ):
        monkeypatch.setattr(lego, "_assigned", wrong)
        assert worst() > 0.1
    monkeypatch.setattr(lego, "_assigned", right)
    monkeypatch.setattr("strategies.lora_lego.shares", lambda updates: [1 / len(updates)] * len(updates))
    assert worst() > 1e-3


def turned(products: Sequence[Product], order: Sequence[int], *, signs: bool) -> list[Product]:
    """Return LoRAs in another order, with their ranks in another order, some of opposite sign: the same products."""
    changed = []
    for at in order:
        a, b = products[at]
        ranks = np.random.default_rng(at).permutation(len(a))
        sign = np.where(np.arange(len(a)) % 2, -1.0, 1.0) if signs else np.ones(len(a))
        changed.append((sign[:, None] * a[ranks], b[:, ranks] * sign))
    return changed


@pytest.mark.parametrize("start", [None, lora(3, 9)])
def test_neither_order_nor_signs_of_ranks_matter(start: Product | None, monkeypatch: pytest.MonkeyPatch) -> None:
    products, shares, order = [lora(2, 5), lora(4, 6), lora(3, 7)], [0.2, 0.5, 0.3], (2, 0, 1)
    weights = [shares[at] for at in order]

    def apart() -> float:
        other = merge_units(turned(products, order, signs=True), weights, 3, start)
        return off(whole(other), whole(merge_units(products, shares, 3, start)))

    assert apart() < 1e-12
    right = lego._assigned

    def nearest(units: Any, weights: Any, centroids: Any) -> Clusters:
        """Planted: a unit and its negative are different ones."""
        gaps = ((units[:, None] - centroids) ** 2).sum(-1)
        labels = gaps.argmin(1)
        return Clusters(labels, np.ones(len(units))) if len(set(labels)) == 3 else right(units, weights, centroids)

    monkeypatch.setattr(lego, "_assigned", nearest)
    assert apart() > 0.1


def test_equal_loras_merge_to_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where units are zero, or where two of them are nearest to the same unit of the start."""
    a, b = lora(4)
    still = a, np.concatenate([b[:, :2], 0 * b[:, 2:]], 1)
    far = 10 * normal(3, shape=a.shape), 10 * normal(4, shape=b.shape)
    far[0][0], far[1][:, 0] = a[:2].sum(0), b[:, :2].sum(1)
    cases = [(one, start) for one in ((a, b), still, (0 * a, 0 * b)) for start in (None, (a, b), far)]
    for product, start in cases:
        merged = merge_units([product] * 3, [0.5, 0.2, 0.3], 4, start)
        assert np.abs(whole(merged) - whole(product)).max() < 1e-12
    # Of LoRAs that are the first ranks of one and the same, too: no rank is pulled to zero by those who lack it.
    parts = [(a[:rank], b[:, :rank]) for rank in (1, 4, 2)]
    assert np.abs(whole(merge_units(parts, SHARES, 4)) - b @ a).max() < 1e-12

    def emptied(units: Any, weights: Any, centroids: Any) -> Clusters:
        """Planted: a cluster without units stays without, and its rank is lost."""
        dots = units @ centroids.T
        labels = (2 * np.abs(dots) - (centroids**2).sum(1)).argmax(1)
        return Clusters(labels, np.where(dots[np.arange(len(units)), labels] < 0, -1.0, 1.0))

    monkeypatch.setattr(lego, "_assigned", emptied)
    with np.errstate(invalid="ignore"):
        lost = whole(merge_units([(a, b)] * 3, [0.5, 0.2, 0.3], 4, far))
    assert not np.abs(lost - b @ a).max() < 0.1


def test_scales_of_what_is_merged() -> None:
    """A centroid has the mean norm of its members, and k ranks in place of r are worth the root of r / k."""
    a, b = lora(2)
    other = np.roll(a, 1, axis=1), b  # as long, and elsewhere
    merged = merge_units([(a, b), other], [0.25, 0.75], 4)
    assert off(whole(merged), np.sqrt(0.5) * (whole((a, b)) + whole(other))) < 1e-12
    one = merge_units([(a[:1], b[:, :1]), (3 * a[:1], 3 * b[:, :1])], [0.25, 0.75], 1)
    assert off(whole(one), 2.5**2 * whole((a[:1], b[:, :1]))) < 1e-12
    near = a[:1] + 0.5 * normal(8, shape=(1, D_IN)), b[:, :1]
    mean = np.concatenate([a[:1], b[:, :1].T], 1) / 2 + np.concatenate([near[0], near[1].T], 1) / 2
    ((row,), column) = merge_units([(a[:1], b[:, :1]), near], [0.5, 0.5], 1)
    norms = [np.linalg.norm(np.concatenate([c[0], d[:, 0]])) for c, d in ((a[:1], b[:, :1]), near)]
    merged_unit = np.concatenate([row, column[:, 0]])
    assert np.linalg.norm(merged_unit) == pytest.approx(np.mean(norms))
    assert np.linalg.norm(mean) < 0.99 * np.mean(norms), "control: the mean itself is shorter"


def test_clients_that_send_what_they_were_sent_leave_the_model_at_any_ranks() -> None:
    """To the place: each rank of the server stays where it was, so that clients are sent the same first ranks again."""
    strategy = LoRALego(setting(ranks=RANKS))
    state = start_of(strategy)
    for at, name in enumerate(SPECS):
        state.tensors[name][:] = normal(at, shape=SPECS[name].shape)  # type: ignore[index]
    updates = tuple(
        ClientUpdate(
            client, 1 + client, {n: cut(state.tensors[n], s.shape) for n, s in strategy.sent(1, client).items()}
        )
        for client in range(3)
    )
    ended = strategy.apply(state, Reduced(3, updates=updates), 1).tensors
    assert all(np.abs(ended[name] - state.tensors[name]).max() < 1e-13 for name in SPECS)
