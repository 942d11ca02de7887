"""A base model that lies on several GPUs: where its layers compute, and what of ours goes to them.

accelerate has cut the model along its blocks (``device_map``): it sends what goes into a module to the GPU of its
weights, and what the model puts out back to where its inputs were. So batches, trained tensors and losses stay on one
GPU, that of the inputs. What a layer on another GPU needs for a pass, its factor and the layout, is copied there when
it is put in place; autograd brings the factor's gradient back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from fedlora.engine.layers import GroupedLayer, GroupedModel

Copies = dict[tuple[int, torch.device], Tensor]


def cards_of(model: nn.Module) -> tuple[torch.device, ...]:
    """Return the devices that a model's weights are on, that of its inputs first."""
    return tuple(dict.fromkeys(parameter.device for parameter in model.parameters()))


def spread(grouped: GroupedModel, heads: Collection[str]) -> None:
    """Have wrapped layers compute where their weights are, if the model lies on several GPUs.

    Args:
        grouped: The model.
        heads: Names of the layers that are replaced: they compute beside the trained tensors.
    """
    first, *others = cards_of(grouped.model)
    if not others:
        return
    away: list[tuple[GroupedLayer, torch.device]] = []
    for layer in [module for module in grouped.model.modules() if isinstance(module, GroupedLayer)]:
        device = first if layer.name in heads else next(layer.base.parameters()).device
        add_hook_to_module(layer, AlignDevicesHook(device))  # it may be the first of its GPU, or the last
        if device != first:
            away.append((layer, device))

    def placement() -> None:
        copies: Copies = {}
        for layer, device in away:
            layer.factor = _on(device, layer.factor, copies)
            layer.layout = _on(device, layer.layout, copies)

    grouped.placement = placement


def _on(device: torch.device, value: Any, copies: Copies) -> Any:
    """Return a value with all tensors in it on a device; one that several layers share is copied once."""
    if isinstance(value, Tensor):
        key = id(value), device
        if key not in copies:
            copies[key] = value.to(device)
        return copies[key]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_on(device, part, copies) for part in value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _on(device, getattr(value, one.name), copies) for one in fields(value)})
    return value
