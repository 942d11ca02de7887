"""The matrix of methods, strategies, model families and tasks, and the slow references that hold it.

A new strategy is in it once it is registered and the formula of its bytes stands in :data:`BYTES`; a new method joins
by a line in :data:`CONFIGS`, its formula in :func:`update_of_layer`, and the bytes of its strategies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine
from fedlora.methods import Factor, LowRank, Method, MosOptions, S2Options, TensorSpec, build_method, initial_tensors
from fedlora.methods.base import Layer
from fedlora.roles import TRAINED
from fedlora.seeded import Seeded
from fedlora.strategy import Setting, Strategy
from strategies import STRATEGIES
from tests.support.families import LANGUAGE, random_examples, small_base, small_model, small_task, without_float32

Arrays = dict[str, NDArray[Any]]

CONFIGS = {
    "lora": Config(method=MethodConfig("lora", rank=3, alpha=6.0)),
    "mos": Config(method=MethodConfig("mos", rank=4, alpha=6.0)).with_options(
        MosOptions(budget=3, shards=2, private=1)
    ),
    "s2-lora": Config(method=MethodConfig("s2-lora", rank=3, alpha=6.0)).with_options(
        S2Options(sparsity=0.05, orthogonality=0.02)
    ),
}
CASES = [(name, method) for name in STRATEGIES for method in STRATEGIES[name].methods]
MODELS = ("bert", "gpt2", "llama-lm")  # two tasks; square and other layers, Conv1D, unlike key and value heads

# Layers without a model: two projection types, three and two of them, neither square.
LAYERS = [
    *(Layer(f"m.{n}.q", 6, 10, bias=True, fan_in_fan_out=False) for n in range(3)),
    *(Layer(f"m.{n}.v", 8, 4, bias=False, fan_in_fan_out=True) for n in range(2)),
]
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


# -- formulas -----------------------------------------------------------------------------------------


def update_of_layer(method: Any, layers: Sequence[Layer], layer: Layer, tensors: Mapping[str, Any]) -> Any:
    """Return Delta W of a layer, [d_out, d_in], number by number from the method's formula, in torch."""
    config = CONFIGS[method]
    rank, scale = config.method.rank, config.method.alpha / config.method.rank
    if method == "lora":
        return scale * tensors[f"{layer.name}.lora_B"] @ tensors[f"{layer.name}.lora_A"]
    if method == "s2-lora":
        alike = [one.name for one in layers if (one.d_in, one.d_out) == (layer.d_in, layer.d_out)]
        name = f"s2.{layer.d_out}x{layer.d_in}"
        s = tensors[f"{name}.s"][alike.index(layer.name)]
        return sum(scale * s[i] * torch.outer(tensors[f"{name}.B"][:, i], tensors[f"{name}.A"][i]) for i in range(rank))
    assert method == "mos"
    name = ".".join("*" if part.isdecimal() else part for part in layer.name.split("."))
    alike = [one.name for one in layers if ".".join("*" if p.isdecimal() else p for p in one.name.split(".")) == name]
    index = indices(config, name, len(alike), alike.index(layer.name))
    pieces = config.options(MosOptions).shards

    def vectors(side: str) -> list[Tensor]:
        pool = [*tensors[f"{name}.mos_{side}"], *tensors[f"{name}.mos_{side}_private"]]
        return [torch.cat([pool[i] for i in index[side][j * pieces : (j + 1) * pieces]]) for j in range(rank)]

    return sum(scale * torch.outer(b, a) for a, b in zip(vectors("A"), vectors("B"), strict=True))


def indices(config: Config, name: str, count: int, layer: int) -> dict[str, list[int]]:
    """Return a layer's shards in the A and the B pool, from the words of the paper."""
    mos, rank = config.options(MosOptions), config.method.rank
    public = (mos.budget - mos.private) * count * mos.shards
    own = [public + layer * mos.private * mos.shards + n for n in range(mos.private * mos.shards)]
    return {
        side: [int(i) for i in Seeded(config.seed).permutation("mos", name, side, layer, size=public)][
            : (rank - mos.private) * mos.shards
        ]
        + own
        for side in ("A", "B")
    }


def penalty(method: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what is added to a client's loss whatever its data."""
    weight, total = CONFIGS[method].options(S2Options).orthogonality, torch.zeros((), dtype=torch.float64)
    if method == "s2-lora":
        for name, value in tensors.items():
            if name.startswith("s2.") and name.endswith((".A", ".B")):
                gram = value @ value.T if name.endswith(".A") else value.T @ value
                total = total + weight * ((gram - torch.eye(len(gram))) ** 2).sum()
    return total


# -- one client, one row at a time --------------------------------------------------------------------


def row_loss(method: str, family: str, engine: Engine, tensors: Mapping[str, Tensor], work: Any, row: int) -> Tensor:
    """Return a row's loss on the model with its updated weights put in place of the base's."""
    model = _model(family)
    structure = engine.base.structure
    weights = dict(model.named_parameters())
    placed: dict[str, Tensor] = {}
    for layer in structure.adapted:
        update = update_of_layer(method, structure.adapted, layer, tensors)
        key = f"{layer.name}.weight"
        placed[key] = weights[key].detach() + (update.T if layer.fan_in_fan_out else update)
    for layer in structure.head:
        placed[f"{layer.name}.weight"] = tensors[f"{layer.name}.weight"]
        if layer.bias:
            placed[f"{layer.name}.bias"] = tensors[f"{layer.name}.bias"]
    ids = torch.from_numpy(work.examples.tokens[row])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    logits = torch.func.functional_call(model, placed, kwargs=inputs).logits
    target = int(work.examples.targets[row])
    if family in LANGUAGE:
        return functional.cross_entropy(logits[0, target - 1 : -1], ids[0, target:])
    return functional.cross_entropy(logits, torch.tensor([target]))


@functools.cache
def _model(family: str) -> Any:
    return without_float32(small_model(family)).requires_grad_(False)


def proximal_step(
    method: str, specs: Mapping[str, TensorSpec], trained: Mapping[str, Tensor], train: TrainConfig
) -> None:
    """Take S2-LoRA's coefficients towards zero, in place, after an optimizer's step."""
    with torch.no_grad():
        for name, value in trained.items():
            threshold = train.learning_rate * (
                CONFIGS[method].options(S2Options).sparsity if specs[name].kind == "s" else 0.0
            )
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


# -- bytes --------------------------------------------------------------------------------------------


def _each(factor_in: float, factor_out: float) -> Callable[[int], float]:
    return lambda rank: sum(rank * (factor_in * layer.d_in + factor_out * layer.d_out) for layer in LAYERS)


def _bases(rank: int) -> int:
    return sum(rank * sum(shape) for shape in {(layer.d_in, layer.d_out) for layer in LAYERS})


def _formulas() -> Iterator[tuple[tuple[str, str], tuple[float, float, float]]]:
    """Numbers a round: up, down, and down to a client that keeps what it was sent; means over a cycle."""
    both, a, b = _each(1, 1), _each(1, 0), _each(0, 1)
    for method, rank in (("lora", 3), ("mos", 3)):  # MoS costs what LoRA of its budget costs
        yield ("fedavg", method), (both(rank), both(rank), both(rank))
        yield ("ffa-lora", method), (b(rank), b(rank), b(rank))
        yield ("rolora", method), (both(rank) / 2, both(rank), both(rank) / 2)
        yield ("fedsa-lora", method), (a(rank), a(rank), a(rank))
    yield ("fedsvd", "lora"), (b(3), both(3), both(3))
    yield ("zero-padding", "lora"), (both(3), both(3), both(3))
    yield ("flora", "lora"), (both(3), 0, 0)  # and what has been stacked, which grows by round
    yield ("mos", "mos"), (both(3), both(3), both(3))
    yield ("mos-personal", "mos"), (both(2), both(2), both(2))
    s, bases = 3 * len(LAYERS), _bases(3)
    yield ("fedavg", "s2-lora"), (bases + s, bases + s, bases + s)
    yield ("s2-lora", "s2-lora"), (bases + s, bases + s, bases + s)
    yield ("s2-frozen", "s2-lora"), (s, s, s)
    yield ("s2-cyclic", "s2-lora"), ((bases + s) / 3, bases + s, (bases + s) / 3)
    yield ("s2-personal", "s2-lora"), (bases, bases, bases)
    for method in CONFIGS:
        yield ("local", method), (0, 0, 0)


BYTES = dict(_formulas())
