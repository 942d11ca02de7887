"""Export to PEFT: an adapter folder that ``peft.PeftModel.from_pretrained`` loads on the untouched base."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftConfig, RandLoraConfig, TaskType
from safetensors.torch import save_file

from fedlora.config import Config
from fedlora.engine import Engine
from fedlora.engine.stack import common_shapes
from fedlora.methods import METHODS, Dense, Factor, LowRank, Scale, ScaledBases
from fedlora.methods.residual import compress
from fedlora.models import head_modules, model_path
from fedlora.runs.ranks import FILE, strengths
from fedlora.shapes import pad

_PREFIX = "base_model.model."


def adapter_files(engine: Engine, tensors: Mapping[str, NDArray[np.floating]], config: Config) -> dict[str, bytes]:
    """Return a PEFT adapter's files by name: configuration, weights, tokenizer, and the ranks of its layers.

    It is a LoRA wherever the method's updates are of low rank, whatever the method, else the kind that holds them
    (RandLoRA). The scale is folded into the weights, with alpha equal to the rank, so PEFT's own scale is 1. PEFT saves
    and loads the head's modules whole, so whatever they hold is among the weights, trained or not.

    Args:
        engine: The engine whose method made the tensors.
        tensors: All of the method's tensors, at the method's rank or a smaller one.
        config: The run's configuration.

    Raises:
        ValueError: The method's update is no LoRA.
    """
    no_adapter = METHODS[config.method.name].no_adapter
    if no_adapter:
        raise ValueError(f"method.name = {config.method.name!r}: cannot be exported to PEFT; {no_adapter}.")
    shapes = common_shapes(engine.method.specs(), [tensors], {})
    made = engine.method.factors({name: engine.tensor(pad(value, shapes[name])) for name, value in tensors.items()})
    factors = {name: _one_term(factor, engine) for name, factor in made.items()}
    found = strengths(factors)
    sums = {name: factor for name, factor in factors.items() if isinstance(factor, ScaledBases)}
    weights, kind, options = _randlora(engine, sums) if sums else _lora(factors, found)
    heads = head_modules(engine.base.structure)
    for name, factor in factors.items():
        if isinstance(factor, Dense | Scale):
            weights[f"{_PREFIX}{name}.weight"] = factor.weight
            if factor.bias is not None:
                weights[f"{_PREFIX}{name}.bias"] = factor.bias
    weights |= {f"{_PREFIX}{name}": value for name, value in _untrained(engine, heads).items()}
    targets = sorted(options["target_modules"])
    layers = {layer.name: layer for layer in engine.base.structure.adapted}
    adapter = kind(
        **options | {"target_modules": targets},
        task_type=TaskType(engine.task.peft_type),
        base_model_name_or_path=model_path(config.model.name),
        revision=config.model.revision or None,
        modules_to_save=sorted(heads) or None,
        fan_in_fan_out=any(layers[name].fan_in_fan_out for name in targets),
        inference_mode=True,
    )
    with TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()},
            f"{folder}/adapter_model.safetensors",
        )
        if engine.base.tokenizer is not None:
            engine.base.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    return {**files, FILE: json.dumps(found).encode()}


_Adapter = tuple[dict[str, torch.Tensor], type[PeftConfig], dict[str, Any]]
"""Weights of the adapted layers by PEFT's names, the kind of adapter, and what its configuration says of them."""


def _lora(factors: Mapping[str, Factor], found: Mapping[str, Sequence[float]]) -> _Adapter:
    """Return a LoRA: ranks that add nothing are left out, and so are layers without any other.

    A layer's residual becomes a part of its A and B, whose rank is then that of their sum; the strengths of its ranks
    are singular values.
    """
    used = {name: [rank for rank, strength in enumerate(values) if strength] for name, values in found.items()}
    if not any(used.values()):
        used[next(iter(used))] = [0]  # PEFT has no empty adapter: one rank of zeros stands for it
    weights: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name, factor in factors.items():
        if isinstance(factor, LowRank) and used[name]:
            weights[f"{_PREFIX}{name}.lora_A.weight"] = factor.A[used[name]]
            weights[f"{_PREFIX}{name}.lora_B.weight"] = factor.scaled_b()[:, used[name]]
            ranks[name] = len(used[name])
    common = max(ranks.values(), key=list(ranks.values()).count)
    pattern = {rf"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common}
    options = {"rank_pattern": pattern, "alpha_pattern": dict(pattern)}
    return weights, LoraConfig, {"r": common, "lora_alpha": common, "target_modules": list(ranks), **options}


def _randlora(engine: Engine, sums: Mapping[str, ScaledBases]) -> _Adapter:
    """Return a RandLoRA. PEFT expects the bases under the name of each layer, and warns where one lacks them."""
    weights: dict[str, torch.Tensor] = {}
    bases = {side: torch.from_numpy(value).bfloat16() for side, value in engine.method.constants().items()}
    for name in ("", *(f"model.{name}." for name in sums)):
        weights |= {f"base_model.{name}randlora_{side}": value.clone() for side, value in bases.items()}
    for name, one in sums.items():
        weights[f"{_PREFIX}{name}.randlora_lambda"] = one.scale * one.rank_scales.mT
        weights[f"{_PREFIX}{name}.randlora_gamma"] = one.feature_scales
    rank = len(next(iter(sums.values())).A)
    return weights, RandLoraConfig, {"r": rank, "randlora_alpha": rank, "target_modules": list(sums)}


def _untrained(engine: Engine, heads: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return what the head's modules hold beside the layers that factors stand for, by name."""
    owned = tuple(f"{layer.name}." for layer in engine.base.structure.head)
    state = engine.base.model.state_dict()
    return {name: state[name] for name in state if name.split(".", 1)[0] in heads and not name.startswith(owned)}


def _one_term(factor: Factor, engine: Engine) -> Factor:
    """Return a factor with its residual, if any, in its A and B, compressed without loss."""
    if not isinstance(factor, LowRank) or factor.residual is None:
        return factor
    rest = factor.residual
    a, b = torch.cat([factor.A, rest.A]), torch.cat([factor.scaled_b(), rest.scaled_b()], 1)
    whole_a, whole_b = compress(a.cpu().numpy(), b.cpu().numpy())
    return LowRank(engine.tensor(whole_a), engine.tensor(whole_b), 1.0)
