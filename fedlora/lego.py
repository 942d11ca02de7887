"""LoRA-LEGO: several LoRAs of any ranks become one by clustering their ranks.

Zhao, Shen, Zhu, Li, Su, Wang, Kuang & Wu, "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
Through Rank-Wise Clustering", ICLR 2025, arXiv 2409.16167.

A minimal semantic unit (MSU) of a layer is one of its ranks: u = [a; b], a row a of A beside the column b of B that it
is multiplied with, the scale in b. A LoRA is the sum of its units, B A = sum b a^T, in any order. The units of all
LoRAs go into one pool, k-means makes k clusters of it, and each centroid is a rank of the merged LoRA, whatever the
ranks of those that it is of. Two reweightings follow: of the parameters, since a mean is shorter than its members, and
of the output, since a sum of k centroids varies more than one of r units:

    centroid <- centroid * (mean norm of its members) / |centroid|        B <- sqrt(r / k) B

Read of the paper were its abstract and summaries, which name units, pool, clusters, centroids and both reweightings;
their formulas, and how the paper clusters, could not be checked. Our choice:

- u and -u are the same rank, so a unit's distance to a centroid is that of the nearer of the two, and it enters the
  centroid with that sign;
- each unit weighs as its LoRA does, in centroids, mean norms and distances;
- r is the largest rank among the LoRAs, so that the output is left alone where k = r;
- k-means starts from given units, or from the farthest ones: the longest unit, then always that which is farthest from
  all chosen, weighted. No seed is needed, and neither the order of LoRAs nor that of their ranks matters;
- a cluster that loses its last unit takes the one that is farthest from its own centroid, of a cluster of several. So
  equal LoRAs of k ranks, no two of them equal, merge to themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.products import Product

Array = NDArray[np.float64]

_STEPS = 100  # of k-means at most; it ends where nothing changes any more, mostly after a few


class Clusters(NamedTuple):
    """Units by cluster."""

    labels: NDArray[np.int64]  # [n], the cluster of each unit
    signs: Array  # [n], the sign with which each unit is in it


def merge_units(
    products: Sequence[Product], shares: Sequence[float], rank: int, start: Product | None = None
) -> Product:
    """Return the LoRA of ``rank`` ranks that some LoRAs merge to.

    Args:
        products: Their A [r_i, d_in] and B [d_out, r_i], the scale in B; together they have ``rank`` ranks or more.
        shares: The weight of each, above 0.
        rank: The number of clusters.
        start: The LoRA of that rank whose units k-means starts from; each stays in its place. None: from the farthest
            units.
    """
    ranks = [len(a) for a, _ in products]
    assert sum(ranks) >= rank, "a cluster without a unit has no centroid"
    units = np.concatenate([_units(one) for one in products])
    weights = np.repeat(np.asarray(shares, dtype=np.float64), ranks)
    found, centroids = cluster(units, weights, _farthest(units, weights, rank) if start is None else _units(start))
    totals = np.bincount(found.labels, weights, rank)
    norms = np.bincount(found.labels, weights * np.linalg.norm(units, axis=1), rank) / totals
    lengths = np.linalg.norm(centroids, axis=1)
    centroids *= np.divide(norms, lengths, out=np.ones(rank), where=lengths > 0)[:, None]
    a, b = np.split(centroids, [products[0][0].shape[1]], axis=1)
    return a, np.sqrt(max(ranks) / rank) * b.T


def cluster(units: Array, weights: Array, centroids: Array) -> tuple[Clusters, Array]:
    """Return the clusters that weighted k-means up to signs ends with, none of them empty, and their centroids.

    Args:
        units: [n, d], with n at least k.
        weights: Of the units, [n].
        centroids: What it starts from, [k, d].
    """
    found = _assigned(units, weights, centroids)
    for _ in range(_STEPS):
        members = np.zeros((len(centroids), len(units)))  # [k, n]
        members[found.labels, np.arange(len(units))] = weights * found.signs
        centroids = members @ units / np.abs(members).sum(1, keepdims=True)
        before, found = found, _assigned(units, weights, centroids)
        if all(map(np.array_equal, before, found)):
            break
    return before, centroids


def _assigned(units: Array, weights: Array, centroids: Array) -> Clusters:
    """Return the nearest centroid of each unit, or of its negative; one unit at least to each."""
    dots = units @ centroids.T
    near = 2 * np.abs(dots) - np.square(centroids).sum(1)  # [n, k]: |u|^2 less the squared distance
    labels = near.argmax(1)
    own = (np.arange(len(units)), labels)
    distances = weights * (np.square(units).sum(1) - near[own])
    signs = np.where(dots[own] < 0, -1.0, 1.0)
    for empty in np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0):
        several = np.bincount(labels)[labels] > 1
        moved = np.where(several, distances, -np.inf).argmax()
        labels[moved], signs[moved] = empty, 1.0
    return Clusters(labels, signs)


def _farthest(units: Array, weights: Array, count: int) -> Array:
    """Return units that are far from each other, up to signs: the longest, then always the farthest, [count, d]."""
    distances = np.square(units).sum(1)
    norms, chosen = distances.copy(), []
    for _ in range(count):
        chosen.append(int((weights * distances).argmax()))
        one = units[chosen[-1]]
        distances = np.minimum(distances, norms + norms[chosen[-1]] - 2 * np.abs(units @ one))
        distances[chosen] = -np.inf
    return units[chosen]


def _units(product: Product) -> Array:
    """Return the units of a LoRA, [r, d_in + d_out]."""
    a, b = product
    return np.concatenate([a, b.T], axis=1)
