"""Attacks on what training releases, and the lower bounds of epsilon that follow from how well they do."""

from fedlora.privacy.attacks.bounds import epsilon_of_mu, mu_from_scores, one_run_epsilon
from fedlora.privacy.attacks.canaries import shares_in_sum
from fedlora.privacy.attacks.membership import (
    LEAST_MODELS,
    area_under_curve,
    found_at,
    found_at_most,
    interval,
    likelihood_ratios,
    logit,
)

__all__ = [
    "LEAST_MODELS",
    "area_under_curve",
    "epsilon_of_mu",
    "found_at",
    "found_at_most",
    "interval",
    "likelihood_ratios",
    "logit",
    "mu_from_scores",
    "one_run_epsilon",
    "shares_in_sum",
]
