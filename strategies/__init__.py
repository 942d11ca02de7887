"""Strategies: one pure file each, one registry."""

from __future__ import annotations

from fedlora.plugins import STRATEGIES
from strategies.fedavg import FedAvg
from strategies.fedsa_lora import FedSALora
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALora
from strategies.flora import FLoRA
from strategies.local import Local
from strategies.mos import MoS
from strategies.mos_personal import MoSPersonal
from strategies.rolora import RoLoRA
from strategies.s2_cyclic import S2Cyclic
from strategies.s2_frozen import S2Frozen
from strategies.s2_lora import S2
from strategies.s2_personal import S2Personal
from strategies.zero_padding import ZeroPadding

for _strategy in (
    FedAvg,
    FFALora,
    RoLoRA,
    FedSVD,
    FedSALora,
    ZeroPadding,
    FLoRA,
    Local,
    MoS,
    MoSPersonal,
    S2,
    S2Frozen,
    S2Cyclic,
    S2Personal,
):
    STRATEGIES.register(_strategy.name)(_strategy)
STRATEGIES.alias("mos-private", MoSPersonal.name)
STRATEGIES.alias("s2-private", S2Personal.name)

__all__ = [
    "S2",
    "STRATEGIES",
    "FFALora",
    "FLoRA",
    "FedAvg",
    "FedSALora",
    "FedSVD",
    "Local",
    "MoS",
    "MoSPersonal",
    "RoLoRA",
    "S2Cyclic",
    "S2Frozen",
    "S2Personal",
    "ZeroPadding",
]
