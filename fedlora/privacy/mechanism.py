"""The Poisson-subsampled Gaussian mechanism of a run: its parameters, and the guarantee in words.

The trained tensors of a client, personal ones and head included, are released after steps of DP-SGD (Abadi et al.
2016): sum the clipped gradients of the sampled rows, add noise, divide by the expected batch size. All numbers in it
are public: they come from the configuration and the declared size of a client, never from the rows that a client has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.privacy.accounting import Accountant, Use
from fedlora.privacy.randomness import PrivateRandom

NEIGHBOURS = "add or remove one record"
SAMPLING = "Poisson: each record independently, in every step"
SEEDED = "NOT PRIVATE: privacy.seed makes the noise known."
ADVERSARIES = {"local": "everybody but the client itself: the server, other clients, and who sees the result"}


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-subsampled Gaussian mechanism, as each client applies it in a round.

    Attributes:
        noise_multiplier: Standard deviation of the noise in units of ``max_grad_norm``.
        max_grad_norm: L2 norm that a row's gradient, all trained tensors together, is clipped to.
        sample_rate: Probability with which a row is in a step's batch.
        expected_batch_size: What the noisy sum is divided by, whatever number of rows was sampled.
        steps: Steps a round.
    """

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    expected_batch_size: int
    steps: int

    @classmethod
    def of(cls, config: Config) -> Self:
        """Return the mechanism of a configuration whose ``privacy`` keys are all given."""
        privacy, train = config.privacy, config.train
        assert privacy.client_size >= train.batch_size, "resolved and checked"
        return cls(
            noise_multiplier=privacy.noise_multiplier,
            max_grad_norm=privacy.max_grad_norm,
            sample_rate=train.batch_size / privacy.client_size,
            expected_batch_size=train.batch_size,
            steps=train.local_steps or train.local_epochs * -(-privacy.client_size // train.batch_size),
        )

    def batches(self, random: PrivateRandom, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the rows of each step of a round, drawn afresh for every step; some may be empty."""
        return [random.sample(rows, self.sample_rate) for _ in range(self.steps)]

    def use(self, rounds: int = 1) -> Use:
        """Return what so many rounds use a client's rows for."""
        return Use(self.noise_multiplier, self.sample_rate, rounds * self.steps)


def certifier(config: Config) -> Accountant:
    """Return the accountant whose epsilon counts."""
    return "prv" if config.privacy.accountant == "prv" else "pld"


def conditions(config: Config, accountants: str = "") -> str:
    """Return the conditions of an epsilon: unit, neighbours, adversary, sampling, accountant.

    Args:
        config: The configuration.
        accountants: Others than the configuration's.
    """
    privacy = config.privacy
    by = f"accountants: {accountants}" if accountants else f"accountant: {privacy.accountant}"
    seeded = f" {SEEDED}" if privacy.seed else ""
    return (
        f"composed over all rounds; unit: {privacy.unit}; neighbours: {NEIGHBOURS}; adversary: "
        f"{ADVERSARIES[privacy.trust]}; sampling: {SAMPLING}; {by}.{seeded}"
    )


def statement(config: Config, epsilon: float) -> str:
    """Return an epsilon with its delta, its budget and its conditions."""
    privacy = config.privacy
    budget = f" of a budget of {privacy.epsilon:g}" if privacy.epsilon else ", without a budget"
    return f"epsilon {epsilon:.4g} at delta {privacy.delta:g}{budget}, {conditions(config)}"
