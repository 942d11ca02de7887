"""PEFT as the oracle of a method: the losses and gradients of a batch, by the engine and by PEFT's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn

from fedlora.engine import Engine
from fedlora.engine.layout import Layout
from tests.support.families import random_examples, small_model, without_float32
from tests.support.matrix import Arrays

ROWS = 5


class Passed(NamedTuple):
    """Losses of rows, and gradients of their sum by tensor."""

    losses: Tensor
    grads: dict[str, Tensor]


def by_engine(engine: Engine, family: str, start: Arrays) -> Passed:
    """Return what the engine makes of a batch, all rows of one client."""
    tensors = {name: torch.tensor(value).requires_grad_() for name, value in start.items()}
    layout = Layout.of(np.zeros(ROWS, dtype=np.int64), 1, engine.device)
    factors = engine.method.factors({name: value[None] for name, value in tensors.items()})
    with engine.grouped.placed(factors, layout) as model:
        return _passed(engine, family, model, tensors)


def by_peft(
    engine: Engine, family: str, config: PeftConfig, start: Arrays, place: Callable[[Any, str, Tensor], nn.Parameter]
) -> Passed:
    """Return what PEFT makes of the same batch.

    Args:
        engine: The engine, for its layers, rows and loss.
        family: The model.
        config: Of the adapter; it has no layers yet.
        start: The method's tensors and the head's.
        place: Writes a method's tensor, by its name without the layer, into a PEFT layer; returns the parameter.
    """
    config.target_modules = {layer.name for layer in engine.base.structure.adapted}
    adapted = get_peft_model(without_float32(small_model(family)), config).double().eval()
    inner, named = adapted.base_model.model, dict[str, Tensor]()
    with torch.no_grad():
        for name, value in start.items():
            layer, own = name.rsplit(".", 1)
            if own in ("weight", "bias"):
                named[name] = inner.get_parameter(name)
                named[name].copy_(torch.from_numpy(value))
            else:
                named[name] = place(inner.get_submodule(layer), own, torch.from_numpy(value))
    for parameter in named.values():
        parameter.requires_grad_()
    return _passed(engine, family, adapted, named)


def _passed(engine: Engine, family: str, model: nn.Module, tensors: Mapping[str, Tensor]) -> Passed:
    batch = engine.task.collate(random_examples(ROWS, 3, family=family), range(ROWS), engine.device)
    losses = engine.task.row_losses(model, batch)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    grads = {name: value.grad for name, value in tensors.items() if value.grad is not None}
    assert grads.keys() == tensors.keys()
    return Passed(losses.detach(), grads)


def same(one: Passed, other: Passed) -> None:
    """Compare in float64; every tensor has a gradient that is far above the bound."""
    assert float((one.losses - other.losses).abs().max()) < 1e-12
    for name, grad in one.grads.items():
        assert float((grad - other.grads[name]).abs().max()) < 1e-12 * max(1.0, float(grad.abs().max())), name
        assert float(grad.abs().max()) > 1e-6, f"control: {name} has a gradient"
