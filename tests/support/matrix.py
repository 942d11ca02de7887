"""The matrix of methods, strategies, model families and tasks, and the slow references that hold it.

What is registered is in it; :mod:`tests.support.formulas` says what each comes to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from fedlora.config import TrainConfig
from fedlora.engine import ClientWork, Engine
from fedlora.methods import METHODS, Factor, LowRank, Method, TensorSpec, build_method, initial_tensors
from fedlora.methods.base import Layer
from fedlora.plugins import methods_of
from fedlora.roles import TRAINED
from fedlora.seeded import Seeded
from fedlora.strategy import Setting, Strategy
from strategies import STRATEGIES
from tests.support.families import LANGUAGE, random_examples, small_base, small_model, small_task, without_float32
from tests.support.formulas import FORMULAS, LAYERS, penalty, weight_of_layer

Arrays = dict[str, NDArray[Any]]

CONFIGS = {name: formula.config for name, formula in FORMULAS.items()}
LINEAR = [name for name in CONFIGS if not METHODS[name].no_adapter]  # an update that is one matrix for all tokens
CASES = [(name, method) for name in STRATEGIES for method in methods_of(name)]
MODELS = ("bert", "gpt2", "llama-lm")  # two tasks; square and other layers, Conv1D, unlike key and value heads

HEAD = [Layer("head", 4, 3, True, False)]


@functools.cache
def method_of(name: str) -> Method:
    """Return a method on LAYERS, with a head."""
    return build_method(CONFIGS[name], LAYERS, HEAD)


def setting(method: str, **changes: Any) -> Setting:
    return Setting(**{"specs": method_of(method).specs(), **changes})


def engine_of(method: str, family: str, targets: str = "auto") -> Engine:
    """Return an engine on a small model in float64."""
    base = small_base(family, targets)
    return Engine.build(
        base, build_method(CONFIGS[method], base.structure.adapted, base.structure.head), small_task(family)
    )


def random_start(engine: Engine) -> Arrays:
    """Return tensors none of which hides another's gradient."""
    generator = np.random.default_rng(11)
    return {
        name: value + 0.3 * generator.standard_normal(value.shape)
        for name, value in initial_tensors(engine.method.specs(), Seeded(7)).items()
    }


def works(start: Arrays, family: str) -> list[ClientWork]:
    """Three ragged clients; the second has no rows."""
    batches: list[list[list[int]]] = [[[0, 3, 1], [2]], [], [[4], [1, 5]]]
    return [
        ClientWork(k, random_examples(6, 100 + k, family=family), 6, [np.array(rows) for rows in own], start)
        for k, own in enumerate(batches)
    ]


def cycle(strategy: Strategy) -> range:
    return range(1, strategy.period + 1)


def trained_kinds(strategy: Strategy, server_round: int) -> set[str]:
    return {kind for kind, role in strategy.all_roles(server_round).items() if role in TRAINED}


# -- one client, one row at a time --------------------------------------------------------------------


def row_loss(method: str, family: str, engine: Engine, tensors: Mapping[str, Tensor], work: Any, row: int) -> Tensor:
    """Return a row's loss on the model with its updated weights put in place of the base's."""
    model = _model(family)
    structure = engine.base.structure
    weights = dict(model.named_parameters())
    placed: dict[str, Tensor] = {}
    added = FORMULAS[method].added
    for layer in structure.adapted if added is None else ():
        key = f"{layer.name}.weight"
        base = weights[key].detach().T if layer.fan_in_fan_out else weights[key].detach()
        whole = weight_of_layer(method, structure.adapted, layer, base, tensors)
        placed[key] = whole.T if layer.fan_in_fan_out else whole
    for layer in structure.head:
        placed[f"{layer.name}.weight"] = tensors[f"{layer.name}.weight"]
        if layer.bias:
            placed[f"{layer.name}.bias"] = tensors[f"{layer.name}.bias"]
    ids = torch.from_numpy(work.examples.tokens[row])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with ExitStack() as hooks:
        for layer in structure.adapted if added is not None else ():
            hooks.enter_context(
                _adding(model.get_submodule(layer.name), partial(added, CONFIGS[method], layer, tensors))
            )
        logits = torch.func.functional_call(model, placed, kwargs=inputs).logits
    target = work.examples.targets[row]
    if family in LANGUAGE:
        learned = torch.from_numpy(target)[1:]
        return functional.cross_entropy(logits[0, :-1][learned], ids[0, 1:][learned])
    return functional.cross_entropy(logits, torch.tensor([int(target)]))


def _adding(module: nn.Module, added: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Have a layer add to its output what is made of its input, a row at a time."""
    return module.register_forward_hook(lambda _, given, y: y + torch.stack([added(row) for row in given[0]]))


@functools.cache
def _model(family: str) -> Any:
    return without_float32(small_model(family)).requires_grad_(False)


def proximal_step(
    method: str, specs: Mapping[str, TensorSpec], trained: Mapping[str, Tensor], train: TrainConfig
) -> None:
    """Take tensors that have an L1 penalty towards zero, in place, after an optimizer's step."""
    with torch.no_grad():
        for name, value in trained.items():
            threshold = train.learning_rate * FORMULAS[method].l1.get(specs[name].kind, 0.0)
            value.copy_(torch.sign(value) * torch.relu(value.abs() - threshold))


def alone(
    method: str, family: str, engine: Engine, work: ClientWork, common: Mapping[str, Any], train: TrainConfig
) -> Arrays:
    """The slow reference: one client, one row at a time, plain torch, the method's formula."""
    specs = engine.method.specs()
    trained = {name: torch.tensor(value).requires_grad_() for name, value in work.start.items()}
    tensors = {**{name: torch.tensor(value) for name, value in common.items()}, **trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=train.learning_rate, weight_decay=train.weight_decay)
    for batch in work.batches:
        optimizer.zero_grad()
        losses = [row_loss(method, family, engine, tensors, work, int(row)) for row in batch]
        (torch.stack(losses).mean() + penalty(method, tensors)).backward()
        optimizer.step()
        proximal_step(method, specs, trained, train)
    return {name: value.detach().numpy() for name, value in trained.items()}


@final
class Changed(Method):
    """A method with something done to its low-rank factors, to plant a bug.

    Args:
        method: The method.
        change: What is done to each factor.
    """

    def __init__(self, method: Method, change: Callable[[LowRank], LowRank]) -> None:
        self.method = method
        self.change = change

    def specs(self) -> dict[str, TensorSpec]:
        return self.method.specs()

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        factors = self.method.factors(tensors)
        return {name: self.change(one) if isinstance(one, LowRank) else one for name, one in factors.items()}
