"""DoRA: PEFT's own as the oracle, norms without whole matrices, and planted bugs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from fedlora.config import ConfigError
from fedlora.engine import layers as engine_layers
from fedlora.engine.decomposed import gain, squared_norms, weight_of
from fedlora.engine.layers import GroupedLayer
from fedlora.engine.layout import Layout
from fedlora.exchange import Outcome
from fedlora.methods import Dora, LowRank, WeightDecomposed, initial_tensors
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.seeded import Seeded
from simulations.setup import resolve
from strategies import FedAvg, FFALora, RoLoRA
from tests.support.families import random_examples, small_model, without_float32
from tests.support.matrix import CONFIGS, MODELS, engine_of, random_start, setting
from tests.support.peft_oracle import by_engine, by_peft, same
from tests.support.tiny import save_tiny_model
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential
from tests.test_matrix_server import test_mean_of_updates as mean_of_updates

ALL = frozenset({"A", "B", "B_m", "head"})


# -- PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_are_those_of_peft(family: str, targets: str) -> None:
    """The norm is a constant in gradients, the bias is not scaled, Conv1D is turned; float64."""
    engine = engine_of("dora", family, targets)
    start = random_start(engine)

    def place(layer: Any, own: str, value: Tensor) -> nn.Parameter:
        if own == "lora_magnitude":
            parameter = layer.lora_magnitude_vector["default"].weight
            value = torch.linalg.norm(weight_of(layer.get_base_layer()), dim=1) + value
        else:
            parameter = getattr(layer, own)["default"].weight
        parameter.copy_(value)
        return parameter  # type: ignore[no-any-return]

    config = LoraConfig(r=3, lora_alpha=6.0, use_dora=True)
    same(by_engine(engine, family, start), by_peft(engine, family, config, start, place))


@pytest.mark.parametrize("family", MODELS)
def test_starts_as_its_base_to_the_bit(family: str) -> None:
    engine = engine_of("dora", family, "all-linear")
    start = initial_tensors(engine.method.specs(), Seeded(0))
    batch = engine.task.collate(random_examples(4, 1, family=family), range(4), engine.device)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    factors = engine.method.factors({name: engine.tensor(value) for name, value in start.items()})
    adapted = {layer.name for layer in engine.base.structure.adapted}
    plain = {
        name: LowRank(one.update.A, torch.zeros_like(one.update.B), 1.0) if isinstance(one, WeightDecomposed) else one
        for name, one in factors.items()
    }
    logits = []
    for each in (factors, plain):
        assert {name for name, one in factors.items() if isinstance(one, WeightDecomposed)} == adapted
        with torch.no_grad(), engine.grouped.placed(each, Layout(1, 4, None)) as model:
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


# -- norms --------------------------------------------------------------------------------------------


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layer_of(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    """A layer of 12 outputs and 20 inputs."""
    layer = kind(20, 12) if kind is nn.Linear else Conv1D(12, 20)
    layer.weight.data = drawn(*layer.weight.shape, seed=5)
    return layer.to(dtype)


def slow_gain(weight: Tensor, factor: WeightDecomposed) -> Tensor:
    """The formula, with a whole matrix for each group."""
    whole = weight + factor.update.scaled_b() @ factor.update.A
    return (weight.norm(dim=1) + factor.magnitude) / whole.norm(dim=-1)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("common_a", [False, True])
def test_gain_equals_the_plain_formula(kind: type[nn.Module], common_a: bool) -> None:
    base = layer_of(kind)
    a, b, m = drawn(20 * 3).view(3, 20) if common_a else drawn(7, 3, 20), drawn(7, 12, 3, seed=1), drawn(7, 12, seed=2)
    factor = WeightDecomposed(LowRank(a, b, 0.7), m)
    found = gain(base, squared_norms(base, "q"), factor)
    assert found.shape == (7, 12)
    torch.testing.assert_close(found, slow_gain(weight_of(base), factor), rtol=1e-13, atol=0)
    assert weight_of(base).shape == (12, 20)


def test_gain_of_16_bits_is_within_their_rounding() -> None:
    base = layer_of(nn.Linear, torch.bfloat16)
    factor = WeightDecomposed(LowRank(drawn(4, 3, 20), 0.3 * drawn(4, 12, 3, seed=1), 1.0), 0.1 * drawn(4, 12, seed=2))
    found = gain(base, squared_norms(base, "q"), factor)
    assert found.dtype == torch.float32
    expected = slow_gain(weight_of(base).double(), factor)
    assert float((found / expected - 1).abs().max()) < 0.02, "factors lose up to one part in 256"


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has which is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.most = max(self.most, made.numel())
        return made


def test_no_group_has_a_whole_matrix() -> None:
    groups, rank, d_in, d_out = 64, 2, 50, 40
    base = nn.Linear(d_in, d_out).double().requires_grad_(False)
    tensors = drawn(groups, rank, d_in), drawn(groups, d_out, rank), drawn(groups, d_out)
    a, b, m = (value.requires_grad_() for value in tensors)
    squares = squared_norms(base, "q")
    with Largest() as seen:
        gain(base, squares, WeightDecomposed(LowRank(a, b, 1.0), m)).sum().backward()  # type: ignore[no-untyped-call]
        assert m.grad is not None
        assert a.grad is None, "the norm is a constant"
    assert seen.most == groups * rank * max(d_in, d_out)
    assert seen.most < groups * d_in * d_out / 10
    with Largest() as control:
        slow_gain(base.weight, WeightDecomposed(LowRank(a, b, 1.0), m))
    assert control.most == groups * d_in * d_out


def test_outputs_without_a_weight_are_refused() -> None:
    """PEFT divides zero by zero there, and every number of the model is then NaN."""
    engine = engine_of("dora", "bert")
    name = engine.base.structure.adapted[0].name
    layer: Any = engine.grouped.model.get_submodule(name)
    layer.base.weight.data[3] = 0.0
    factors = engine.method.factors({k: engine.tensor(v) for k, v in random_start(engine).items()})
    message = rf"method.name = 'dora': {name} has 1 outputs whose weights are all zero.*method.target-modules"
    with pytest.raises(ValueError, match=message), engine.grouped.placed(factors, Layout(1, 1, None)):
        pass


def test_a_weight_that_cannot_be_read_is_refused() -> None:
    class Packed(nn.Linear):
        weight = property(lambda self: (_ for _ in ()).throw(NotImplementedError("packed")))  # type: ignore[assignment]

    base = nn.Linear(3, 4)
    base.__class__ = Packed
    with pytest.raises(ValueError, match=r"the weight of q \(Packed\), whose norms it needs, cannot be read; choose"):
        squared_norms(base, "q")


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.rslora": True}, r"method.rslora = true: is read by lora"),
        (
            {"method.ranks": "uniform:2-4", "strategy.name": "local"},
            r"method.ranks = 'uniform:2-4': .*is read by lora and sora only",
        ),
        ({"strategy.name": "flora"}, r"method.name = 'dora': strategy 'flora' works with lora"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "dora", **flat})


# -- strategies ---------------------------------------------------------------------------------------


def test_no_strategy_is_exact() -> None:
    """The norm makes of an update that is linear in B one that is not."""
    for strategy in (FFALora, RoLoRA, FedAvg):
        assert not strategy(setting("dora")).exact
    assert FFALora(setting("lora")).exact
    assert RoLoRA(setting("lora")).exact
    roles = RoLoRA(setting("dora")).roles_in_turn()
    assert roles["B_m"] == roles["B"], "the magnitude is trained with B"


def test_planted_mean_of_frozen_a_taken_for_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    mean_of_updates("ffa-lora", "dora", (), "equal")
    monkeypatch.setattr(FFALora, "__init__", lambda self, setting: setattr(self, "setting", setting))
    assert FFALora(setting("dora")).exact
    with pytest.raises(AssertionError):
        mean_of_updates("ffa-lora", "dora", (), "equal")


# -- export -------------------------------------------------------------------------------------------


def test_a_layer_of_which_only_the_magnitude_has_moved_is_exported(tmp_path: Path) -> None:
    engine = engine_of("dora", "bert")
    start = initial_tensors(engine.method.specs(), Seeded(0))
    name = f"{engine.base.structure.adapted[1].name}.lora_magnitude"
    tensors = {**start, name: start[name] + 0.3}
    files = adapter_files(engine, tensors, CONFIGS["dora"])
    assert check_adapter(engine, tensors, files) < 1e-12
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    loaded = PeftModel.from_pretrained(without_float32(small_model("bert")), str(tmp_path))
    assert loaded.peft_config["default"].use_dora
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        off = loaded(input_ids=ids).logits - small_model("bert")(input_ids=ids).logits
    assert float(off.abs().max()) > 1e-4


@pytest.mark.parametrize("planted", ["lost", "difference"])
def test_an_adapter_with_a_wrong_magnitude_is_not_finished(planted: str) -> None:
    """It is left out, which PEFT fills in by itself; or what is trained is taken for m."""
    engine = engine_of("dora", "bert")
    tensors = random_start(engine)
    files = adapter_files(engine, tensors, CONFIGS["dora"])
    weights = load(files["adapter_model.safetensors"])
    name = next(name for name in weights if name.endswith("lora_magnitude_vector"))
    layer = name.removeprefix("base_model.model.").removesuffix("_vector")
    del weights[name]
    if planted == "difference":
        weights[name] = torch.from_numpy(tensors[layer])
    with pytest.raises(ExportError, match=r"does not give in PEFT what it gives here|cannot be loaded in PEFT"):
        check_adapter(engine, tensors, {**files, "adapter_model.safetensors": save(weights)})


def test_a_worker_exports_what_it_trains(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.name": "dora"})
    updates = ask(worker)
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert any(np.any(value) for name, value in updates[0].tensors.items() if name.endswith("magnitude"))
    assert b'"use_dora": true' in worker.export(updates[0].tensors)["adapter_config.json"]


def test_a_worker_refuses_a_base_without_a_norm_before_it_trains(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "pruned")
    file = Path(folder, "model.safetensors")
    weights = load(file.read_bytes())
    name = next(name for name in weights if name.endswith("attention.self.query.weight"))
    weights[name][2] = 0.0
    file.write_bytes(save(weights, {"format": "pt"}))
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.name": "dora", "model.name": folder})
    with pytest.raises(ValueError, match=r"query has 1 outputs whose weights are all zero in the base model"):
        worker.loaded  # noqa: B018


# -- planted bugs in the engine -----------------------------------------------------------------------


def through_the_norm(base: nn.Module, squares: Tensor, factor: WeightDecomposed) -> Tensor:
    """Gradients go through the norm, too."""
    return slow_gain(weight_of(base), factor)


def of_the_base(base: nn.Module, squares: Tensor, factor: WeightDecomposed) -> Tensor:
    """The norm stays that of the base."""
    return (squares.sqrt() + factor.magnitude) / squares.sqrt()


def without_the_cross_term(base: nn.Module, squares: Tensor, factor: WeightDecomposed) -> Tensor:
    """As if A were orthogonal to the base's rows."""
    with torch.no_grad():
        norm = (squares + (factor.update.scaled_b() @ factor.update.A).square().sum(-1)).sqrt()
    return (squares.sqrt() + factor.magnitude) / norm


@pytest.mark.parametrize("planted", [through_the_norm, of_the_base, without_the_cross_term])
def test_planted_norms_are_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_equals_sequential("dora", ALL, "bert")
    monkeypatch.setattr(engine_layers, "gain", planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("dora", ALL, "bert")


def test_planted_bias_that_is_scaled_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: GroupedLayer, y: Tensor) -> Tensor:
        assert self.layout is not None
        assert self._gain is not None
        return self.layout.to_rows(self.layout.to_groups(y) * self._gain.unsqueeze(-2), y)

    monkeypatch.setattr(GroupedLayer, "_at_magnitude", scaled)
    with pytest.raises(AssertionError):
        packed_equals_sequential("dora", ALL, "bert")


def test_planted_magnitude_in_place_of_its_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that does not start as its base."""
    specs = Dora.specs

    def at_one(self: Dora) -> Any:
        return {name: replace(s, start=1.0) if s.kind == "B_m" else s for name, s in specs(self).items()}

    test_starts_as_its_base_to_the_bit("bert")
    monkeypatch.setattr(Dora, "specs", at_one)
    with pytest.raises(AssertionError):
        test_starts_as_its_base_to_the_bit("bert")


def test_nothing_of_a_pass_stays_in_a_layer() -> None:
    engine = engine_of("dora", "bert")
    layer: Any = engine.grouped.model.get_submodule(engine.base.structure.adapted[0].name)
    factors = engine.method.factors({name: engine.tensor(value) for name, value in random_start(engine).items()})
    with engine.grouped.placed(factors, Layout(1, 1, None)):
        assert layer._gain is not None
    assert layer._gain is None


def test_norms_that_an_evaluation_measured_can_be_trained_with() -> None:
    base = layer_of(nn.Linear).requires_grad_(False)
    layer = GroupedLayer(base, "q")
    m = drawn(1, 12).requires_grad_()
    layer.factor = WeightDecomposed(LowRank(drawn(1, 3, 20), drawn(1, 12, 3), 1.0), m)
    layer.layout = Layout.of(np.zeros(2, dtype=np.int64), 1, torch.device("cpu"))
    with torch.inference_mode():
        layer.settle()
    layer.settle()
    layer(drawn(2, 4, 20)).sum().backward()
    assert m.grad is not None
