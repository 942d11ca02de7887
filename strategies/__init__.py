"""Strategies: one file each, one registry."""

from __future__ import annotations

from fedlora.registry import Registry
from strategies.base import FederationError, RoleStrategy, Setting
from strategies.fedavg import FedAvg
from strategies.ffa_lora import FFALora

STRATEGIES: Registry[type[RoleStrategy]] = Registry("strategy.name")
for _strategy in (FedAvg, FFALora):
    STRATEGIES.register(_strategy.name)(_strategy)

__all__ = ["STRATEGIES", "FFALora", "FedAvg", "FederationError", "RoleStrategy", "Setting"]
