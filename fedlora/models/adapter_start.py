"""Start from an adapter (``method.start``): the factors and the head of a PEFT folder in place of what the seed gives.

What an adapter says of itself is held against the run: kind, base model, layers, shapes and rank. Its scale is folded
into B. Where it has fewer ranks than the run, those behind them start as the seed gives them, with a B of zero; layers
that it lacks, which a fedlora export leaves out where they are zero, start wholly so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, ConfigError
from fedlora.messages import first_line
from fedlora.models.names import model_path
from fedlora.models.structure import Structure
from fedlora.ranks import client_ranks

Array = NDArray[np.floating]

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"
_PLAIN = {  # what a plain LoRA has, by key of adapter_config.json; others change what the factors mean
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "layer_replication": None,
    "target_parameters": None,
    "alora_invocation_tokens": None,
    "kasa_config": None,
}
_PLAIN_STARTS = (None, True, False, "gaussian")  # others (pissa, olora, loftq ...) may have changed the base's weights


def adapter_start(config: Config, structure: Structure, seeded: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors that start as an adapter has them, by name; none without ``method.start``.

    Args:
        config: The resolved configuration.
        structure: Of the base model.
        seeded: The method's and the head's tensors as the seed gives them.

    Raises:
        ConfigError: The folder holds no such adapter, or one that does not fit the run: with what differs.
    """
    folder = config.method.start
    if not folder:
        return {}
    about, weights = _read(Path(folder), folder)
    _check_kind(folder, about, config)
    found: dict[str, Array] = {}
    method = config.method
    least = min(client_ranks(config, config.federation.num_clients), default=method.rank)
    own_scale = method.alpha / (math.sqrt(method.rank) if method.rslora else method.rank)
    for layer in structure.adapted:
        a, b = (weights.pop(f"{_PREFIX}{layer.name}.lora_{letter}.weight", None) for letter in "AB")
        if a is None and b is None:
            continue
        if a is None or b is None or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise _unlike(folder, f"of {layer.name} it has one factor only, or numbers that are not finite")
        if (a.shape[1], b.shape[0]) != (layer.d_in, layer.d_out) or len(a) != b.shape[1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            rule = f"{layer.name} has factors of {shapes}, the run's {layer.d_in} features in and {layer.d_out} out"
            raise _unlike(folder, rule)
        rank = len(a)
        if rank > min(method.rank, least):
            raise _unlike(
                folder, f"{layer.name} has rank {rank}; set method.rank, and each of method.ranks, to {rank} or more"
            )
        whole_a = np.array(seeded[f"{layer.name}.lora_A"], dtype=np.float64)
        whole_b = np.zeros(seeded[f"{layer.name}.lora_B"].shape)
        whole_a[:rank], whole_b[:, :rank] = a, b * (_scale(about, layer.name, rank) / own_scale)
        found |= {f"{layer.name}.lora_A": whole_a, f"{layer.name}.lora_B": whole_b}
    if not found:
        raise _unlike(folder, f"it is on none of the run's layers, such as {structure.adapted[0].name}")
    found |= _head(folder, structure, seeded, weights)
    if weights:
        names = ", ".join(sorted(weights)[:3])
        raise _unlike(
            folder, f"it has {len(weights)} tensors that the run does not train: {names}; see method.target-modules"
        )
    dtype = config.engine.tensor_dtype
    return {name: value.astype(dtype) for name, value in found.items()}


def _head(
    folder: str, structure: Structure, seeded: Mapping[str, Array], weights: dict[str, Array]
) -> dict[str, Array]:
    """Take the head's tensors out of an adapter's, those of the modules that PEFT saves whole among them."""
    found: dict[str, Array] = {}
    for layer in structure.head:
        for part in ("weight", "bias"):
            name = f"{layer.name}.{part}"
            value = weights.pop(f"{_PREFIX}{name}", None)
            if value is None:
                continue
            if name not in seeded or value.shape != seeded[name].shape:
                wanted = list(seeded[name].shape) if name in seeded else "none"
                raise _unlike(folder, f"{name} of its head is {list(value.shape)}, the run's {wanted}: other classes?")
            if not np.isfinite(value).all():
                raise _unlike(folder, f"{name} of its head has numbers that are not finite")
            found[name] = value
    missing = [f"{layer.name}.weight" for layer in structure.head if f"{layer.name}.weight" not in found]
    if found and missing:
        raise _unlike(folder, f"it has a part of the head, and not {missing[0]}")
    return found


def _read(path: Path, folder: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return an adapter's configuration and its tensors by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        about = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(path / _WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"method.start = {folder!r}: no PEFT adapter can be read there ({first_line(error)}); name a folder with "
            f"adapter_config.json and {_WEIGHTS}, such as a run's adapter/, or where it has moved to."
        ) from error
    return about, {name: value.double().numpy() for name, value in weights.items()}


def _check_kind(folder: str, about: Mapping[str, Any], config: Config) -> None:
    """Refuse an adapter that is no plain LoRA, or one of another base model."""
    if not isinstance(about, dict) or about.get("peft_type") != "LORA":
        raise _unlike(
            folder, f"it is of the kind {about.get('peft_type') if isinstance(about, dict) else about}, not LORA"
        )
    if about.get("init_lora_weights") not in _PLAIN_STARTS:
        raise _unlike(
            folder,
            f"it has init_lora_weights = {about['init_lora_weights']!r}, which may have changed the base model; "
            "save it by PEFT with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    for key, plain in _PLAIN.items():
        if about.get(key, plain) != plain:
            raise _unlike(folder, f"it has {key} = {about[key]!r}, which a plain LoRA has not")
    its, own = str(about.get("base_model_name_or_path") or ""), model_path(config.model.name)
    if Path(its).name.casefold() != Path(own).name.casefold():
        raise _unlike(
            folder,
            f"it says that its base model is {its!r}, and the run's is {own!r}; where they are the same, change "
            "base_model_name_or_path in its adapter_config.json",
        )


def _scale(about: Mapping[str, Any], layer: str, rank: int) -> float:
    """Return what PEFT multiplies a layer's B A by."""
    from peft.utils.other import get_pattern_key

    alphas = about.get("alpha_pattern") or {}
    alpha = float(alphas.get(get_pattern_key(list(alphas), layer), about.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _unlike(folder: str, why: str) -> ConfigError:
    return ConfigError(f"method.start = {folder!r}: the adapter does not fit: {why}.")
