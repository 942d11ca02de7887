"""A PEFT folder with a plain LoRA: what it says of itself, its tensors, and the settings that one is written with."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.messages import first_line

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What the names of an adapter's tensors begin with."""

_PLAIN = {  # what a plain LoRA has, by key of adapter_config.json; others change what the factors mean
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "kasa_config": None,
}
_PLAIN_STARTS = (None, True, False, "gaussian")  # others (pissa, olora, loftq ...) may have changed the base's weights


def read_about(path: Path) -> Any:
    """Return what ``adapter_config.json`` of a folder holds.

    Raises:
        ValueError: None can be read there.
    """
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(error) from error


def read_weights(path: Path) -> dict[str, NDArray[np.floating]]:
    """Return a folder's tensors by name, float64.

    Raises:
        ValueError: They cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(error) from error
    return {name: value.double().numpy() for name, value in weights.items()}


def read_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type, such as ``F32``, and the shape of a folder's tensors by name, without torch.

    Raises:
        ValueError: They cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            names = file.keys()  # the file itself is no mapping
            slices = {name: file.get_slice(name) for name in names}
            return {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(error) from error


def _unreadable(error: Exception) -> ValueError:
    return ValueError(
        f"no PEFT adapter can be read there ({first_line(error)}); name a folder with {CONFIG} and {WEIGHTS}, such as "
        "a run's adapter/, or where it has moved to"
    )


def unlike_plain(about: Any) -> str:
    """Return why an adapter is no plain LoRA, given what it says of itself; empty where it is one."""
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        return f"it is of the kind {about.get('peft_type') if isinstance(about, dict) else about}, not LORA"
    if about.get("init_lora_weights") not in _PLAIN_STARTS:
        return (
            f"it has init_lora_weights = {about['init_lora_weights']!r}, which may have changed the base model; "
            "save it by PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for key, plain in _PLAIN.items():
        if about.get(key, plain) != plain:
            return f"it has {key} = {about[key]!r}, which a plain LoRA has not"
    return ""


def same_base(one: str, other: str) -> bool:
    """Return whether two names of base models are of the same one: folders move, and a model's own name stays."""
    return Path(one).name.casefold() == Path(other).name.casefold()


def layer_scale(about: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return what PEFT multiplies a layer's B A by."""
    from peft.utils.other import get_pattern_key

    alphas = about.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), about.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def rank_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings of PEFT for layers of these ranks, whose scale is 1."""
    common = max(ranks.values(), key=list(ranks.values()).count)
    pattern = {rf"^{re.escape(name)}$": rank for name, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
    }
