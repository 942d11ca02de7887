"""Random bases of NOLA, RandLoRA and VeRA; of the first two what trains, PEFT's RandLoRA as the oracle, planted bugs.

The rest is in the matrix, and of VeRA in ``test_vera.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import RandLoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlora.config import Config, ConfigError, MethodConfig
from fedlora.engine import Engine
from fedlora.methods import (
    METHODS,
    Nola,
    RandLora,
    ScaledBases,
    as_low_rank,
    build_method,
    count_parameters,
    initial_tensors,
    nola,
    randlora,
    tensors_digest,
    vera,
)
from fedlora.methods.base import Layer
from fedlora.methods.factors import Factor
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.runs.ranks import strengths
from fedlora.seeded import Seeded
from simulations.setup import resolve
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, engine_of, random_start
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

MODULES = {"nola": nola, "randlora": randlora, "vera": vera}
every = pytest.mark.parametrize("name", MODULES)
both = pytest.mark.parametrize("name", ["nola", "randlora"])
WEIGHTS = "adapter_model.safetensors"


def build(name: str, layers: list[Layer], rank: int = 3, seed: int = 0) -> Any:
    method = MethodConfig(name, rank=rank, alpha=MethodConfig.alpha if name == "vera" else 1.0)
    return METHODS[name].build(layers, Config(method=method, seed=seed))


def llama(count: int = 32) -> list[Layer]:
    return [
        Layer(f"l.{n}.{side}", *shape, False, False)
        for n in range(count)
        for side, shape in (("q", (4096, 4096)), ("up", (4096, 11008)), ("down", (11008, 4096)))
    ]


def whole_a(method: Nola) -> NDArray[Any]:
    """Return all bases of A of the first shape."""
    return method._fixed.on(torch.device("cpu"), "nola.10x6", "A").numpy()


# -- bases --------------------------------------------------------------------------------------------


@every
def test_bases_are_those_of_the_seed_and_numbers_that_bfloat16_holds(name: str) -> None:
    one, same, other = (build(name, LAYERS, seed=seed).constants() for seed in (0, 0, 1))
    assert tensors_digest(one) == tensors_digest(same) != tensors_digest(other), "what machines must agree on"
    if name == "nola":
        more = [whole_a(build("nola", LAYERS, seed=0)), one["nola.10x6.A"]]
        assert np.array_equal(more[0][:1], more[1]), "the first of them stands for all"
    for value in one.values():
        assert value.dtype == np.float32
        assert np.array_equal(torch.from_numpy(value).bfloat16().float().numpy(), value)
        assert len(np.unique(value)) > value.size / 8


@every
def test_bases_are_no_tensors_and_drawn_when_they_are_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Specs, plans and tables of a large model draw nothing; a device has the bases once, also after an evaluation."""
    for module in MODULES.values():
        monkeypatch.setattr(module, "random_basis", lambda *_, **__: pytest.fail("drawn"))
    specs = build(name, llama()).specs()
    assert all(spec.kind in ("A_alpha", "B_beta", "A_gamma", "B_lambda", "A_d", "B_b") for spec in specs.values())
    assert max(count_parameters({key: spec}) for key, spec in specs.items()) < 2**23
    monkeypatch.undo()
    method = build(name, LAYERS)
    tensors = {key: torch.tensor(value) for key, value in initial_tensors(method.specs(), Seeded(0)).items()}
    with torch.inference_mode():
        method.factors(tensors)
    for value in tensors.values():
        value.requires_grad_()
    draws: list[Any] = []
    for module in MODULES.values():
        monkeypatch.setattr(module, "random_basis", lambda *_, **__: draws.append(1))
    factors = [as_low_rank(one) for one in method.factors(tensors).values()]
    sum((one.scaled_b() @ one.A).sum() for one in factors if one is not None).backward()  # type: ignore[union-attr]
    assert not draws


@every
def test_planted_bases_of_another_seed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that draws other bases than the rest would send numbers that mean something else."""
    kinds = {
        "head",
        *{"nola": ("A_alpha", "B_beta"), "randlora": ("A_gamma", "B_lambda"), "vera": ("A_d", "B_b")}[name],
    }
    for module in MODULES.values():
        whole = module.random_basis
        monkeypatch.setattr(module, "random_basis", lambda _, *key, whole=whole, **own: whole(Seeded(1), *key, **own))
    with pytest.raises(AssertionError):
        packed_equals_sequential(name, frozenset(kinds), "bert")


@both
@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.rslora": True}, "method.rslora = true: is read by lora; {name} scales by alpha / rank"),
        (
            {"method.ranks": "uniform:2-8", "strategy.name": "local"},
            "method.ranks = .*: is read by lora and sora only, not by '{name}'",
        ),
        ({"method.ranks": "uniform:2-8", "strategy.name": "fedavg"}, "takes tensors of one shape from all clients"),
        ({"strategy.name": "fedsvd"}, "method.name = '{name}'"),
        ({"nola.bases": 0}, "nola.bases = 0: must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(name: str, flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.format(name=name)):
        resolve({"strategy.name": "fedavg", "method.name": name, **flat})


@every
def test_a_factor_that_is_fixed_at_zero_beside_one_that_trains_is_refused(name: str) -> None:
    """With lambda, or beta, never trained no other scale would have a gradient."""
    from fedlora.roles import Role
    from fedlora.strategy import Setting, Strategy

    class OnlyA(Strategy):
        name, methods, exact = "only-a", (), None

        def roles(self, kinds: Any, server_round: int) -> Any:
            return {kind: Role.SHARED if kind[0] == "A" else Role.FROZEN for kind in kinds}

    with pytest.raises(ValueError, match="is fixed at zero: nothing would be learned"):
        OnlyA(Setting(build(name, LAYERS).specs()))


# -- nola ---------------------------------------------------------------------------------------------


def test_nola_trains_two_numbers_a_base_and_layer_whatever_rank_and_shape() -> None:
    for rank in (2, 16):
        assert count_parameters(build("nola", llama(), rank).specs()) == 2 * 256 * len(llama())


def test_nola_starts_with_a_as_lora_does_and_apart_by_layer() -> None:
    """A's numbers have the variance of LoRA's, 1 / (3 d_in); layers of one shape have bases, but no A, in common."""
    layers = [Layer(f"l.{n}.q", 64, 48, False, False) for n in range(2)]
    method = build("nola", layers, rank=8)
    tensors = initial_tensors(method.specs(), Seeded(0))
    first, second = (
        as_low_rank(one) for one in method.factors({n: torch.tensor(v) for n, v in tensors.items()}).values()
    )
    assert first is not None
    assert second is not None
    assert float(first.A.var() * 3 * 64) == pytest.approx(1.0, abs=0.2)
    assert float((first.A - second.A).var()) > float(first.A.var())
    assert not first.B.any()


def test_planted_coefficients_that_all_start_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the authors' code without its fixed A: no gradient would ever come."""
    whole = Nola.specs
    monkeypatch.setattr(Nola, "specs", lambda self: {n: replace(s, bound=0.0) for n, s in whole(self).items()})
    with pytest.raises(AssertionError, match="one must start at zero"):
        build_method(CONFIGS["nola"], LAYERS, [])


# -- randlora -----------------------------------------------------------------------------------------


def test_randlora_trains_fewer_numbers_at_a_higher_rank() -> None:
    layer = [Layer("q", 384, 384, True, False)]
    numbers = {rank: count_parameters(build("randlora", layer, rank).specs()) for rank in (8, 32, 64)}
    assert numbers == {8: 384 + 48 * 384, 32: 384 + 12 * 384, 64: 384 + 6 * 384}


def test_an_update_of_randlora_has_full_rank() -> None:
    for layer, one in randoms(build("randlora", LAYERS)).items():
        update = (one.product()[1] @ one.product()[0]).detach()
        values = torch.linalg.svdvals(update)
        assert len(values) == min(update.shape)
        assert float(values[-1]) > 1e-3 * float(values[0]), layer


def randoms(method: RandLora, groups: int = 0) -> dict[str, ScaledBases]:
    """Return a method's factors of random scales, for so many groups."""
    draw = torch.Generator().manual_seed(0)
    lead = (groups,) if groups else ()
    tensors = {
        name: torch.randn(*lead, *spec.shape, generator=draw, dtype=torch.float64).requires_grad_()
        for name, spec in method.specs().items()
    }
    return {name: one for name, one in method.factors(tensors).items() if isinstance(one, ScaledBases)}


class TwoLayers(nn.Module):
    """One layer with more outputs than inputs, and one with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 26), nn.Linear(26, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


@pytest.mark.parametrize("rank", [1, 3, 20, 25])
def test_peft_gives_the_same_outputs_gradients_and_start(rank: int) -> None:
    """Of one basis, and of more than are computed at once; ranks that divide the features, or exceed them."""
    torch.manual_seed(0)
    plain = TwoLayers().double()
    layers = [Layer("up", 20, 26, True, False), Layer("down", 26, 20, True, False)]
    method = RandLora(layers, rank=rank, alpha=5.0, seeded=Seeded(3))
    config = RandLoraConfig(r=rank, randlora_alpha=5, target_modules=["up", "down"])
    theirs: Any = get_peft_model(TwoLayers().double(), config)
    parameters = dict(theirs.named_parameters())
    ours: dict[str, Tensor] = {}
    for name, value in initial_tensors(method.specs(), Seeded(0)).items():
        held = parameters[f"base_model.model.{name}.default"]
        assert torch.allclose(held.detach(), torch.tensor(value)), f"{name}: the start"
        held.data = held.detach().double() + torch.randn(held.shape, dtype=torch.float64) / 20
        ours[name] = held.detach().clone().requires_grad_()
    for side, value in method.constants().items():
        getattr(theirs.base_model, f"randlora_{side}")["default"] = torch.from_numpy(value).double()
    for layer in ("up", "down"):
        module, base = theirs.base_model.model.get_submodule(layer), plain.get_submodule(layer)
        module.base_layer.load_state_dict(base.state_dict())
    x = torch.randn(7, 20, dtype=torch.float64)
    factors = method.factors(ours)
    up, down = (one for one in factors.values() if isinstance(one, ScaledBases))
    hidden = torch.tanh(plain.up(x) + up.of(x))
    y, expected = plain.down(hidden) + down.of(hidden), theirs(x)
    off = (y - expected).detach().abs().max()
    assert float(off) < 1e-12 * float(expected.detach().abs().max())
    assert float((y - plain(x)).detach().abs().max()) > 1e-3, "control: the scales make a difference"
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    expected.square().sum().backward()
    for name, value in ours.items():
        grad = parameters[f"base_model.model.{name}.default"].grad
        assert value.grad is not None
        assert grad is not None
        assert float(grad.abs().max()) > 1e-6
        assert float((value.grad - grad).abs().max()) < 1e-12 * float(grad.abs().max()), name


def held_for_the_backward_pass(one: Iterable[Any], x: Tensor, of: Any) -> int:
    """Return the numbers that a pass keeps, beside what it is given: each storage once."""
    given = {value.untyped_storage().data_ptr() for value in (x, *one) if isinstance(value, Tensor)}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes() // value.element_size()
        held.append(value)  # so that no address is used again
        return value

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        of(x)
    return sum(kept.values())


def whole(one: ScaledBases) -> Any:
    """The planted bug, PEFT's way: a factor with d x d numbers for each group."""

    def of(x: Tensor) -> Tensor:
        a, b = one.product()
        return (x @ a.mT) @ b.mT

    return of


@pytest.mark.parametrize("shape", [(64, 72), (72, 64)])
def test_a_pass_of_randlora_keeps_nothing_of_a_layers_size_for_a_group(shape: tuple[int, int]) -> None:
    """Under DP a row is a group: what is kept grows by its tokens, of which there are four, not by d x d = 4,096."""
    groups, tokens = 6, 4
    (one,) = randoms(build("randlora", [Layer("q", *shape, False, False)], rank=4), groups).values()
    x = torch.randn(groups, tokens, shape[0], dtype=torch.float64)
    assert held_for_the_backward_pass(one, x, one.of) <= 3 * groups * tokens * 72
    assert held_for_the_backward_pass(one, x, whole(one)) > groups * 64 * 64
    assert torch.allclose(one.of(x), whole(one)(x), rtol=1e-10, atol=1e-10)


def rank_by_rank(self: RandLora, side: str, small: int, large: int = 0) -> Any:
    """A planted bug: columns of a basis side by side, as in the paper, where PEFT takes every N-th."""
    part = self.constants()[side]
    if side == "A":
        return np.ascontiguousarray(part[:, 0, :small])
    return np.ascontiguousarray(part[:large, : -(-small // self.rank)]).reshape(large, -1)


def test_planted_bases_in_another_order_than_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains as well, and is another model in PEFT."""
    monkeypatch.setattr(RandLora, "_part", rank_by_rank)
    engine = engine_of("randlora", "bert")
    tensors = random_start(engine)
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, adapter_files(engine, tensors, CONFIGS["randlora"]))


def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Engine:
    from tools import model_table

    tiny = model_table.tiny_model
    monkeypatch.setattr(model_table, "tiny_model", lambda family: tiny(family).to(torch.bfloat16))
    engine, _ = model_table.engine_of("BERT")
    method = build_method(CONFIGS["randlora"], engine.base.structure.adapted, engine.base.structure.head)
    return replace(engine, method=method)


@pytest.mark.parametrize("lost", ["randlora_lambda", "randlora_gamma", "randlora_B"])
def test_an_adapter_of_randlora_is_checked_in_16_bits_too(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large scales, whose losses in 16 bits say little: then the numbers decide. Planted: one is another."""
    engine = in_bfloat16(monkeypatch)
    tensors = {name: 8 * value for name, value in random_start(engine).items()}
    files = adapter_files(engine, tensors, CONFIGS["randlora"])
    check_adapter(engine, tensors, files)
    weights = load(files[WEIGHTS])
    assert all(value.dtype == torch.bfloat16 for name, value in weights.items() if name.endswith(("lora_A", "lora_B")))
    spoiled = save({name: value.roll(1, -1) if lost in name else value for name, value in weights.items()})
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, {**files, WEIGHTS: spoiled})


def test_strengths_of_a_sum_of_bases() -> None:
    """A component for each of the N r columns, whose norm is that of its outer product."""
    method = build("randlora", LAYERS)
    factors: Mapping[str, Factor] = randoms(method)
    for name, values in strengths(factors).items():
        one = factors[name]
        assert isinstance(one, ScaledBases)
        a, b = one.product()
        assert values == pytest.approx([float(torch.outer(b[:, i], a[i]).detach().norm()) for i in range(len(a))])
