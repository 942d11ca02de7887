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

    def permutation(self, *key: Key, size: int) -> NDArray[np.int64]:
        """Return a random order of ``range(size)``."""
        return np.argsort(self.bits(*key, size=size), kind="stable").astype(np.int64)
