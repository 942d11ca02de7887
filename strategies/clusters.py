"""Clusters of clients: agglomerative with average linkage, their number by the silhouette.

Kaufman & Rousseeuw, "Finding Groups in Data", 1990; Rousseeuw, "Silhouettes", 1987. All of it from a matrix of
distances, symmetric and zero between each client and itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Distances = NDArray[np.float64]
Labels = NDArray[np.int64]
"""The cluster of each client, numbered in the order of their first clients."""


def cosine_distances(tensors: Iterable[Sequence[Array]]) -> Distances:
    """Return 1 - cosine similarity of every two clients, a mean over tensors, [clients, clients].

    Args:
        tensors: For each tensor those of all clients. One that is zero is at distance 1 from every other.
    """
    found = []
    for values in tensors:
        rows = np.stack([value.astype(np.float64).ravel() for value in values])
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        unit = rows / np.where(norms > 0, norms, 1.0)
        found.append(1.0 - unit @ unit.T)
    mean = np.mean(found, axis=0)
    whole: Distances = (mean + mean.T) / 2
    np.fill_diagonal(whole, 0.0)
    return whole


def average_linkage(distances: Distances) -> Iterator[Labels]:
    """Yield clusterings, from one client a cluster down to one of all: each merges the two of least mean distance."""
    count = len(distances)
    label, size = np.arange(count), np.ones(count)
    between = distances.copy()
    np.fill_diagonal(between, np.inf)
    yield label.copy()
    for _ in range(count - 1):
        one, other = sorted(divmod(int(between.argmin()), count))
        joined = (size[one] * between[one] + size[other] * between[other]) / (size[one] + size[other])
        joined[[one, other]] = np.inf
        between[one], between[:, one] = joined, joined
        between[other], between[:, other] = np.inf, np.inf
        size[one] += size[other]
        label[label == other] = one
        yield np.unique(label, return_inverse=True)[1]


def silhouette(distances: Distances, labels: Labels) -> float:
    """Return the mean over clients of (b - a) / max(a, b), 0 for one that is alone in its cluster.

    a is a client's mean distance to the others of its cluster, b to those of the nearest other cluster.
    """
    member = labels == np.arange(labels.max() + 1)[:, None]  # [clusters, clients]
    sums, sizes = distances @ member.T, member.sum(1)
    own = (np.arange(len(labels)), labels)
    a = sums[own] / np.maximum(sizes[labels] - 1, 1)
    means = sums / sizes
    means[own] = np.inf
    b = means.min(1)
    largest = np.maximum(a, b)
    scores = np.divide(b - a, largest, out=np.zeros(len(labels)), where=largest > 0)
    return float(np.where(sizes[labels] > 1, scores, 0.0).mean())


def best_clusters(distances: Distances, most: int) -> Labels:
    """Return the clustering of 2 to ``most`` clusters whose silhouette is largest; of equal ones that of the fewest.

    Of a single client it is the only one that there is.
    """
    able = [labels for labels in average_linkage(distances) if 2 <= labels.max() + 1 <= most]
    if not able:
        return np.zeros(len(distances), dtype=np.int64)
    # Rounded, so that clusterings which differ by rounding alone count as equal; the last has the fewest clusters.
    return max(reversed(able), key=lambda labels: round(silhouette(distances, labels), 9))
