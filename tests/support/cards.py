"""Small models spread over two GPUs, or over two that are not there.

A GPU that is not there is a device of torch's own for backends in Python, with fake tensors on it: shapes and devices
are computed and checked as on any, numbers are not. The backward pass does not run there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import accelerate
import numpy as np
import torch
from torch import nn
from torch.utils import backend_registration

from fedlora.engine import Engine
from fedlora.engine.decomposed import squared_norms
from fedlora.engine.layout import Layout
from fedlora.methods import build_method
from fedlora.models import prepare_base
from tests.support.families import small_model, small_task, task_of, without_float32
from tests.support.matrix import CONFIGS, random_start

NAME = "card"
_SECOND = ("layer.1", "layers.1", "h.1")


def split(model: Any) -> dict[str, int]:
    """Return a map that cuts a small model before its second block: that, and all that follows, is on GPU 1."""
    whole = model._no_split_modules
    found: dict[str, int] = {}
    card = 0
    for name, module in model.named_modules():
        if name and not any(name.startswith(f"{known}.") for known in found):
            card = 1 if name.endswith(_SECOND) else card
            if type(module).__name__ in whole or not list(module.children()):
                found[name] = card
    return found


def spread_engine(family: str, method: str, *, cards: int, dtype: torch.dtype = torch.float64) -> Engine:
    """Return an engine on a small model, on the first GPU or spread over two."""
    model: Any = without_float32(small_model(family)).to(dtype)
    if cards > 1:
        accelerate.dispatch_model(model, split(model))
    has_head = task_of(family).has_head
    base = prepare_base(model, None, "auto", has_head=has_head, device=torch.device("cuda", 0))
    built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
    return Engine.build(base, built, small_task(family))


def on_fake_cards(family: str, method: str) -> tuple[Engine, Any]:
    """Return an engine on a small model spread over two GPUs that are not there, and the mode to use it in."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = without_float32(small_model(family))
    has_head = task_of(family).has_head
    base = prepare_base(model, None, "auto", has_head=has_head, device=torch.device("cpu"))
    places = split(model)
    # Measured while there are numbers: whether one is zero cannot be asked of a fake tensor.
    norms = {layer.name: squared_norms(model.get_submodule(layer.name), layer.name) for layer in base.structure.adapted}
    accelerate.dispatch_model(model, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for name, module in model.named_modules():
            known = [part for part in places if f"{name}.".startswith(f"{part}.")]
            device = torch.device(NAME, places[known[0]] if known else 0)
            for key, value in module._parameters.items():
                if value is not None:
                    module._parameters[key] = nn.Parameter(mode.from_tensor(value).to(device), requires_grad=False)
            for key, value in module._buffers.items():
                if value is not None:
                    module._buffers[key] = mode.from_tensor(value).to(device)
            if hasattr(module, "_hf_hook"):
                module._hf_hook.execution_device = device
        built = build_method(CONFIGS[method], base.structure.adapted, base.structure.head)
        engine = Engine.build(base, built, small_task(family))
        for name, value in norms.items():
            layer: Any = engine.grouped.model.get_submodule(name)
            layer._squares = mode.from_tensor(value).to(layer.base.weight.device)
        return engine, mode


def losses_on_fake_cards(family: str, method: str) -> tuple[Engine, torch.Tensor]:
    """Return such an engine, and the losses of rows of two clients, which have tensors of their own."""
    engine, mode = on_fake_cards(family, method)
    with mode:
        rows = engine.task.made_up_rows()
        batch = engine.task.collate(rows, range(3), torch.device("cpu"))
        layout = Layout.of(np.array([0, 0, 1]), 2, torch.device("cpu"))
        assert layout.index_n is not None, "clients with unlike numbers of rows, so that an index goes along"
        layout = replace(layout, index_n=layout.index_n.to(engine.device))
        own = {name: torch.from_numpy(np.stack([value] * 2)) for name, value in random_start(engine).items()}
        here = {name: value.to(engine.device).requires_grad_() for name, value in own.items()}
        with engine.grouped.placed(engine.method.factors(here), layout) as model:
            return engine, engine.task.row_losses(model, {key: value.to(engine.device) for key, value in batch.items()})


def main() -> None:
    """Write for small models where they and their losses are, on two GPUs that are not there."""

    class Module(backend_registration._DummyBackendModule):
        def device_count(self) -> int:
            return 2

    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    for family in ("bert", "llama-lm", "gpt2"):
        for method in CONFIGS:
            engine, losses = losses_on_fake_cards(family, method)
            cards = " ".join(map(str, engine.cards))
            sys.stdout.write(f"{family} {method} {cards} {losses.device} {losses.requires_grad}\n")


if __name__ == "__main__":
    main()
