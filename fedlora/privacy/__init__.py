"""Differential privacy: accounting, the ledger, random numbers, and the DP-SGD step."""

from fedlora.privacy.accounting import Accountant, Use, default_delta, epsilon, least_noise_multiplier, merged
from fedlora.privacy.ledger import Entry, Ledger, LedgerError
from fedlora.privacy.mechanism import Mechanism, certifier, conditions, statement
from fedlora.privacy.randomness import PrivateRandom

__all__ = [
    "Accountant",
    "Entry",
    "Ledger",
    "LedgerError",
    "Mechanism",
    "PrivateRandom",
    "Use",
    "certifier",
    "conditions",
    "default_delta",
    "epsilon",
    "least_noise_multiplier",
    "merged",
    "statement",
]
