"""Why a federation ends before its last round."""

from __future__ import annotations


class FederationError(RuntimeError):
    """Too many clients failed for the round to mean anything."""


class BudgetSpentError(FederationError):
    """Too few clients have privacy budget left for another round."""
