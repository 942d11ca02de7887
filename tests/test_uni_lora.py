"""Uni-LoRA: PEFT's own as the oracle, places that nobody sends, a start that is small and trains, and planted bugs.

The rest is in the matrix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import UniLoraConfig, get_peft_model
from peft.tuners.unilora import UniLoraModel
from safetensors.torch import load, save
from torch import Tensor, nn

from fedlora.config import ConfigError
from fedlora.exchange import Outcome
from fedlora.methods import LowRank, UniLora, build_method, count_parameters, initial_tensors, tensors_digest
from fedlora.methods.base import Layer
from fedlora.methods.factors import Factor
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.seeded import Seeded
from simulations.setup import resolve
from strategies import FedAvg, Local
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, engine_of, random_start, setting
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

ALL = frozenset({"theta", "head"})
PAIR = [Layer("up", 20, 26, True, False), Layer("down", 26, 20, True, False)]
WEIGHTS = "adapter_model.safetensors"


def uni(layers: list[Layer] = LAYERS, rank: int = 3, length: int = 40, seed: int = 0) -> UniLora:
    return UniLora(layers, rank=rank, length=length, seeded=Seeded(seed))


def products(method: UniLora, theta: Tensor) -> list[LowRank]:
    return [one for one in method.factors({"uni.theta": theta}).values() if isinstance(one, LowRank)]


# -- PEFT as the oracle -------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    """One layer with more outputs than inputs, and one with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 26), nn.Linear(26, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


@pytest.mark.parametrize(("rank", "length"), [(1, 7), (1, 92), (3, 50)])
def test_peft_gives_the_same_outputs_and_gradients(rank: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With our places in its order of entries, PEFT finds the same scales; float64. Places that come once, too."""
    torch.manual_seed(0)
    plain, method = TwoLayers().double(), uni(PAIR, rank, length)
    places = torch.from_numpy(method._order % length)
    monkeypatch.setattr(UniLoraModel, "generate_index", staticmethod(lambda count, d, seed: places[:count]))
    config = UniLoraConfig(r=rank, theta_d_length=length, target_modules=["up", "down"])
    theirs: Any = get_peft_model(TwoLayers().double(), config)
    held = theirs.base_model.unilora_theta_d["default"]
    held.data = torch.randn(length, dtype=torch.float64)
    ours = held.detach().clone().requires_grad_()
    for layer in ("up", "down"):
        module = theirs.base_model.model.get_submodule(layer)
        module.base_layer.load_state_dict(plain.get_submodule(layer).state_dict())
        for scales in (module.unilora_scales_A, module.unilora_scales_B):  # PEFT rounds them to float32
            scales["default"] = scales["default"].double().pow(-2).round().rsqrt()
    x = torch.randn(7, 20, dtype=torch.float64)
    up, down = products(method, ours)
    hidden = torch.tanh(plain.up(x) + x @ up.A.mT @ up.scaled_b().mT)
    y, expected = plain.down(hidden) + hidden @ down.A.mT @ down.scaled_b().mT, theirs(x)
    assert float((y - expected).detach().abs().max()) < 1e-12 * float(expected.detach().abs().max())
    assert float((y - plain(x)).detach().abs().max()) > 1e-2, "control: theta makes a difference"
    y.square().sum().backward()  # type: ignore[no-untyped-call]
    expected.square().sum().backward()
    assert ours.grad is not None
    assert float(ours.grad.abs().min()) > 0, "each number is used"
    assert float((ours.grad - held.grad).abs().max()) < 1e-12 * float(ours.grad.abs().max())


def test_places_are_as_even_as_pefts() -> None:
    for length in (7, 40, 216):
        own = np.bincount(uni(length=length)._order % length, minlength=length)
        theirs = np.bincount(UniLoraModel.generate_index(216, length, 0).numpy(), minlength=length)
        assert sorted(own) == sorted(theirs)


def test_theta_keeps_its_length_on_its_way_into_the_factors() -> None:
    """The projection is an isometry."""
    theta = torch.randn(2, 40, dtype=torch.float64)
    whole = sum(one.A.square().sum((-2, -1)) + one.B.square().sum((-2, -1)) for one in products(uni(), theta))
    assert torch.allclose(torch.as_tensor(whole), theta.square().sum(-1), rtol=1e-12)


# -- places and numbers -------------------------------------------------------------------------------


def test_places_are_of_the_run_and_of_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines compare them; plans of a large model do not draw them, and a device has them once."""
    one, same, other = (tensors_digest(uni(seed=seed).constants()) for seed in (0, 0, 1))
    assert one == same != other
    drawn: list[Any] = []
    whole = Seeded.permutation

    def noted(self: Seeded, *key: Any, size: int) -> Any:
        drawn.append(key)
        return whole(self, *key, size=size)

    monkeypatch.setattr(Seeded, "permutation", noted)
    wide = [Layer(f"l.{n}", 4096, 4096, False, False) for n in range(64)]
    for rank in (2, 16):
        assert count_parameters(uni(wide, rank, 256).specs()) == 256, "whatever the layers and the rank"
    assert drawn == []
    method = uni()
    with torch.inference_mode():
        products(method, torch.ones(40))
    theta = torch.ones(40, requires_grad=True)
    sum(one.A.sum() for one in products(method, theta)).backward()  # type: ignore[union-attr]
    assert drawn == [("uni-lora",)]


def test_it_starts_near_the_base_and_every_number_has_a_gradient() -> None:
    method = uni()
    start = initial_tensors(method.specs(), Seeded(0))["uni.theta"]
    assert 0.015 < np.abs(start).max() <= 0.02
    theta = torch.from_numpy(start).requires_grad_()
    updates = [one.B @ one.A for one in products(method, theta)]
    entries = 3 * sum(layer.d_in + layer.d_out for layer in LAYERS)
    most = max(float(one.detach().abs().max()) for one in updates)
    assert 0 < most <= 3 * 0.02**2 / (entries // 40)
    torch.manual_seed(0)
    sum((one * torch.randn_like(one)).sum() for one in updates).backward()  # type: ignore[union-attr]
    assert theta.grad is not None
    assert float(theta.grad.abs().min()) > 0


def test_planted_start_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """As LoRA's B: here no gradient would ever come."""
    whole = UniLora.specs
    monkeypatch.setattr(UniLora, "specs", lambda self: {n: replace(s, bound=0.0) for n, s in whole(self).items()})
    with pytest.raises(AssertionError, match=r"uni\.theta must not start at zero"):
        build_method(CONFIGS["uni-lora"], LAYERS, [])


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.alpha": 8.0}, r"method.alpha = 8.0: uni-lora has no scale alpha / r: leave it at its default"),
        ({"method.rslora": True}, r"method.rslora = True: uni-lora has no scale alpha / r"),
        ({"uni-lora.length": 0}, r"uni-lora.length = 0: must be at least 1"),
        ({"method.ranks": "uniform:2-4", "strategy.name": "local"}, r"method.ranks = .*is read by lora and sora only"),
        *(
            ({"strategy.name": name}, rf"method.name = 'uni-lora': strategy '{name}' works with")
            for name in ("ffa-lora", "rolora", "fedsa-lora", "fedsvd")
        ),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "uni-lora", **flat})


def test_numbers_that_no_entry_has_are_refused() -> None:
    assert len(uni(length=216)._order) == 216, "as many as entries: each has one of its own"
    with pytest.raises(ConfigError, match=r"uni-lora.length = 217: the A and B of all layers have 216 entries"):
        uni(length=217)


def test_no_mean_is_exact() -> None:
    assert FedAvg(setting("uni-lora")).exact is False
    assert Local(setting("uni-lora")).exact is None


# -- a worker, and an export --------------------------------------------------------------------------


def test_a_worker_trains_it_and_machines_compare_places(tmp_path: Path) -> None:
    keys = {"strategy.name": "fedavg", "method.name": "uni-lora", "uni-lora.length": 32}
    worker, other = tiny_worker(tmp_path, **keys), tiny_worker(tmp_path, **keys, seed=1)
    updates = ask(worker)
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert updates[0].tensors["uni.theta"].shape == (32,)
    assert b'"peft_type": "LORA"' in worker.export(updates[0].tensors)["adapter_config.json"]
    assert worker.describe().constants_digest != other.describe().constants_digest


def test_exported_as_a_lora_whose_loss_is_seen() -> None:
    engine = engine_of("uni-lora", "gpt2", "all-linear")
    tensors = random_start(engine)
    files = adapter_files(engine, tensors, CONFIGS["uni-lora"])
    assert check_adapter(engine, tensors, files) < 1e-12
    weights = load(files[WEIGHTS])
    last = next(name for name in weights if "lora_A" in name)
    spoiled = save({**weights, last: weights[last].flip(-1)})
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, {**files, WEIGHTS: spoiled})


# -- planted bugs -------------------------------------------------------------------------------------


def other_seed(self: UniLora) -> NDArray[np.int64]:
    """Places of another machine's seed."""
    return Seeded(1).permutation("uni-lora", size=self.entries)


def not_shuffled(self: UniLora) -> NDArray[np.int64]:
    return np.arange(self.entries, dtype=np.int64)


def by_mean_use(self: UniLora) -> NDArray[np.float64]:
    """One scale for all, as if each number were used equally often."""
    return np.full(self.length, (self.length / self.entries) ** 0.5)


def of_last_layer(self: UniLora, tensors: Any) -> dict[str, Factor]:
    """Entries dealt out from the last layer on."""
    return whole_factors(UniLora(self.layers[::-1], rank=self.rank, length=self.length, seeded=Seeded(0)), tensors)


whole_factors = UniLora.factors


@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("_order", property(other_seed)),
        ("_order", property(not_shuffled)),
        ("_scale", property(by_mean_use)),
        ("factors", of_last_layer),
    ],
)
def test_planted_bugs_are_seen(name: str, planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UniLora, name, planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("uni-lora", ALL, "bert")
