"""Block-LoRA: one block of A on the sum of the input's parts, refused shapes, its export, and planted bugs.

The rest is in the matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from fedlora.config import ConfigError
from fedlora.exchange import Outcome
from fedlora.methods import BlockLora, Lora, LowRank, build_method, count_parameters, initial_tensors
from fedlora.methods.base import Layer
from fedlora.methods.factors import Factor
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.seeded import Seeded
from simulations.setup import resolve
from strategies import FedAvg, FedSALora, FFALora, RoLoRA
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, engine_of, random_start, setting
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

ALL = frozenset({"A", "B", "head"})
WEIGHTS = "adapter_model.safetensors"


def block(layers: list[Layer] = LAYERS, rank: int = 3, blocks: int = 2) -> BlockLora:
    return BlockLora(layers, rank=rank, alpha=6.0, blocks=blocks)


def test_a_block_acts_on_the_sum_of_the_parts() -> None:
    """For two clients at once: B A_s (x_1 + x_2 + x_3), divided by nothing."""
    torch.manual_seed(0)
    method = block([Layer("l", 12, 5, False, False)], rank=2, blocks=3)
    a, b = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    one = method.factors({"l.block_A": a, "l.block_B": b})["l"]
    assert isinstance(one, LowRank)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    expected = 3.0 * (x[..., :4] + x[..., 4:8] + x[..., 8:]) @ a.mT @ b.mT
    assert torch.allclose(x @ one.A.mT @ one.scaled_b().mT, expected, rtol=1e-12, atol=1e-12)


def test_one_block_is_lora_and_more_start_with_numbers_of_its_size() -> None:
    lora = Lora(LAYERS, rank=3, alpha=6.0, rslora=False)
    whole, one = (initial_tensors(method.specs(), Seeded(0)) for method in (lora, block(blocks=1)))
    assert [value.shape for value in whole.values()] == [value.shape for value in one.values()]
    assert lora.scale == block().scale
    bounds = [{spec.kind + name[:3]: spec.bound for name, spec in each.specs().items()} for each in (lora, block())]
    assert bounds[0] == bounds[1], "by the whole of a layer's inputs"


def test_numbers_of_a_layer() -> None:
    """r (d_in / n + d_out): those of RoBERTa-large's queries."""
    layer = [Layer("q", 1024, 1024, True, False)]
    numbers = {n: count_parameters(block(layer, rank=8, blocks=n).specs()) for n in (1, 2, 8)}
    assert numbers == {1: 8 * 2048, 2: 8 * 1536, 8: 8 * 1152}


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"block-lora.blocks": 0}, r"block-lora.blocks = 0: must be at least 1"),
        ({"method.rslora": True}, r"method.rslora = true: is read by lora; block-lora scales by alpha / rank"),
        ({"method.ranks": "uniform:2-4", "strategy.name": "local"}, r"method.ranks = .*is read by lora and sora only"),
        ({"strategy.name": "fedsvd"}, r"method.name = 'block-lora': strategy 'fedsvd' works with lora"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "block-lora", **flat})


def test_layers_that_cannot_be_cut_are_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"block-lora.blocks = 3: does not divide the 8 inputs of m.0.v; of all layers 1, 2 would"
    ):
        block(blocks=3)
    with pytest.raises(ConfigError, match=r"blocks = 2: leaves 4 inputs to a block, and method.rank = 5 is above that"):
        block(rank=5)
    assert block(rank=4).rank == 4, "as long as a layer has room for it"


def test_a_run_that_cannot_be_cut_is_refused_before_it_trains(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.name": "block-lora", "block-lora.blocks": 5})
    with pytest.raises(Exception, match=r"block-lora.blocks = 5: does not divide the \d+ inputs of .*; of all layers"):
        worker.describe()


def test_a_mean_is_exact_with_one_factor_at_a_time() -> None:
    assert FFALora(setting("block-lora")).exact
    assert RoLoRA(setting("block-lora")).exact
    assert FedAvg(setting("block-lora")).exact is False
    assert FedSALora(setting("block-lora")).exact is None


def test_a_worker_trains_it(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "ffa-lora", "method.name": "block-lora", "block-lora.blocks": 2})
    updates = ask(worker)
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert {name.rsplit(".", 1)[-1] for name in updates[0].tensors} == {"block_B", "weight", "bias"}


def test_exported_as_a_lora_with_all_of_a() -> None:
    engine = engine_of("block-lora", "gpt2", "all-linear")
    tensors = random_start(engine)
    files = adapter_files(engine, tensors, CONFIGS["block-lora"])
    assert b'"peft_type": "LORA"' in files["adapter_config.json"]
    assert check_adapter(engine, tensors, files) < 1e-12
    weights = load(files[WEIGHTS])
    first = next(name for name in weights if "lora_A" in name)
    one, two = weights[first].chunk(2, -1)
    assert torch.equal(one, two)
    spoiled = save({**weights, first: torch.cat([one, torch.zeros_like(two)], -1)})  # a block in its place, once
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, {**files, WEIGHTS: spoiled})


def test_parts_are_those_of_each_layer_of_a_model() -> None:
    """Layers of several widths, each cut by its own."""
    engine = engine_of("block-lora", "bert", "all-linear")
    adapted = engine.base.structure.adapted
    specs = build_method(CONFIGS["block-lora"], adapted, []).specs()
    assert len({layer.d_in for layer in adapted}) > 1
    assert all(specs[f"{layer.name}.block_A"].shape == (3, layer.d_in // 2) for layer in adapted)


# -- planted bugs -------------------------------------------------------------------------------------


def by_feature(self: BlockLora, tensors: Any) -> dict[str, Factor]:
    """Neighbouring features have a number in common, in place of features d_in / n apart."""
    return {
        name: one._replace(A=one.A[..., : one.A.shape[-1] // self.blocks].repeat_interleave(self.blocks, -1))
        for name, one in whole_factors(self, tensors).items()
        if isinstance(one, LowRank)
    }


def mean_of_parts(self: BlockLora, tensors: Any) -> dict[str, Factor]:
    found = whole_factors(self, tensors)
    return {name: one._replace(A=one.A / self.blocks) for name, one in found.items() if isinstance(one, LowRank)}


def first_part(self: BlockLora, tensors: Any) -> dict[str, Factor]:
    """Only the first part of the input is seen."""
    found = dict(whole_factors(self, tensors))
    for name, one in found.items():
        assert isinstance(one, LowRank)
        seen = torch.arange(one.A.shape[-1]) < one.A.shape[-1] // self.blocks
        found[name] = one._replace(A=one.A * seen)
    return found


whole_factors = BlockLora.factors


@pytest.mark.parametrize("planted", [by_feature, mean_of_parts, first_part])
def test_planted_bugs_are_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockLora, "factors", planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("block-lora", ALL, "bert")
