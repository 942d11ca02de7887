"""Strategies: one file each, one registry."""

from __future__ import annotations

from fedlora import plugins
from fedlora.registry import Registry
from strategies.base import BudgetSpentError, FederationError, RoleStrategy, Setting, sampled
from strategies.fedavg import FedAvg
from strategies.fedsa_lora import FedSALora
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALora
from strategies.local import Local
from strategies.mos import MoS
from strategies.mos_private import MoSPrivate
from strategies.rolora import RoLoRA
from strategies.s2_cyclic import S2Cyclic
from strategies.s2_frozen import S2Frozen
from strategies.s2_lora import S2
from strategies.s2_private import S2Private

STRATEGIES: Registry[type[RoleStrategy]] = plugins.STRATEGIES
for _strategy in (
    FedAvg,
    FFALora,
    RoLoRA,
    FedSVD,
    FedSALora,
    Local,
    MoS,
    MoSPrivate,
    S2,
    S2Frozen,
    S2Cyclic,
    S2Private,
):
    STRATEGIES.register(_strategy.name)(_strategy)

__all__ = [
    "S2",
    "STRATEGIES",
    "BudgetSpentError",
    "FFALora",
    "FedAvg",
    "FedSALora",
    "FedSVD",
    "FederationError",
    "Local",
    "MoS",
    "MoSPrivate",
    "RoLoRA",
    "RoleStrategy",
    "S2Cyclic",
    "S2Frozen",
    "S2Private",
    "Setting",
    "sampled",
]
