"""VeRA: PEFT's own as the oracle, the shared matrices that nobody sends, and planted bugs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import VeraConfig
from safetensors.torch import load

from fedlora.config import Config, ConfigError, MethodConfig
from fedlora.exchange import Outcome
from fedlora.methods import LowRank, Vera, build_method, count_parameters, initial_tensors, tensors_digest
from fedlora.methods.base import Layer
from fedlora.methods.factors import Factor
from fedlora.models import inspect
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.seeded import Seeded
from simulations.setup import resolve
from strategies import FFALora, RoLoRA
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, MODELS, engine_of, random_start, setting
from tests.support.peft_oracle import by_engine, by_peft, same
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

ALL = frozenset({"A_d", "B_b", "head"})


def vera(layers: list[Layer] = LAYERS, rank: int = 5, seed: int = 0) -> Vera:
    return Vera(layers, rank=rank, d_initial=0.1, seeded=Seeded(seed))


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", MODELS)
def test_outputs_and_gradients_are_those_of_peft(family: str, targets: str) -> None:
    """Layers of several shapes take their parts of A and B; float64."""
    engine = engine_of("vera", family, targets)
    start = random_start(engine)
    fixed = engine.method.constants()

    def place(layer: Any, own: str, value: torch.Tensor) -> torch.nn.Parameter:
        for buffers, whole in ((layer.vera_A, fixed["A"]), (layer.vera_B, fixed["B"])):
            assert buffers["default"].shape == whole.shape
            buffers["default"] = torch.from_numpy(whole).double()
        parameter = getattr(layer, own.replace("vera_", "vera_lambda_"))["default"]
        parameter.copy_(value)
        return parameter  # type: ignore[no-any-return]

    same(by_engine(engine, family, start), by_peft(engine, family, VeraConfig(r=5), start, place))


def test_a_and_b_are_of_the_run_and_of_no_tensor() -> None:
    method, other = vera(), vera(seed=1)
    assert {spec.kind for spec in method.specs().values()} == {"A_d", "B_b"}
    drawn, again = method.constants(), vera().constants()
    assert (drawn["A"].shape, drawn["B"].shape) == ((5, 8), (10, 5))
    assert tensors_digest(drawn) == tensors_digest(again) != tensors_digest(other.constants()), "machines would see it"
    wide = vera([Layer("wide", 600, 400, bias=True, fan_in_fan_out=False)], rank=100).constants()
    for side, bound in (("A", math.sqrt(6 / 600)), ("B", math.sqrt(6 / 100))):
        assert abs(float(np.abs(wide[side]).max()) / bound - 1) < 0.01
        assert abs(float(wide[side].std()) / (bound / math.sqrt(3)) - 1) < 0.02
    start = initial_tensors(method.specs(), Seeded(0))
    assert all(np.all(value == (0.1 if name.endswith("_d") else 0.0)) for name, value in start.items())


def test_clients_of_a_pack_have_one_a_and_one_b() -> None:
    """Whatever the number of groups: rank 256 on 64 clients would else be gigabytes a layer."""
    method = vera()
    tensors = {name: torch.zeros(64, *spec.shape) for name, spec in method.specs().items()}
    factors = method.factors(tensors)
    q, v = factors["m.0.q"], factors["m.1.v"]
    assert isinstance(q, LowRank)
    assert isinstance(v, LowRank)
    assert (q.A.shape, q.B.shape) == ((5, 6), (10, 5))
    assert (v.A.shape, v.B.shape) == ((5, 8), (4, 5))
    again = factors["m.2.q"]
    assert isinstance(again, LowRank)
    assert again.A is q.A, "layers of one size have one, too"


def test_parameters_of_the_paper() -> None:
    """RoBERTa base at r = 1,024, above its 768 features, and large at 256: 0.043 and 0.061 million."""
    for sizes, rank, count in (((768, 12, 12, 3072), 1024, 43_008), ((1024, 24, 16, 4096), 256, 61_440)):
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        config = transformers.RobertaConfig(**dict(zip(names, sizes, strict=True)))
        with torch.device("meta"):
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        adapted = inspect(model, "query,value", has_head=True).adapted
        method = build_method(Config(method=MethodConfig("vera", rank=rank)), adapted, [])
        assert count_parameters(method.specs()) == count


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.alpha": 8.0}, r"method.alpha = 8.0: vera has no scale alpha / r: leave it at its default"),
        ({"method.rslora": True}, r"method.rslora = True: vera has no scale alpha / r"),
        ({"vera.d-initial": 0.0}, r"vera.d-initial = 0.0: must be greater than 0"),
        (
            {"method.ranks": "uniform:2-4", "strategy.name": "local"},
            r"method.ranks = 'uniform:2-4': .*is read by lora and sora only",
        ),
        ({"strategy.name": "fedsvd"}, r"method.name = 'vera': strategy 'fedsvd' works with lora"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "vera", **flat})


def test_one_vector_at_a_time_is_exact() -> None:
    """What strategies do with A and B they do with d and b."""
    assert FFALora(setting("vera")).exact
    assert RoLoRA(setting("vera")).exact
    roles = RoLoRA(setting("vera")).roles_in_turn()
    assert [role.value for role in roles["B_b"]] == ["shared", "broadcast"]
    assert [role.value for role in roles["A_d"]] == ["broadcast", "shared"]


def test_exported_as_vera(tmp_path: Path) -> None:
    """With A and B, and without a LoRA's 2 r numbers a feature; a lost vector, or PEFT's own A and B, are seen."""
    from safetensors.torch import save

    engine = engine_of("vera", "gpt2", "all-linear")
    tensors = random_start(engine)
    files = adapter_files(engine, tensors, CONFIGS["vera"])
    assert b'"peft_type": "VERA"' in files["adapter_config.json"]
    weights = load(files["adapter_model.safetensors"])
    assert weights["base_model.vera_A"].dtype == torch.bfloat16
    assert check_adapter(engine, tensors, files) < 1e-12
    last = next(name for name in weights if name.endswith("vera_lambda_b"))
    for name in (last, "base_model.vera_A"):
        planted = save({**weights, name: weights[name].flip(-1)})
        with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
            check_adapter(engine, tensors, {**files, "adapter_model.safetensors": planted})


def test_a_worker_exports_what_it_trains_and_machines_compare_a_and_b(tmp_path: Path) -> None:
    keys = {"strategy.name": "fedavg", "method.name": "vera", "method.rank": 6}
    worker, other = tiny_worker(tmp_path, **keys), tiny_worker(tmp_path, **keys, seed=1)
    updates = ask(worker)
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert {name.rsplit(".", 1)[-1] for name in updates[0].tensors} == {"vera_d", "vera_b", "weight", "bias"}
    files = worker.export(updates[0].tensors)
    assert b'"peft_type": "VERA"' in files["adapter_config.json"]
    assert worker.describe().constants_digest != other.describe().constants_digest


# -- planted bugs -------------------------------------------------------------------------------------


def own_matrices(self: Vera, tensors: Any) -> dict[str, Factor]:
    """Each layer draws an A of its own."""
    found = dict(whole_factors(self, tensors))
    for name, one in found.items():
        assert isinstance(one, LowRank)
        drawn = Seeded(0).uniform("vera", name, shape=tuple(one.A.shape), bound=0.5)
        found[name] = one._replace(A=torch.from_numpy(drawn))
    return found


def last_rows(self: Vera, tensors: Any) -> dict[str, Factor]:
    """A narrow layer takes the last rows of B, or rows in another order."""
    found = dict(whole_factors(self, tensors))
    return {name: one._replace(B=one.B.flip(0)) for name, one in found.items() if isinstance(one, LowRank)}


def without_d(self: Vera, tensors: Any) -> dict[str, Factor]:
    """One number for all ranks in place of d."""
    found = dict(whole_factors(self, tensors))
    return {
        name: one._replace(scale=one.scale.mean(-1, keepdim=True))
        for name, one in found.items()
        if isinstance(one, LowRank) and isinstance(one.scale, torch.Tensor)
    }


whole_factors = Vera.factors


@pytest.mark.parametrize("planted", [own_matrices, last_rows, without_d])
def test_planted_bugs_are_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed_equals_sequential("vera", ALL, "bert")
    monkeypatch.setattr(Vera, "factors", planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("vera", ALL, "bert")
