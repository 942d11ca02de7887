"""Strategies: one file each, one registry."""

from __future__ import annotations

from fedlora.registry import Registry
from strategies.base import FederationError, RoleStrategy, Setting
from strategies.fedavg import FedAvg
from strategies.fedsa_lora import FedSALora
from strategies.ffa_lora import FFALora
from strategies.local import Local

STRATEGIES: Registry[type[RoleStrategy]] = Registry("strategy.name")
for _strategy in (FedAvg, FFALora, FedSALora, Local):
    STRATEGIES.register(_strategy.name)(_strategy)

__all__ = ["STRATEGIES", "FFALora", "FedAvg", "FedSALora", "FederationError", "Local", "RoleStrategy", "Setting"]
