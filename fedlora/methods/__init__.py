"""Low-rank methods: one file each, one registry."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import Config
from fedlora.methods.base import Fault, Layer, LowRankMethod, Method, PeftAdapter, ScaledPair, TensorSpec
from fedlora.methods.block_lora import BlockLora, BlockLoraOptions
from fedlora.methods.checks import check_init, check_products
from fedlora.methods.dora import Dora
from fedlora.methods.dual_lora import DualLora, DualLoraOptions
from fedlora.methods.factors import Dense, Experts, Factor, LowRank, Scale, WeightDecomposed, as_low_rank
from fedlora.methods.flylora import FlyLora, FlyLoraOptions
from fedlora.methods.head import Head
from fedlora.methods.lora import Lora
from fedlora.methods.lora_experts import LoraExperts, LoraExpertsOptions
from fedlora.methods.lora_sb import LoraSB
from fedlora.methods.mora import Mora
from fedlora.methods.mos import Mos, MosOptions
from fedlora.methods.nola import Nola, NolaOptions
from fedlora.methods.randlora import RandLora
from fedlora.methods.ravan import Ravan, RavanOptions
from fedlora.methods.s2_lora import S2Lora, S2Options
from fedlora.methods.scaled_bases import ScaledBases
from fedlora.methods.sora import Sora, SoraOptions
from fedlora.methods.square import Square
from fedlora.methods.tensors import (
    check_start,
    count_parameters,
    initial_tensors,
    payload_bytes,
    proximal_step,
    soft_threshold,
    tensors_digest,
    zero_kinds,
)
from fedlora.methods.top_ranks import TopRanks
from fedlora.methods.uni_lora import UniLora, UniLoraOptions
from fedlora.methods.vera import Vera, VeraOptions
from fedlora.registry import Registry

METHODS: Registry[type[LowRankMethod]] = Registry("method.name")
METHODS.register("lora")(Lora)
METHODS.register("mos", MosOptions)(Mos)
METHODS.register("s2-lora", S2Options)(S2Lora)
METHODS.register("lora-sb")(LoraSB)
METHODS.register("ravan", RavanOptions)(Ravan)
METHODS.register("dual-lora", DualLoraOptions)(DualLora)
METHODS.register("vera", VeraOptions)(Vera)
METHODS.register("dora")(Dora)
METHODS.register("nola", NolaOptions)(Nola)
METHODS.register("randlora")(RandLora)
METHODS.register("lora-experts", LoraExpertsOptions)(LoraExperts)
METHODS.register("uni-lora", UniLoraOptions)(UniLora)
METHODS.register("block-lora", BlockLoraOptions)(BlockLora)
METHODS.register("flylora", FlyLoraOptions)(FlyLora)
METHODS.register("mora")(Mora)
METHODS.register("sora", SoraOptions)(Sora)


def build_method(config: Config, adapted: Sequence[Layer], head: Sequence[Layer]) -> Method:
    """Return the method ``method.name`` on the layers ``adapted``, joined to a head on the layers ``head``.

    Raises:
        ValueError: The configuration does not fit the layers.
    """
    kind = METHODS[config.method.name]
    most = max((min(layer.d_in, layer.d_out) for layer in adapted), default=config.method.rank)
    if kind.rank_is_bounded and config.method.rank > most:
        raise ValueError(
            f"method.rank = {config.method.rank}: the adapted layers have {most} features at most, and no update of "
            "them has a higher rank; lower it."
        )
    check_init(config, kind.inits)
    method = Head(kind.build(adapted, config), head)
    check_start(method.specs())
    return method


__all__ = [
    "METHODS",
    "BlockLora",
    "BlockLoraOptions",
    "Dense",
    "Dora",
    "DualLora",
    "DualLoraOptions",
    "Experts",
    "Factor",
    "Fault",
    "FlyLora",
    "FlyLoraOptions",
    "Head",
    "Layer",
    "Lora",
    "LoraExperts",
    "LoraExpertsOptions",
    "LoraSB",
    "LowRank",
    "LowRankMethod",
    "Method",
    "Mora",
    "Mos",
    "MosOptions",
    "Nola",
    "NolaOptions",
    "PeftAdapter",
    "RandLora",
    "Ravan",
    "RavanOptions",
    "S2Lora",
    "S2Options",
    "Scale",
    "ScaledBases",
    "ScaledPair",
    "Sora",
    "SoraOptions",
    "Square",
    "TensorSpec",
    "TopRanks",
    "UniLora",
    "UniLoraOptions",
    "Vera",
    "VeraOptions",
    "WeightDecomposed",
    "as_low_rank",
    "build_method",
    "check_products",
    "check_start",
    "count_parameters",
    "initial_tensors",
    "payload_bytes",
    "proximal_step",
    "soft_threshold",
    "tensors_digest",
    "zero_kinds",
]
