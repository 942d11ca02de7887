"""What a privacy budget buys, computed before any training: noise by epsilon, accountants, schedules.

Data frames for figures and notebooks. The numbers are those of :mod:`fedlora.privacy` and of ``fedlora plan``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from fedlora.privacy import Accountant, epsilon, least_noise_multiplier
from fedlora.privacy.accounting import Use
from fedlora.privacy.attacks import epsilon_of_mu
from simulations.plan import Plan
from simulations.privacy import PrivacyPlan, fit_noise

CERTIFIED: Sequence[Accountant] = ("pld", "prv", "rdp")


def noise_by_epsilon(
    epsilons: Sequence[float], sample_rates: Sequence[float], *, steps: int, delta: float
) -> pd.DataFrame:
    """Return the least noise multiplier for each epsilon and sample rate, of so many steps in all.

    Columns: ``epsilon``, ``sample_rate``, ``steps``, ``noise_multiplier``.
    """
    return pd.DataFrame(
        {
            "epsilon": target,
            "sample_rate": rate,
            "steps": steps,
            "noise_multiplier": least_noise_multiplier(
                target_epsilon=target, target_delta=delta, sample_rate=rate, steps=steps
            ),
        }
        for target, rate in itertools.product(epsilons, sample_rates)
    )


def accountants(use: Use, *, delta: float, points: int = 12) -> pd.DataFrame:
    """Return epsilon by steps for the same ledger under each accountant, and by Gaussian DP's approximation.

    Columns: ``steps``, ``accountant``, ``epsilon``.

    Args:
        use: All steps.
        delta: The delta that belongs to epsilon.
        points: At how many numbers of steps it is computed.
    """
    steps = sorted({max(1, round(use.steps * (at + 1) / points)) for at in range(points)})
    lines: list[dict[str, Any]] = []
    for count in steps:
        own = use._replace(steps=count)
        found: dict[str, float] = {by: epsilon([own], target_delta=delta, accountant=by) for by in CERTIFIED}
        found["gdp"] = gaussian_dp_epsilon(own, delta)
        lines += [{"steps": count, "accountant": by, "epsilon": value} for by, value in found.items()]
    return pd.DataFrame(lines)


def gaussian_dp_epsilon(use: Use, delta: float) -> float:
    """Return what the central limit of Gaussian DP says (Bu, Dong, Long & Su 2020): less than was spent.

    To be shown beside an accountant, and never to be relied on.
    """
    mu = use.sample_rate * math.sqrt(use.steps * math.expm1(use.noise_multiplier**-2))
    return epsilon_of_mu(mu, delta)


def schedules(
    plan: Plan, *, rounds: Sequence[int], batch_sizes: Sequence[int], clients: Sequence[int] = ()
) -> pd.DataFrame:
    """Return what the budget of a plan buys with other rounds, batches and numbers of clients.

    Columns: ``rounds``, ``batch_size``, ``clients``, ``steps`` of a client, ``noise_multiplier``, and at best, as
    :meth:`simulations.privacy.PrivacyPlan.signal_to_noise` says, ``signal_to_noise`` of a client's steps together and
    ``signal_to_noise_of_mean`` of the mean over the clients, whose noises are independent.

    Raises:
        ConfigError: No noise keeps to the budget.
        ValueError: The plan has no budget.
    """
    privacy = plan.privacy
    if privacy is None or not plan.config.privacy.epsilon:
        raise ValueError("the plan has no budget: set privacy.mode = 'dp' and privacy.epsilon.")
    lines = []
    for count, batch in itertools.product(rounds, batch_sizes):
        if batch > plan.config.privacy.client_size:
            continue
        own: PrivacyPlan = replace(
            privacy,
            config=fit_noise(replace(plan.config, rounds=count, train=replace(plan.config.train, batch_size=batch))),
        )
        signal = own.signal_to_noise(own.steps)
        lines += [
            {
                "rounds": count,
                "batch_size": batch,
                "clients": many,
                "steps": own.steps,
                "noise_multiplier": own.mechanism.noise_multiplier,
                "signal_to_noise": signal,
                "signal_to_noise_of_mean": signal * math.sqrt(many),
            }
            for many in (clients or [plan.sampled])
        ]
    return pd.DataFrame(lines)
