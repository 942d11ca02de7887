"""Mixture of Shards: parameters, indices, the devices one by one, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedlora.config import Config, ConfigError, MethodConfig
from fedlora.methods import LowRank, Mos, MosOptions, build_method, count_parameters, initial_tensors
from fedlora.methods.base import Layer
from fedlora.models import inspect
from fedlora.seeded import Seeded
from simulations.setup import resolve

SIX = [Layer(f"m.{n}.q", 24, 36, bias=True, fan_in_fan_out=False) for n in range(6)]


def mos(layers: list[Layer] = SIX, rank: int = 6, seed: int = 0, **changes: Any) -> Mos:
    config = replace(MosOptions(budget=2, shards=4, private=1), **changes)
    return Mos(layers, rank=rank, alpha=12.0, config=config, seeded=Seeded(seed))


def test_parameters_of_the_paper() -> None:
    """LLaMA-2-7B, all seven linear layers, e = 2: 4,997,120 whatever the active rank, and those of LoRA of rank e."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig())
    adapted = inspect(model, "all-linear", has_head=False).adapted
    assert len(adapted) == 7 * 32
    for rank, private, shards in ((2, 0, 1), (8, 1, 4), (32, 1, 8)):
        options = MosOptions(budget=2, private=private, shards=shards)
        config = Config(method=MethodConfig("mos", rank=rank)).with_options(options)
        assert count_parameters(build_method(config, adapted, []).specs()) == 4_997_120
    lora = Config(method=MethodConfig("lora", rank=2))
    assert count_parameters(build_method(lora, adapted, []).specs()) == 4_997_120


def test_lora_is_a_special_case() -> None:
    """l = 1 and p = e = r: every shard is its layer's own, and the factors are those of LoRA, exactly."""
    method = mos(rank=3, budget=3, private=3, shards=1)
    tensors = {name: torch.from_numpy(value) for name, value in random(method).items()}
    for k, layer in enumerate(SIX):
        factor = method.factors(tensors)[layer.name]
        assert isinstance(factor, LowRank)
        assert torch.equal(factor.A, tensors["m.*.q.mos_A_private"][3 * k : 3 * k + 3])
        assert torch.equal(factor.B, tensors["m.*.q.mos_B_private"][3 * k : 3 * k + 3].mT)
        assert factor.scale == 12.0 / 3
    assert set(method.specs()) == {"m.*.q.mos_A_private", "m.*.q.mos_B_private"}


def random(method: Mos) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(spec.shape) for name, spec in method.specs().items()}


def test_indices() -> None:
    """No shard twice in a layer, other shards in other layers, A and B apart, each layer's own at its place."""
    method = mos()
    a, b = method.constants()["m.*.q.A"], method.constants()["m.*.q.B"]
    public, own = 1 * 6 * 4, 1 * 4
    assert a.shape == b.shape == (6, 6 * 4)
    for index in (a, b):
        assert all(len(set(row)) == len(row) for row in index.tolist())
        assert (index[:, :-own] < public).all()
        for k in range(6):
            assert index[k, -own:].tolist() == list(range(public + k * own, public + (k + 1) * own))
    assert not np.array_equal(a, b)
    assert len({tuple(row) for row in a[:, :-own].tolist()}) == 6


def test_indices_are_the_same_on_every_machine() -> None:
    """Known numbers: another machine, library or version that drew others would train another model."""
    index = mos().constants()["m.*.q.A"]
    assert index[0].tolist() == GOLDEN
    assert np.array_equal(index, mos().constants()["m.*.q.A"])
    assert not np.array_equal(index, mos(seed=1).constants()["m.*.q.A"])


GOLDEN = [0, 14, 13, 18, 9, 7, 21, 10, 15, 11, 6, 12, 17, 1, 19, 8, 20, 4, 22, 5, 24, 25, 26, 27]


@pytest.mark.parametrize("device", ["subset", "dissociation", "sharding", "privatisation"])
def test_each_device_can_be_switched_off(device: str) -> None:
    """And is off then, while the number of parameters stays."""
    off: dict[str, dict[str, Any]] = {
        "subset": {"subset": False, "rank": 7},
        "dissociation": {"dissociation": False},
        "sharding": {"shards": 1},
        "privatisation": {"private": 0},
    }
    method = mos(**off[device])
    a, b = method.constants()["m.*.q.A"], method.constants()["m.*.q.B"]
    assert count_parameters(method.specs()) == count_parameters(mos().specs()) == 2 * 6 * (24 + 36)
    assert (device == "dissociation") == np.array_equal(a, b)
    assert (device == "subset") == all(np.array_equal(row[:24], np.arange(24)) for row in a)
    assert (device == "privatisation") == ("m.*.q.mos_A_private" not in method.specs())
    assert (device == "sharding") == (method.specs()["m.*.q.mos_A"].shape[1] == 24)


def test_start() -> None:
    """A's bound is 1/sqrt of the full d_in, not of the short shard; the scale is alpha over the active rank."""
    tensors = initial_tensors(mos().specs(), Seeded(0))
    for name in ("m.*.q.mos_A", "m.*.q.mos_A_private"):
        assert 0.9 / np.sqrt(24) < np.abs(tensors[name]).max() <= 1 / np.sqrt(24)
    assert not tensors["m.*.q.mos_B"].any()
    assert not tensors["m.*.q.mos_B_private"].any()
    assert mos().scale == 12.0 / 6


def test_types_are_told_apart_by_name_and_shape() -> None:
    """In BERT ``dense`` stands for several shapes, and a name may come in two shapes by itself."""
    layers = [
        Layer("e.layer.0.output.dense", 24, 36, True, False),
        Layer("e.layer.1.output.dense", 24, 36, True, False),
        Layer("e.layer.0.attention.output.dense", 36, 36, True, False),
        Layer("e.layer.1.attention.output.dense", 36, 36, True, False),
        Layer("x.0.up", 24, 24, True, False),
        Layer("x.1.up", 24, 36, True, False),
    ]
    names = {name.rpartition(".mos")[0] for name in mos(layers, rank=2, budget=2, private=1).specs()}
    assert names == {
        "e.layer.*.output.dense",
        "e.layer.*.attention.output.dense",
        "x.*.up.24x24",
        "x.*.up.36x24",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, r"method.rank = 1: the active rank of mos must be at least mos.budget = 2; raise it"),
        ({"rank": 8}, r"method.rank = 8: of m\.\*\.q \(6 layers\) each takes .* = 7 .* = 6\. Lower method.rank to 7"),
        ({"private": 2, "rank": 3}, r"method.rank = 3: .* = 1 ranks .* = 0\. Lower method.rank to 2"),
        ({"shards": 5}, r"mos.shards = 5: does not divide the 24 features of .*; 1, 2, 3, 4, 6, 12 would"),
        ({"subset": False}, r"method.rank = 6: with mos.subset = false .* set method.rank = 7"),
    ],
)
def test_impossible_settings_are_refused_with_the_cure(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mos(**changes)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"mos.budget": 2, "mos.private": 3}, r"mos.private = 3: must be at most mos.budget = 2"),
        ({"strategy.name": "mos", "method.rank": 3}, r"method.rank = 3: the active rank of mos must be at least"),
        ({"strategy.name": "mos-personal", "mos.private": 0}, r"mos.private = 0: strategy 'mos-personal' needs shards"),
        ({"strategy.name": "mos-personal", "mos.private": 4}, r"mos.private = 4: .* below mos.budget = 4"),
        ({"strategy.name": "fedsvd", "method.name": "mos"}, r"method.name = 'mos': strategy 'fedsvd' works with lora"),
        ({"strategy.name": "s2-frozen", "method.name": "lora"}, r"strategy 's2-frozen' works with s2-lora"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(flat)


def test_a_strategy_brings_its_method() -> None:
    assert resolve({"strategy.name": "mos"}).method.name == "mos"
    assert resolve({"strategy.name": "s2-cyclic"}).method.name == "s2-lora"
    assert resolve({"strategy.name": "ffa-lora", "method.name": "mos"}).method.name == "mos"
