"""Target modules: which layers of a base model ``method.target-modules`` names, resolved by PEFT itself."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn

from fedlora.config.sections import is_pattern
from fedlora.messages import first_line
from fedlora.models.quiet import quiet

AUTO = {
    "albert": ("query", "value"),
    "deberta-v2": ("value_proj",),
    "fnet": ("intermediate.dense", "output.dense"),
    "modernbert": ("Wqkv",),
    "mpnet": ("q", "v"),
    "phi3": ("qkv_proj",),
    "xlnet": ("layer_1", "layer_2"),
}
"""What ``auto`` adapts in families that PEFT has no entry for; and in DeBERTa, whose ``query_proj`` (in PEFT's entry)
also reads relative positions, which are no rows, so that clients would have to be trained one by one."""

_ATTENTION = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q", "v"),
    ("query_key_value",),
    ("qkv_proj",),
    ("Wqkv",),
    ("c_attn",),
)
"""How query and value projections of attention are called, in the order in which they are looked for."""


def resolve_targets(model: nn.Module, target_modules: str, candidates: list[str], excluded: list[str]) -> list[str]:
    """Return the names of the linear layers to adapt, in the model's order.

    Args:
        model: The model; its weights may be on the ``meta`` device.
        target_modules: The value of ``method.target-modules``.
        candidates: Linear layers that may be adapted.
        excluded: Layers that may not: the head's, and those of other parts than the text model.

    Raises:
        ValueError: It names no layer, or one that cannot be adapted.
    """
    config: Any = model.config
    key = f"method.target-modules = {target_modules!r}"
    names = [part.strip() for part in target_modules.split(",")]
    wanted: str | list[str] = names
    if is_pattern(target_modules):
        wanted = _checked_pattern(key, target_modules)
    elif target_modules == "auto":
        wanted = _auto(config, candidates, key)
    elif target_modules == "all-linear":
        wanted = "all-linear"
    elif {"auto", "all-linear"} & set(names):
        raise ValueError(f"{key}: auto and all-linear stand alone.")
    outside = _only_outside(wanted, candidates, excluded)
    with torch.device("meta"), quiet():
        skeleton = type(model)(config)
        try:
            adapted = get_peft_model(skeleton, LoraConfig(r=1, target_modules=wanted, exclude_modules=excluded or None))
        except ValueError as error:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise ValueError(
                f"{key}: PEFT cannot adapt a {config.model_type} model so: {outside or first_line(error)} "
                f"Its linear layers are called: {', '.join(suffixes)}."
            ) from error
    resolved = {str(name) for name in adapted.targeted_module_names}
    refused = sorted(resolved - set(candidates))
    if refused:
        raise ValueError(
            f"{key}: {refused[0]} is not a linear layer of the base model; name attention or feed-forward layers (the "
            "head has its own key, method.head)."
        )
    unused = [name for name in wanted if isinstance(wanted, list) and not _matches(name, resolved)]
    if unused:
        raise ValueError(f"method.target-modules: {unused[0]!r} names no layer of this {config.model_type} model.")
    return [name for name in candidates if name in resolved]


def _auto(config: Any, candidates: list[str], key: str) -> list[str]:
    """Return what ``auto`` stands for: our own entry, PEFT's, or the usual names of query and value projections."""
    family = str(config.get_text_config().model_type)
    if family in AUTO:
        return list(AUTO[family])
    known = PEFT_TARGETS.get(family)
    if isinstance(known, list) and all(_matches(name, candidates) for name in known):
        return list(known)
    for names in _ATTENTION:
        if all(_matches(name, candidates) for name in names):
            return list(names)
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    raise ValueError(
        f"{key}: neither PEFT nor fedlora knows the attention layers of a {family} model; name them, or all-linear. "
        f"Its linear layers are called: {', '.join(suffixes)}."
    )


def _checked_pattern(key: str, pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{key}: is no regular expression ({error}).") from error
    return pattern


def _only_outside(wanted: str | list[str], candidates: list[str], excluded: list[str]) -> str:
    """Return what to say where targets are found among excluded layers only; empty where they are not."""

    def found(names: list[str]) -> list[str]:
        if isinstance(wanted, str):
            return [] if wanted == "all-linear" else [name for name in names if re.fullmatch(wanted, name)]
        return [name for name in names if any(_matches(one, [name]) for one in wanted)]

    outside = [] if found(candidates) else found(excluded)
    return f"{outside[0]} belongs to the head or to another part than the text model." if outside else ""


def _matches(name: str, resolved: set[str] | list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in resolved)
