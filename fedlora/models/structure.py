"""The structure of a base model: which of its layers are adapted, and which are the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.messages import first_line
from fedlora.methods import Layer
from fedlora.models.quiet import quiet


@final
@dataclass(frozen=True)
class Structure:
    """What a run needs to know of a model without its weights.

    Attributes:
        family: ``model_type`` of the configuration, e.g. ``bert``.
        adapted: The layers that the method adapts.
        head: The layers of the head.
        num_parameters: Parameters of the model, head included.
    """

    family: str
    adapted: tuple[Layer, ...]
    head: tuple[Layer, ...]
    num_parameters: int


def inspect(model: nn.Module, target_modules: str, *, has_head: bool) -> Structure:
    """Return the structure of ``model``, with target modules resolved by PEFT itself.

    The head is every linear layer outside the base model (``classifier``, ``score``, ``pre_classifier`` ...):
    what the task adds, and what a checkpoint of the bare model does not carry.

    Args:
        model: The model; its weights may be on the ``meta`` device.
        target_modules: The value of ``method.target-modules``.
        has_head: Whether the task adds a head; a language model's output layer is part of the base.

    Raises:
        ValueError: No layer, or a layer that cannot be adapted, is named.
    """
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = [name for name in linear if has_head and not name.startswith(prefix)]
    targets = _resolve_targets(model, target_modules, [name for name in linear if name not in head], head)
    _refuse_tied(model, targets)
    config: Any = model.config
    return Structure(
        family=str(config.model_type),
        adapted=tuple(_layer(name, linear[name]) for name in targets),
        head=tuple(_layer(name, linear[name]) for name in head),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """Refuse output layers that share the embedding's weight: merging an adapter would change the embedding, too."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name in targets:
        layer = model.get_submodule(name)
        if layer.weight is embedding.weight or (layer is output and config.tie_word_embeddings):
            raise ValueError(
                f"method.target-modules: {name} is tied to the embedding of this {config.model_type} model; merging "
                "an adapter into it would corrupt the embedding. Name other layers, or untie them in the model "
                "(tie_word_embeddings = false)."
            )


def _layer(name: str, module: nn.Linear | Conv1D) -> Layer:
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return Layer(name, d_in, d_out, bias=True, fan_in_fan_out=True)
    return Layer(name, module.in_features, module.out_features, bias=module.bias is not None, fan_in_fan_out=False)


def _resolve_targets(model: nn.Module, target_modules: str, candidates: list[str], head: list[str]) -> list[str]:
    names = [part.strip() for part in target_modules.split(",")]
    if len(names) > 1 and {"auto", "all-linear"} & set(names):
        raise ValueError(f"method.target-modules = {target_modules!r}: auto and all-linear stand alone.")
    wanted: str | list[str] | None = names
    if target_modules in ("auto", "all-linear"):
        wanted = None if target_modules == "auto" else "all-linear"
    config: Any = model.config
    with torch.device("meta"), quiet():
        skeleton = type(model)(config)
        try:
            peft_config = LoraConfig(r=1, target_modules=wanted, exclude_modules=head)
            adapted = get_peft_model(skeleton, peft_config)
        except ValueError as error:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise ValueError(
                f"method.target-modules = {target_modules!r}: PEFT cannot adapt a {config.model_type} model so: "
                f"{first_line(error)} Its linear layers are called: {', '.join(suffixes)}."
            ) from error
    resolved = [str(name) for name in adapted.targeted_module_names]
    refused = [name for name in resolved if name not in candidates]
    if refused:
        raise ValueError(
            f"method.target-modules = {target_modules!r}: {refused[0]} is not a linear layer of the base model; "
            "name attention or feed-forward layers (the head has its own key, method.head)."
        )
    unused = [name for name in names if isinstance(wanted, list) and not _matches(name, resolved)]
    if unused:
        raise ValueError(f"method.target-modules: {unused[0]!r} names no layer of this {config.model_type} model.")
    return sorted(resolved, key=candidates.index)


def _matches(name: str, resolved: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in resolved)
