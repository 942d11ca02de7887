"""Attacks on what DP-SGD releases, and the lower bounds of epsilon that follow from how well they do."""

from fedlora.privacy.attacks.bounds import epsilon_of_mu, mu_from_scores, one_run_epsilon
from fedlora.privacy.attacks.canaries import shares_in_sum

__all__ = ["epsilon_of_mu", "mu_from_scores", "one_run_epsilon", "shares_in_sum"]
