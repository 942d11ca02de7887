"""Random numbers for DP-SGD's sampling and noise: from the client's operating system, never from the run's seed.

Who can predict which rows were sampled, or the noise, can take the noise off again: there is no privacy then. So the
server, which knows the run's seed, must have no part in it. Every client draws a fresh key from the operating system
for every round that it trains, also for one that is repeated. On the CPU the numbers come from AES-256 in counter mode
under that key; on a GPU the sampling does, and the noise comes from torch's Philox generator, seeded with 64 bits of
that stream: not a cipher, and every artefact says so.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_TWO_53 = 2.0**-53


@final
class PrivateRandom:
    """One client's random numbers in one round.

    Args:
        key: 32 bytes that nobody else can know; None: from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._cipher = Cipher(algorithms.AES256(key or os.urandom(32)), modes.CTR(bytes(16))).encryptor()
        self._generator: torch.Generator | None = None

    @classmethod
    def reproducible(cls, seed: int, client: int, round_number: int) -> PrivateRandom:
        """Return the numbers that ``privacy.seed`` gives: for experiments, and without any privacy."""
        return cls(hashlib.sha256(f"not private {seed} {client} {round_number}".encode()).digest())

    def words(self, size: int) -> NDArray[np.uint64]:
        """Return ``size`` independent 64-bit words."""
        return np.frombuffer(self._cipher.update(bytes(8 * size)), dtype="<u8").astype(np.uint64)

    def sample(self, rows: NDArray[np.int64], sample_rate: float) -> NDArray[np.int64]:
        """Return each of ``rows`` with probability ``sample_rate``, independently (Poisson sampling)."""
        drawn = (self.words(len(rows)) >> np.uint64(11)).astype(np.float64) * _TWO_53
        return rows[drawn < sample_rate]

    def normal(self, like: Tensor) -> Tensor:
        """Return standard normal numbers with the shape, dtype and device of ``like``."""
        import torch

        if like.device.type == "cpu":
            return torch.from_numpy(self._normal(like.numel())).to(like.dtype).view(like.shape)
        if self._generator is None:
            self._generator = torch.Generator(like.device).manual_seed(int(self.words(1)[0]))
        return torch.empty_like(like).normal_(generator=self._generator)

    def _normal(self, size: int) -> NDArray[np.float64]:
        """Return standard normal numbers by the transform of Box and Muller, in float64."""
        pairs = -(-size // 2)
        bits = self.words(2 * pairs) >> np.uint64(11)
        radius = np.sqrt(-2.0 * np.log((bits[:pairs].astype(np.float64) + 1.0) * _TWO_53))  # of (0, 1]: no log of 0
        angle = (2.0 * np.pi * _TWO_53) * bits[pairs:].astype(np.float64)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]


def describe(seed: int, device: str) -> str:
    """Return where sampling and noise come from, for every artefact.

    Args:
        seed: ``privacy.seed``.
        device: Where clients compute.
    """
    source = f"privacy.seed = {seed}: NOT PRIVATE, for reproducing an experiment" if seed else "the operating system"
    noise = "AES-256-CTR" if device == "cpu" else "Philox (torch, 64-bit seed; not a cipher)"
    return f"sampling AES-256-CTR, noise {noise}, fresh keys a client and round from {source}"
