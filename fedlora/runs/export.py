"""Export to PEFT: an adapter folder that ``peft.PeftModel.from_pretrained`` loads on the untouched base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType, TaskType
from safetensors.torch import save_file

from fedlora.config import Config
from fedlora.engine import Engine
from fedlora.engine.stack import common_shapes
from fedlora.lora_files import PREFIX, WEIGHTS, rank_settings
from fedlora.methods import Dense, Factor, LowRank, PeftAdapter, Scale, WeightDecomposed, as_low_rank
from fedlora.methods.residual import compress
from fedlora.models import head_modules, model_path
from fedlora.runs.ranks import FILE, strengths
from fedlora.shapes import pad


def adapter_files(engine: Engine, tensors: Mapping[str, NDArray[np.floating]], config: Config) -> dict[str, bytes]:
    """Return a PEFT adapter's files by name: configuration, weights, tokenizer, and the ranks of its layers.

    A method that PEFT has a type of its own for is of that type, any other a LoRA. The scale is folded into the
    weights, so PEFT's own scale is 1. PEFT saves and loads the head's modules whole, so whatever they hold is among the
    weights, trained or not.

    Args:
        engine: The engine whose method made the tensors.
        tensors: All of the method's tensors, at the method's rank or a smaller one.
        config: The run's configuration.

    Raises:
        ValueError: The method's update is no PEFT adapter.
    """
    shapes = common_shapes(engine.method.specs(), [tensors], {})
    placed = {name: engine.tensor(pad(value, shapes[name])) for name, value in tensors.items()}
    other = engine.method.peft_adapter(placed)
    factors = {name: _one_term(factor, engine) for name, factor in engine.method.factors(placed).items()}
    heads, found = head_modules(engine.base.structure), strengths(factors)
    adapter = other or _lora(engine, factors, found)
    weights = dict(adapter.weights)
    for name, factor in factors.items():
        if isinstance(factor, Dense | Scale):
            weights[f"{PREFIX}{name}.weight"] = factor.weight
            if factor.bias is not None:
                weights[f"{PREFIX}{name}.bias"] = factor.bias
    weights |= {f"{PREFIX}{name}": value for name, value in _untrained(engine, heads).items()}
    targets = adapter.settings["target_modules"]
    settings: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(adapter.kind)](
        task_type=TaskType(engine.task.peft_type),
        base_model_name_or_path=model_path(config.model.name),
        revision=config.model.revision or None,
        modules_to_save=sorted(heads) or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in engine.base.structure.adapted if layer.name in targets),
        inference_mode=True,
        **adapter.settings,
    )
    with TemporaryDirectory() as folder:
        settings.save_pretrained(folder)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in weights.items()},
            f"{folder}/{WEIGHTS}",
        )
        if engine.base.tokenizer is not None:
            engine.base.tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    return {**files, FILE: json.dumps(found).encode()}


def _lora(engine: Engine, factors: Mapping[str, Factor], found: Mapping[str, list[float]]) -> PeftAdapter:
    """Return factors as a LoRA, or as a DoRA where layers are weight-decomposed.

    The scale is folded into B, with alpha equal to the rank. Ranks that add nothing are left out, and so are layers
    without any other, unless they are weight-decomposed. A layer's residual is a part of its A and B, whose rank is
    then that of their sum; the strengths of its ranks are singular values.

    Args:
        engine: The engine.
        factors: The layers' factors.
        found: The strengths of their ranks.
    """
    used = {name: [rank for rank, strength in enumerate(values) if strength] for name, values in found.items()}
    decomposed = {name: factor for name, factor in factors.items() if isinstance(factor, WeightDecomposed)}
    if not any(used.values()):
        used[next(iter(used))] = [0]  # PEFT has no empty adapter: one rank of zeros stands for it
    used |= {name: used[name] or [0] for name in decomposed}
    weights: dict[str, torch.Tensor] = {}
    ranks = {name: len(kept) for name, kept in used.items() if kept}
    for name in ranks:
        low = as_low_rank(factors[name])
        assert low is not None, "a layer with ranks"
        weights[f"{PREFIX}{name}.lora_A.weight"] = low.A[used[name]]
        weights[f"{PREFIX}{name}.lora_B.weight"] = low.scaled_b()[:, used[name]]
    for name, one in decomposed.items():
        weights[f"{PREFIX}{name}.lora_magnitude_vector"] = engine.grouped.magnitude(name, one)
    return PeftAdapter("LORA", {**rank_settings(ranks), "use_dora": bool(decomposed)}, weights)


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
