"""Strategies: one pure file each, one registry."""

from __future__ import annotations

from fedlora.plugins import STRATEGIES
from strategies.dylora import DyLoRA, DyLoraOptions
from strategies.fed_plora import FedPLoRA
from strategies.fed_sb import FedSB
from strategies.fedavg import FedAvg
from strategies.feddpa import FedDPA, FedDPAOptions
from strategies.fedex_lora import FedExLoRA, FedExOptions
from strategies.fedlease import FedLEASE
from strategies.fedrot_lora import FedRotLoRA, FedRotOptions
from strategies.fedsa_lora import FedSALora
from strategies.fedsvd import FedSVD
from strategies.ffa_lora import FFALora
from strategies.flexlora import FlexLoRA, FlexLoraOptions
from strategies.flora import FLoRA
from strategies.florist import FLoRIST, FloristOptions
from strategies.hetlora import HetLoRA, HetLoraOptions
from strategies.lisa import Lisa, LisaOptions
from strategies.local import Local
from strategies.lora_fair import LoRAFair, LoraFairOptions
from strategies.lora_lego import LoRALego
from strategies.mos import MoS
from strategies.mos_personal import MoSPersonal
from strategies.ravan import Ravan
from strategies.rolora import RoLoRA
from strategies.s2_cyclic import S2Cyclic
from strategies.s2_frozen import S2Frozen
from strategies.s2_lora import S2
from strategies.s2_personal import S2Personal
from strategies.zero_padding import ZeroPadding

for _strategy, _options in (
    (FedAvg, None),
    (FFALora, None),
    (RoLoRA, None),
    (Lisa, LisaOptions),
    (FedSVD, None),
    (FedSALora, None),
    (ZeroPadding, None),
    (HetLoRA, HetLoraOptions),
    (FedPLoRA, None),
    (DyLoRA, DyLoraOptions),
    (FlexLoRA, FlexLoraOptions),
    (FLoRA, None),
    (FLoRIST, FloristOptions),
    (FedExLoRA, FedExOptions),
    (LoRAFair, LoraFairOptions),
    (FedRotLoRA, FedRotOptions),
    (LoRALego, None),
    (Local, None),
    (MoS, None),
    (MoSPersonal, None),
    (S2, None),
    (S2Frozen, None),
    (S2Cyclic, None),
    (S2Personal, None),
    (FedSB, None),
    (Ravan, None),
    (FedDPA, FedDPAOptions),
    (FedLEASE, None),
):
    STRATEGIES.register(_strategy.name, _options)(_strategy)
STRATEGIES.alias("mos-private", MoSPersonal.name)
STRATEGIES.alias("s2-private", S2Personal.name)

__all__ = [
    "S2",
    "STRATEGIES",
    "DyLoRA",
    "DyLoraOptions",
    "FFALora",
    "FLoRA",
    "FLoRIST",
    "FedAvg",
    "FedDPA",
    "FedDPAOptions",
    "FedExLoRA",
    "FedExOptions",
    "FedLEASE",
    "FedPLoRA",
    "FedRotLoRA",
    "FedRotOptions",
    "FedSALora",
    "FedSB",
    "FedSVD",
    "FlexLoRA",
    "FlexLoraOptions",
    "FloristOptions",
    "HetLoRA",
    "HetLoraOptions",
    "Lisa",
    "LisaOptions",
    "LoRAFair",
    "LoRALego",
    "Local",
    "LoraFairOptions",
    "MoS",
    "MoSPersonal",
    "Ravan",
    "RoLoRA",
    "S2Cyclic",
    "S2Frozen",
    "S2Personal",
    "ZeroPadding",
]
