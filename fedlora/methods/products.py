"""Products B A of a layer's factors: which tensors they are of, and their singular values without the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import TensorSpec

Array = NDArray[np.floating]

Product = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The factors A [R, d_in] and B [d_out, R] of a product B A."""


class Pair(NamedTuple):
    """The tensors whose product is a layer's update."""

    layer: str
    a: str  # the name of A [r, d_in]
    b: str  # the name of B [d_out, r]


def pairs(specs: Mapping[str, TensorSpec]) -> list[Pair]:
    """Return the A and B of each layer, in the method's order."""
    by_layer: dict[str, dict[str, str]] = {}
    for name, spec in specs.items():
        if spec.kind in ("A", "B"):
            by_layer.setdefault(name.rpartition(".")[0], {})[spec.kind] = name
    return [Pair(layer, names["A"], names["B"]) for layer, names in by_layer.items()]


def stack(products: Sequence[Product], shares: Sequence[float]) -> Product:
    """Return factors of a weighted sum of products, stacked in their order: A has the weights."""
    a = [share * one for share, (one, _) in zip(shares, products, strict=True)]
    return np.concatenate(a, axis=0), np.concatenate([b for _, b in products], axis=1)


class Decomposed(NamedTuple):
    """The singular value decomposition of a product, ``B A = (u * s) @ vt``."""

    u: NDArray[np.float64]  # [d_out, n], orthonormal columns
    s: NDArray[np.float64]  # [n], falling
    vt: NDArray[np.float64]  # [n, d_in], orthonormal rows, the largest entry of each positive


def decompose(a: Array, b: Array) -> Decomposed:
    """Return the singular value decomposition of b a, by the core of a QR of each factor: never d_out x d_in numbers.

    With n = min(R, d_in, d_out) values. Each pair of vectors has its sign fixed, so that no two machines differ in it.

    Args:
        a: [R, d_in].
        b: [d_out, R].
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))  # [d_out, min(d_out, R)], [.., R]
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)  # [d_in, min(d_in, R)], [.., R]
    u, s, vt = np.linalg.svd(r_b @ r_a.T, full_matrices=False)  # b a = Q_b (R_b R_a^T) Q_a^T
    return oriented(q_b @ u, s, vt @ q_a.T)


def oriented(u: NDArray[np.float64], s: NDArray[np.float64], vt: NDArray[np.float64]) -> Decomposed:
    """Return singular triples with the signs that :class:`Decomposed` has."""
    largest = np.take_along_axis(vt, np.abs(vt).argmax(1)[:, None], 1)
    sign = np.where(largest < 0, -1.0, 1.0)  # [n, 1]
    return Decomposed(u * sign.T, s, sign * vt)


def product_norm(a: Array, b: Array) -> float:
    """Return the Frobenius norm of b a, that of the core of a QR of each factor: never d_out x d_in numbers.

    Args:
        a: [R, d_in].
        b: [d_out, R].
    """
    r_b = np.linalg.qr(b.astype(np.float64)).R  # [min(d_out, R), R]
    r_a = np.linalg.qr(a.astype(np.float64).T).R
    return float(np.linalg.norm(r_b @ r_a.T))
