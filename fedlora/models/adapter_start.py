"""Start from an adapter (``method.start``): the factors and the head of a PEFT folder in place of what the seed gives.

What an adapter says of itself is held against the run: kind, base model, layers, shapes and rank. Its scale is folded
into B. Where it has fewer ranks than the run, those behind them start as the seed gives them, with a B of zero; layers
that it lacks, which a fedlora export leaves out where they are zero, start wholly so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, ConfigError
from fedlora.lora_files import PREFIX, layer_scale, read_about, read_weights, same_base, unlike_plain
from fedlora.models.names import model_path
from fedlora.models.structure import Structure
from fedlora.ranks import client_ranks

Array = NDArray[np.floating]


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
        a, b = (weights.pop(f"{PREFIX}{layer.name}.lora_{letter}.weight", None) for letter in "AB")
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
        whole_a[:rank], whole_b[:, :rank] = a, b * (layer_scale(about, layer.name, rank) / own_scale)
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
            value = weights.pop(f"{PREFIX}{name}", None)
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
    try:
        return read_about(path), read_weights(path)
    except ValueError as error:
        raise ConfigError(f"method.start = {folder!r}: {error}.") from error


def _check_kind(folder: str, about: Mapping[str, Any], config: Config) -> None:
    """Refuse an adapter that is no plain LoRA, or one of another base model."""
    reason = unlike_plain(about)
    if reason:
        raise _unlike(folder, reason)
    its, own = str(about.get("base_model_name_or_path") or ""), model_path(config.model.name)
    if not same_base(its, own):
        raise _unlike(
            folder,
            f"it says that its base model is {its!r}, and the run's is {own!r}; where they are the same, change "
            "base_model_name_or_path in its adapter_config.json",
        )


def _unlike(folder: str, why: str) -> ConfigError:
    return ConfigError(f"method.start = {folder!r}: the adapter does not fit: {why}.")
