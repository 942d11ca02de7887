"""The server of a federation under Flower: rounds, replies, traffic; beside the apps all that imports Flower."""

from fedlora.server.cohort import Federation, assigned, sampled
from fedlora.server.core import Core
from fedlora.server.errors import BudgetSpentError, FederationError
from fedlora.server.flower import FlowerStrategy
from fedlora.server.traffic import Payloads, Traffic, lacking

__all__ = [
    "BudgetSpentError",
    "Core",
    "Federation",
    "FederationError",
    "FlowerStrategy",
    "Payloads",
    "Traffic",
    "assigned",
    "lacking",
    "sampled",
]
