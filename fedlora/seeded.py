"""Seeded, counter-based random numbers: the same on every machine, keyed by purpose.

A draw depends on the run's seed and on a key such as ``("batches", round, client)``, never on what was
drawn before it. The bits come from Philox 4x64 (Salmon et al., SC 2011) and become numbers by exact
IEEE arithmetic alone, so processors, library versions and orders of work cannot change them.

Privacy noise and the sampling of records under DP must not come from here: the server knows the seed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Key = str | int


@dataclass(frozen=True)
class Seeded:
    """Keyed draws of one run.

    Attributes:
        seed: The run's seed.
    """

    seed: int

    def bits(self, *key: Key, size: int) -> NDArray[np.uint64]:
        """Return ``size`` independent 64-bit words for ``key``."""
        text = "\x1f".join(f"{type(part).__name__}:{part}" for part in (self.seed, *key))
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        philox = np.random.Philox(key=np.frombuffer(digest, dtype="<u8"))
        return np.asarray(philox.random_raw(size), dtype=np.uint64).reshape(size)

    def uniform(self, *key: Key, shape: tuple[int, ...], bound: float) -> NDArray[np.float64]:
        """Return float64 numbers of ``shape``, uniform on [-bound, bound)."""
        size = int(np.prod(shape, dtype=np.int64))
        unit = (self.bits(*key, size=size) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return ((2.0 * unit - 1.0) * bound).reshape(shape)

    def orthonormal(self, *key: Key, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return a random matrix with orthonormal rows, or columns where these are fewer: Q of a uniform draw's QR.

        By Gram-Schmidt, with each row taken twice, which leaves no more than rounding. LAPACK's QR would round
        differently on another processor; here no sum depends on its order.
        """
        drawn = self.uniform(*key, shape=shape, bound=1.0)
        rows = drawn if shape[0] <= shape[1] else drawn.T
        basis = np.zeros(rows.shape)
        for number, row in enumerate(rows):
            before, rest = basis[:number], _unit(row)
            for _ in range(2):
                rest = _unit(rest - _sum(_sum(before * rest, axis=1)[:, None] * before, axis=0))
            basis[number] = rest
        return basis if shape[0] <= shape[1] else basis.T.copy()

    def permutation(self, *key: Key, size: int) -> NDArray[np.int64]:
        """Return a random order of ``range(size)``."""
        return np.argsort(self.bits(*key, size=size), kind="stable").astype(np.int64)


def _sum(terms: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    """Return sums of terms whose magnitudes sum to about 1 at most, on a grid where the order does not matter."""
    total: NDArray[np.float64] = np.rint(terms * 2.0**60).astype(np.int64).sum(axis) * 2.0**-60
    return total


def _unit(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a vector at length 1."""
    scaled = row / np.abs(row).max() * 2.0 ** -((len(row).bit_length() + 1) // 2)
    unit: NDArray[np.float64] = scaled / np.sqrt(_sum(scaled * scaled, axis=0))
    return unit
