"""The check of an exported adapter: loaded by plain PEFT on the untouched base, it must give what the engine gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from fedlora.engine import Engine, evaluate
from fedlora.engine.rounding import ROUNDINGS, rounded_blocks
from fedlora.lora_files import PREFIX
from fedlora.methods import WeightDecomposed, as_low_rank
from fedlora.methods.products import product_norm
from fedlora.models.quiet import quiet

_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3}  # of losses; what is wrong is off by far more
_SAME = 1e-3  # of an update's norm
_FLOAT32 = 2.0**-20  # of its factors' norms: rounding of what they are stored in, with room for sums
_DRAWS = 8
_COARSE = 0.1  # of 16 bits and fewer, where PEFT's factors are in float32 and added in another order: at least


class ExportError(ValueError):
    """An adapter does not give what the engine gives."""


def check_adapter(engine: Engine, tensors: Mapping[str, NDArray[np.floating]], files: Mapping[str, bytes]) -> float:
    """Load an adapter in plain PEFT on the untouched base, and compare the losses of rows that are nobody's.

    The base is the engine's own, with its layers as they were before they were wrapped, so it is in memory once.

    Args:
        engine: The engine.
        tensors: All of the method's tensors.
        files: The adapter's files.

    Returns:
        The largest difference between losses.

    Raises:
        ExportError: It is more than rounding.
    """
    rows = engine.task.made_up_rows()
    ours = evaluate(engine, dict(tensors), rows, range(len(rows)))["loss"]
    with TemporaryDirectory() as folder, engine.grouped.untouched() as base, torch.no_grad(), quiet():
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        try:
            adapted = PeftModel.from_pretrained(base, folder).eval()
        except (ValueError, RuntimeError, KeyError) as error:
            raise ExportError(f"the exported adapter cannot be loaded in PEFT: {error}") from error
        theirs = np.array([_loss(engine, adapted, rows, row) for row in range(len(rows))])
        off = np.abs(ours - theirs)
        worst = int(off.argmax())
        tolerance = _TOLERANCES.get(next(engine.base.model.parameters()).dtype)
        allowed = (_COARSE if tolerance is None else tolerance) * max(1.0, abs(float(ours[worst])))
        # Large factors make much of what 16 bits round away: then it is the numbers themselves that must agree.
        coarse = tolerance is None and not off[worst] <= allowed and same_numbers(engine, tensors, adapted)
    if coarse:
        allowed = max(allowed, ROUNDINGS * _rounding(engine, tensors, rows, ours))
    if not off[worst] <= allowed:
        raise ExportError(
            f"the exported adapter does not give in PEFT what it gives here: the loss of a made-up row is "
            f"{theirs[worst]:.6g} there and {ours[worst]:.6g} here. The adapter would be unusable; this is a fault of "
            "fedlora with this model's family, please report it."
        )
    return float(off[worst])


def same_numbers(engine: Engine, tensors: Mapping[str, NDArray[np.floating]], adapted: nn.Module) -> bool:
    """Return whether what adapts each layer is the same in PEFT, as numbers: losses in 16 bits may be too coarse."""
    exact = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in tensors.items()}
    for name, factor in engine.method.factors(exact).items():
        whole = as_low_rank(factor)
        if whole is None:
            continue
        own = [whole] if whole.residual is None else [whole, whole.residual]
        a, b = torch.cat([one.A for one in own], -2).numpy(), torch.cat([one.scaled_b() for one in own], -1).numpy()
        layer: Any = adapted.get_submodule(f"{PREFIX}{name}")
        if not same_update(layer, a, b):
            return False
        if isinstance(factor, WeightDecomposed):
            m = _double(engine.grouped.magnitude(name, factor))
            off = float(np.linalg.norm(m - _double(layer.lora_magnitude_vector["default"].weight)))
            if not off <= _SAME * np.linalg.norm(m):
                return False
    return True


def same_update(layer: Any, a: NDArray[np.float64], b: NDArray[np.float64]) -> bool:
    """Return whether what a layer of PEFT adds is B A but for rounding, given A [r, d_in] and B [d_out, r]."""
    down, up = _peft_factors(layer)
    off = product_norm(np.concatenate([a, down]), np.concatenate([b, -up], 1))
    rounding = _FLOAT32 * float(np.linalg.norm(a) * np.linalg.norm(b))  # of what may cancel, as in a merge
    return off <= _SAME * product_norm(a, b) + rounding


def _peft_factors(layer: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return factors [r, d_in] and [d_out, r] of a layer's update in PEFT, with all scales in the latter."""
    if isinstance(layer, VeraLayer):
        a, b, d, scale = (
            _double(one["default"]) for one in (layer.vera_A, layer.vera_B, layer.vera_lambda_d, layer.vera_lambda_b)
        )
        return a[:, : layer.in_features], scale[:, None] * b[: layer.out_features] * d
    if isinstance(layer, RandLoraLayer):
        down, up = map(_double, layer.get_scaled_bases("default"))
    else:
        down, up = (_double(one["default"].weight) for one in (layer.lora_A, layer.lora_B))
    return down, layer.scaling["default"] * up


def _double(value: torch.Tensor) -> NDArray[np.float64]:
    numbers: NDArray[np.float64] = value.detach().double().cpu().numpy()
    return numbers


def _rounding(
    engine: Engine, tensors: Mapping[str, NDArray[np.floating]], rows: Any, ours: NDArray[np.float64]
) -> float:
    """Return how far losses move at most where each factor and each block's output is off by one rounding of 16 bits.

    In some draws: a single one may move them little by chance, and one loss in thousands would seem wrong.
    """
    bits, most = torch.finfo(engine.compute).eps / 2, 0.0
    for seed in range(_DRAWS):
        signs = np.random.default_rng(seed)
        off = {name: value * (1 + bits * signs.choice((-1, 1), value.shape)) for name, value in tensors.items()}
        with rounded_blocks(engine, seed):
            moved = evaluate(engine, off, rows, range(len(rows)))["loss"]
        most = max(most, float(np.abs(moved - ours).max()))
    return most


def _loss(engine: Engine, model: nn.Module, rows: Any, row: int) -> float:
    batch = engine.task.collate(rows, [row], engine.device)
    return float(engine.task.row_metrics(model, batch)["loss"][0])
