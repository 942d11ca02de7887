"""What each method and strategy comes to, number by number from its formula: the one place that a new one joins.

A method is an entry of :data:`FORMULAS`, a strategy its bytes in :data:`BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from fedlora.config import Config, MethodConfig
from fedlora.methods import (
    BlockLoraOptions,
    DualLoraOptions,
    FlyLoraOptions,
    LoraExpertsOptions,
    MosOptions,
    NolaOptions,
    RavanOptions,
    S2Options,
    SoraOptions,
    UniLoraOptions,
)
from fedlora.methods.base import Layer
from fedlora.plugins import methods_of
from fedlora.seeded import Seeded

Tensors = Mapping[str, Any]


def _added(base: Tensor, update: Tensor, layer: Layer, tensors: Tensors) -> Tensor:
    return base + update


def _no_penalty(config: Config, tensors: Tensors) -> Tensor:
    return torch.zeros((), dtype=torch.float64)


@final
@dataclass(frozen=True)
class Formula:
    """A method as it is written on paper.

    Attributes:
        config: A small configuration of it.
        update: Delta W of a layer, [d_out, d_in], given all adapted layers and the tensors, in torch; None: it is not
            the same for all tokens, see ``added``.
        penalty: What is added to a client's loss whatever its data.
        l1: Weight of the L1 penalty, by kind of tensor.
        weight: What becomes of the base's weight [d_out, d_in], given Delta W, the layer and the tensors.
        added: What a layer adds to its output, [T, d_out], for an input [T, d_in]; None: Delta W times the input.
        start: The largest number that Delta W may have at the start.
    """

    config: Config
    update: Callable[[Config, Sequence[Layer], Layer, Tensors], Any] | None
    penalty: Callable[[Config, Tensors], Tensor] = _no_penalty
    l1: Mapping[str, float] = field(default_factory=dict)
    weight: Callable[[Tensor, Tensor, Layer, Tensors], Tensor] = _added
    added: Callable[[Config, Layer, Tensors, Tensor], Tensor] | None = None
    start: float = 0.0


def _scale(config: Config) -> float:
    return config.method.alpha / config.method.rank


# -- lora ---------------------------------------------------------------------------------------------


def _lora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    """With a residual beside A and B where the tensors have one."""
    terms = [part for part in ("lora", "residual") if f"{layer.name}.{part}_A" in tensors]
    return sum(_scale(config) * tensors[f"{layer.name}.{part}_B"] @ tensors[f"{layer.name}.{part}_A"] for part in terms)


# -- mos ----------------------------------------------------------------------------------------------


def _mos(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    name = _starred(layer)
    alike = [one.name for one in layers if _starred(one) == name]
    index = _indices(config, name, len(alike), alike.index(layer.name))
    rank, pieces = config.method.rank, config.options(MosOptions).shards

    def vectors(side: str) -> list[Tensor]:
        pool = [*tensors[f"{name}.mos_{side}"], *tensors[f"{name}.mos_{side}_private"]]
        return [torch.cat([pool[i] for i in index[side][j * pieces : (j + 1) * pieces]]) for j in range(rank)]

    return sum(_scale(config) * torch.outer(b, a) for a, b in zip(vectors("A"), vectors("B"), strict=True))


def _starred(layer: Layer) -> str:
    return ".".join("*" if part.isdecimal() else part for part in layer.name.split("."))


def _indices(config: Config, name: str, count: int, layer: int) -> dict[str, list[int]]:
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


# -- s2-lora ------------------------------------------------------------------------------------------


def _s2(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    alike = [one.name for one in layers if (one.d_in, one.d_out) == (layer.d_in, layer.d_out)]
    name, scale = f"s2.{layer.d_out}x{layer.d_in}", _scale(config)
    s = tensors[f"{name}.s"][alike.index(layer.name)]
    products = (torch.outer(tensors[f"{name}.B"][:, i], tensors[f"{name}.A"][i]) for i in range(config.method.rank))
    return sum(scale * s[i] * product for i, product in enumerate(products))


def _s2_penalty(config: Config, tensors: Tensors) -> Tensor:
    weight, total = config.options(S2Options).orthogonality, torch.zeros((), dtype=torch.float64)
    for name, value in tensors.items():
        if name.startswith("s2.") and name.endswith((".A", ".B")):
            gram = value @ value.T if name.endswith(".A") else value.T @ value
            total = total + weight * ((gram - torch.eye(len(gram))) ** 2).sum()
    return total


# -- sora ---------------------------------------------------------------------------------------------


def _sora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    a, b, g = (tensors[f"{layer.name}.sora_{letter}"] for letter in "ABg")
    return sum(_scale(config) * g[i] * torch.outer(b[:, i], a[i]) for i in range(config.method.rank))


# -- lora-sb and ravan --------------------------------------------------------------------------------


def _lora_sb(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    a, b, core = (tensors[f"{layer.name}.sb_{letter}"] for letter in "ABR")
    return _scale(config) * b @ core @ a


def _ravan(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    """A client that trains some heads has the others' s_i H_i ready, and a row for each of its own that says which."""
    a, b, cores, s = (tensors[f"{layer.name}.ravan_{letter}"] for letter in "ABHs")
    rank, total, places = config.method.rank, 0.0, tensors.get("ravan.places")
    for i in range(config.options(RavanOptions).heads):
        own = slice(i * rank, (i + 1) * rank)
        trained = [i] if places is None else [j for j, row in enumerate(places) if row[i] == 1]
        core = s[trained[0]] * cores[trained[0]] if trained else tensors[f"{layer.name}.ravan_others"][i]
        total = total + b[:, own] @ core @ a[own]
    return _scale(config) * total


# -- dual-lora ----------------------------------------------------------------------------------------


def _dual_lora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    mix = config.options(DualLoraOptions).mix
    a, b, a_own, b_own = (tensors[f"{layer.name}.dual_{kind}"] for kind in ("A", "B", "A_own", "B_own"))
    return _scale(config) * ((1 - mix) * (b @ a) + mix * (b_own @ a_own))


# -- dora ---------------------------------------------------------------------------------------------


def _dora_weight(base: Tensor, update: Tensor, layer: Layer, tensors: Tensors) -> Tensor:
    whole = base + update
    m = base.norm(dim=1) + tensors[f"{layer.name}.lora_magnitude"]
    return (m / whole.detach().norm(dim=1))[:, None] * whole


# -- methods of random bases: vera, nola and randlora -------------------------------------------------


def _basis(config: Config, *key: str, shape: tuple[int, ...], bound: float) -> Tensor:
    """Return a random basis: the seed's uniform numbers as bfloat16 holds them."""
    drawn = torch.from_numpy(Seeded(config.seed).uniform("basis", *key, shape=shape, bound=bound))
    return drawn.float().bfloat16().double()


def _vera(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    rank = config.method.rank
    d_in, d_out = max(one.d_in for one in layers), max(one.d_out for one in layers)
    a = _basis(config, "vera", "A", shape=(rank, d_in), bound=(6 / d_in) ** 0.5)
    b = _basis(config, "vera", "B", shape=(d_out, rank), bound=(6 / rank) ** 0.5)
    down, up = (torch.diag(tensors[f"{layer.name}.vera_{vector}"]) for vector in "db")
    return up @ b[: layer.d_out] @ down @ a[:, : layer.d_in]


def _nola(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    alike = [one.name for one in layers if (one.d_in, one.d_out) == (layer.d_in, layer.d_out)]
    name, place, rank = f"nola.{layer.d_out}x{layer.d_in}", alike.index(layer.name), config.method.rank
    count, total_a, total_b = config.options(NolaOptions).bases, 0.0, 0.0
    a = _basis(config, name, "A", shape=(count, rank, layer.d_in), bound=count**-0.5)
    b = _basis(config, name, "B", shape=(count, layer.d_out, rank), bound=count**-0.5)
    for i in range(count):
        total_a = total_a + tensors[f"{name}.alpha"][place, i] * a[i]
        total_b = total_b + tensors[f"{name}.beta"][place, i] * b[i]
    return _scale(config) * total_b @ total_a  # type: ignore[operator]


def _randlora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    rank = config.method.rank
    sides = max(one.d_in for one in layers), max(one.d_out for one in layers)
    whole_a = _basis(config, "randlora", "A", shape=(rank, 1, min(sides)), bound=3**0.5)
    whole_b = _basis(config, "randlora", "B", shape=(max(sides), -(-min(sides) // rank), rank), bound=3**0.5)
    small, large = min(layer.d_in, layer.d_out), max(layer.d_in, layer.d_out)
    count = -(-small // rank)
    a, columns = whole_a[:, 0, :small], whole_b[:large, :count].flatten(1)
    scales, features = (tensors[f"{layer.name}.randlora_{which}"] for which in ("lambda", "gamma"))
    total = sum(columns[:, j::count] @ torch.diag(scales[:, j]) @ a @ torch.diag(features[j]) for j in range(count))
    return _scale(config) * (total if layer.d_in == small else total.T)  # type: ignore[union-attr]


# -- uni-lora and block-lora --------------------------------------------------------------------------


def _uni_lora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    length, rank = config.options(UniLoraOptions).length, config.method.rank
    sizes = {one.name: rank * (one.d_in + one.d_out) for one in layers}
    places = [int(i) % length for i in Seeded(config.seed).permutation("uni-lora", size=sum(sizes.values()))]
    used = [0] * length
    for place in places:
        used[place] += 1
    names = [one.name for one in layers]
    first = sum(sizes[name] for name in names[: names.index(layer.name)])
    own = places[first : first + sizes[layer.name]]
    entries = torch.stack([tensors["uni.theta"][place] / used[place] ** 0.5 for place in own])
    a, b = entries[: rank * layer.d_in], entries[rank * layer.d_in :]
    return b.reshape(layer.d_out, rank) @ a.reshape(rank, layer.d_in)


def _block_lora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    """As A_s times the sum of the input's parts: P sums feature i of all parts."""
    count = config.options(BlockLoraOptions).blocks
    part = layer.d_in // count
    sums = torch.zeros(part, layer.d_in, dtype=torch.float64)
    for feature in range(layer.d_in):
        sums[feature % part, feature] = 1.0
    return _scale(config) * tensors[f"{layer.name}.block_B"] @ tensors[f"{layer.name}.block_A"] @ sums


# -- mora and flylora ---------------------------------------------------------------------------------


def _mora(config: Config, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    """Input by input: behind the last one the first come again, up to a multiple of q."""
    size = int(((layer.d_in + layer.d_out) * config.method.rank) ** 0.5 + 0.5)
    outputs = tensors[f"{layer.name}.mora_R"][[place % size for place in range(layer.d_out)]]
    columns: list[Any] = [0.0] * layer.d_in
    for place in range(-(-layer.d_in // size) * size):
        columns[place % layer.d_in] = columns[place % layer.d_in] + outputs[:, place % size]
    return torch.stack(columns, 1)


def _flylora(config: Config, layer: Layer, tensors: Tensors, x: Tensor) -> Tensor:
    """Token by token: the k largest of |A x| count."""
    rank, active = config.method.rank, config.options(FlyLoraOptions).active
    b, shape = tensors[f"{layer.name}.fly_B"], (rank, layer.d_in)
    a = _basis(config, "flylora", layer.name, shape=shape, bound=3**0.5 / rank)
    order = Seeded(config.seed).uniform("flylora places", layer.name, shape=shape, bound=1.0)
    for row, drawn in zip(a, order, strict=True):
        kept = sorted(range(layer.d_in), key=drawn.__getitem__)[: max(1, layer.d_in * active // rank)]
        row[[place for place in range(layer.d_in) if place not in kept]] = 0.0
    rows = []
    for token in x:
        low = [row @ token for row in a]
        largest = sorted(range(rank), key=lambda one: -abs(low[one].item()))[:active]
        rows.append(_scale(config) * sum(low[one] * b[:, one] for one in largest))
    return torch.stack(rows)


# -- lora-experts -------------------------------------------------------------------------------------


def _routed(config: Config, layer: Layer, tensors: Tensors, x: Tensor) -> Tensor:
    """Token by token: each of the M largest outputs has its expert's update, by a softmax over those M."""
    a, b, router = (tensors[f"{layer.name}.{name}"] for name in ("expert_A", "expert_B", "router"))
    all_a, all_b, own = tensors[f"{layer.name}.expert_A_all"], tensors[f"{layer.name}.expert_B_all"], "experts.own"
    count, rows = len(all_a), []
    for token in x:
        outputs = [router[place] @ token for place in range(2 * count - 1)]
        largest = sorted(range(2 * count - 1), key=lambda place: -outputs[place].item())[:count]
        total = sum(outputs[place].exp() for place in largest)
        update = torch.zeros(layer.d_out, dtype=x.dtype)
        for place in largest:
            of_own = b @ (a @ token)
            if place < count:  # of an expert that is the client's own, the trained copy; in tests own may be any number
                is_own = tensors[own][place]
                of_own = is_own * of_own + (1 - is_own) * (all_b[place] @ (all_a[place] @ token))
            update = update + outputs[place].exp() / total * of_own
        rows.append(_scale(config) * update)
    return torch.stack(rows)


def _config(method: str, rank: int, alpha: float = 6.0) -> Config:
    return Config(method=MethodConfig(method, rank=rank, alpha=alpha))


FORMULAS = {
    "lora": Formula(_config("lora", 3), _lora),
    "mos": Formula(_config("mos", 4).with_options(MosOptions(budget=3, shards=2, private=1)), _mos),
    "s2-lora": Formula(
        _config("s2-lora", 3).with_options(S2Options(sparsity=0.05, orthogonality=0.02)),
        _s2,
        _s2_penalty,
        l1={"s": 0.05},
    ),
    "sora": Formula(_config("sora", 3).with_options(SoraOptions(sparsity=0.05)), _sora, l1={"g": 0.05}),
    "lora-sb": Formula(_config("lora-sb", 3), _lora_sb),
    "vera": Formula(_config("vera", 5, MethodConfig.alpha), _vera),
    "dora": Formula(_config("dora", 3), _lora, weight=_dora_weight),
    "dual-lora": Formula(_config("dual-lora", 3, alpha=3.0).with_options(DualLoraOptions(mix=0.3)), _dual_lora),
    "lora-experts": Formula(
        _config("lora-experts", 3, alpha=3.0).with_options(LoraExpertsOptions(max_experts=3)), None, added=_routed
    ),
    # Of a small scale: three heads of random numbers would saturate the loss, whose gradients are then rounding.
    "ravan": Formula(_config("ravan", 2, alpha=1.0).with_options(RavanOptions(heads=3)), _ravan),
    "nola": Formula(_config("nola", 3).with_options(NolaOptions(bases=5)), _nola),
    "randlora": Formula(_config("randlora", 3, alpha=1.0), _randlora),
    "uni-lora": Formula(
        _config("uni-lora", 3, MethodConfig.alpha).with_options(UniLoraOptions(length=40)),
        _uni_lora,
        start=3 * 0.02**2,  # of its only vector, which could not leave zero
    ),
    "block-lora": Formula(_config("block-lora", 3).with_options(BlockLoraOptions(blocks=2)), _block_lora),
    "flylora": Formula(_config("flylora", 4).with_options(FlyLoraOptions(active=2)), None, added=_flylora),
    "mora": Formula(_config("mora", 1, MethodConfig.alpha), _mora),
}


def update_of_layer(method: str, layers: Sequence[Layer], layer: Layer, tensors: Tensors) -> Any:
    """Return Delta W of a layer, [d_out, d_in], by a method's formula in its small configuration."""
    formula = FORMULAS[method]
    assert formula.update is not None, f"{method} has no one matrix for all tokens"
    return formula.update(formula.config, layers, layer, tensors)


def weight_of_layer(method: str, layers: Sequence[Layer], layer: Layer, base: Tensor, tensors: Tensors) -> Tensor:
    """Return the weight of a layer, [d_out, d_in], that a method makes of its base's."""
    return FORMULAS[method].weight(base, update_of_layer(method, layers, layer, tensors), layer, tensors)


def penalty(method: str, tensors: Tensors) -> Tensor:
    """Return what a method adds to a client's loss whatever its data."""
    formula = FORMULAS[method]
    return formula.penalty(formula.config, tensors)


# -- bytes --------------------------------------------------------------------------------------------

# Layers without a model: two projection types, three and two of them, neither square.
LAYERS = [
    *(Layer(f"m.{n}.q", 6, 10, bias=True, fan_in_fan_out=False) for n in range(3)),
    *(Layer(f"m.{n}.v", 8, 4, bias=False, fan_in_fan_out=True) for n in range(2)),
]


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
    # LISA at two blocks a round: of the three of LAYERS each is trained in two rounds of three.
    yield ("lisa", "lora"), (both(3) * 2 / 3, both(3), both(3) * 2 / 3)
    ranks, outputs = 5 * len(LAYERS), sum(layer.d_out for layer in LAYERS)
    for name, d, b_ in (("fedavg", 1, 1), ("ffa-lora", 0, 1), ("fedsa-lora", 1, 0)):
        yield (name, "vera"), (d * ranks + b_ * outputs,) * 3
        yield (name, "dora"), (d * a(3) + b_ * (b(3) + outputs),) * 3
    yield ("lisa", "vera"), ((ranks + outputs) * 2 / 3, ranks + outputs, (ranks + outputs) * 2 / 3)
    yield ("lisa", "dora"), ((both(3) + outputs) * 2 / 3, both(3) + outputs, (both(3) + outputs) * 2 / 3)
    yield ("rolora", "vera"), ((ranks + outputs) / 2, ranks + outputs, (ranks + outputs) / 2)
    yield ("rolora", "dora"), ((both(3) + outputs) / 2, both(3) + outputs, (both(3) + outputs) / 2)
    for name in ("zero-padding", "hetlora", "fed-plora", "lora-lego"):
        yield (name, "lora"), (both(3), both(3), both(3))
    yield ("dylora", "lora"), (both(2), both(2), both(2))  # rank 1, 2 and 3, each in one round of a cycle
    for name in ("flexlora", "lora-fair", "fedrot-lora"):
        yield (name, "lora"), (both(3), both(3), both(3))
    yield ("fedex-lora", "lora"), (both(3), both(3), both(3))  # and the residuals, which grow by round
    yield ("fed-sb", "lora-sb"), (9 * len(LAYERS),) * 3
    yield ("ravan", "ravan"), (3 * 5 * len(LAYERS), 3 * 4 * len(LAYERS), 3 * 4 * len(LAYERS))
    m = 5 * len(LAYERS)  # alpha, and as many of beta
    small = [min(layer.d_in, layer.d_out) for layer in LAYERS]
    counts = [-(-d // 3) for d in small]
    of_rank = 3 * sum(counts)  # lambda
    of_features = sum(n * d for n, d in zip(counts, small, strict=True))  # gamma
    for method, a_numbers, b_numbers in (("nola", m, m), ("randlora", of_features, of_rank)):
        whole = a_numbers + b_numbers
        yield ("fedavg", method), (whole, whole, whole)
        yield ("ffa-lora", method), (b_numbers, b_numbers, b_numbers)
        yield ("rolora", method), (whole / 2, whole, whole / 2)
        yield ("fedsa-lora", method), (a_numbers, a_numbers, a_numbers)
    whole = of_features + of_rank
    yield ("lisa", "randlora"), (whole * 2 / 3, whole, whole * 2 / 3)
    yield ("fedavg", "uni-lora"), (40, 40, 40)
    half, blocks = _each(0.5, 0)(3), _each(0.5, 1)(3)  # A of two blocks, and with B
    yield ("fedavg", "block-lora"), (blocks, blocks, blocks)
    yield ("ffa-lora", "block-lora"), (b(3), b(3), b(3))
    yield ("lisa", "block-lora"), (blocks * 2 / 3, blocks, blocks * 2 / 3)
    yield ("rolora", "block-lora"), (blocks / 2, blocks, blocks / 2)
    yield ("fedsa-lora", "block-lora"), (half, half, half)
    yield ("fedavg", "flylora"), (b(4), b(4), b(4))
    yield ("fedavg", "mora"), (3 * 4**2 + 2 * 3**2,) * 3  # squares of about as many numbers as LoRA of rank 1 has
    yield ("feddpa", "dual-lora"), (both(3), both(3), both(3))
    yield ("fedlease", "lora-experts"), (both(3), 3 * both(3), 3 * both(3))  # of three experts, from round 2 on
    yield ("florist", "lora"), (both(3), 0, 0)  # and what has been kept of the stack, see test_product_rules.py
    yield ("flora", "lora"), (both(3), 0, 0)  # and what has been stacked, which grows by round
    yield ("mos", "mos"), (both(3), both(3), both(3))
    yield ("mos-personal", "mos"), (both(2), both(2), both(2))
    s, bases = 3 * len(LAYERS), _bases(3)
    yield ("fedavg", "s2-lora"), (bases + s, bases + s, bases + s)
    yield ("s2-lora", "s2-lora"), (bases + s, bases + s, bases + s)
    yield ("s2-frozen", "s2-lora"), (s, s, s)
    yield ("s2-cyclic", "s2-lora"), ((bases + s) / 3, bases + s, (bases + s) / 3)
    yield ("s2-personal", "s2-lora"), (bases, bases, bases)
    gated = both(3) + s  # a gate for each rank of each layer
    yield ("fedavg", "sora"), (gated, gated, gated)
    yield ("zero-padding", "sora"), (gated, gated, gated)
    yield ("fedsa-lora", "sora"), (a(3), a(3), a(3))
    for method in methods_of("local"):
        yield ("local", method), (0, 0, 0)


BYTES = dict(_formulas())
