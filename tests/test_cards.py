"""A base model spread over several GPUs, as far as a machine without any can show it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch.utils import backend_registration

from clients.shards import Machine, Shard
from fedlora.config import ConfigError, ModelConfig
from fedlora.engine import ClientResult, Engine, train_pack
from fedlora.engine.blocks import blocks_of, checkpoint_blocks
from fedlora.hub import num_weights
from fedlora.methods import build_method
from fedlora.models import prepare_base
from fedlora.models.cards import check_spread, device_map
from fedlora.plugins import read_config
from simulations.cluster import shards_of_a_run
from simulations.setup import resolve
from tests.support.cards import split
from tests.support.families import small_model, small_task, task_of, without_float32
from tests.support.matrix import CONFIGS, random_start
from tests.support.plans import plan, shown
from tests.support.tiny import save_tiny_model
from tests.support.trainers import tiny_flat
from tests.test_packing import ADAMW, make_works

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch has no Python backends"
)
def test_each_operation_finds_its_operands_on_one_gpu_and_losses_come_back() -> None:
    """Two GPUs that are not there, in a process of its own: torch takes such a device for good."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.cards"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3 * len(CONFIGS)
    assert {tuple(line[2:]) for line in lines} == {("card:0", "card:1", "card:0", "True")}


def trained(family: str, *, hooked: bool, checkpointed: bool) -> tuple[Engine, list[ClientResult]]:
    model: Any = without_float32(small_model(family))
    if hooked:
        accelerate.dispatch_model(model, dict.fromkeys(split(model), "cpu"), main_device="cpu", force_hooks=True)
    base = prepare_base(model, None, "auto", has_head=task_of(family).has_head, device=torch.device("cpu"))
    engine = Engine.build(
        base, build_method(CONFIGS["lora"], base.structure.adapted, base.structure.head), small_task(family)
    )
    if checkpointed:
        assert checkpoint_blocks(engine)
    works = [replace(work, start=random_start(engine)) for work in make_works(engine, 3, ADAMW, family=family)]
    train_pack(engine, works, {}, ADAMW)  # what a pass puts in place is gone after it
    return engine, train_pack(engine, works, {}, ADAMW)


@pytest.mark.filterwarnings("ignore:.*meta device")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama-lm"])
def test_accelerates_hooks_stay_where_blocks_are_computed_twice(family: str, checkpointed: bool) -> None:
    _, plain = trained(family, hooked=False, checkpointed=False)
    engine, hooked = trained(family, hooked=True, checkpointed=checkpointed)
    for one, other in zip(plain, hooked, strict=True):
        assert one.loss == other.loss
        assert all(np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    for block in blocks_of(engine):
        assert "forward" in vars(block), "accelerate's"


def test_a_base_models_size_is_known_before_it_is_loaded(tmp_path: Path) -> None:
    """By its files' heads: of one file, of several, and of those from which nothing can be told."""
    whole = Path(save_tiny_model(tmp_path / "whole", layers=8))
    model = transformers.AutoModel.from_pretrained(whole)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert [num_weights(ModelConfig(str(folder))) for folder in (whole, tmp_path / "parts")] == [numbers] * 2
    config = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({**config, "quantization_config": {"load_in_4bit": True}}))
    assert num_weights(ModelConfig(str(whole))) == 0
    assert num_weights(ModelConfig(str(tmp_path / "none"))) == 0
    assert num_weights(ModelConfig("minilm")) == 0
    flat = {**tiny_flat(tmp_path), "model.name": str(tmp_path / "parts"), "engine.dtype": "float32"}
    for gpu_bytes, changes, cards in (
        (10 * numbers, {}, [1, 1, 1, 1]),
        (4 * numbers, {}, [2, 2]),
        (4 * numbers, {"engine.dtype": "bfloat16"}, [1, 1, 1, 1]),
        (4 * numbers, {"engine.gpus": 1}, [1, 1, 1, 1]),
        (10 * numbers, {"engine.gpus": 3}, [3]),
        (0, {}, [1, 1, 1, 1]),
    ):
        shards = shards_of_a_run(resolve({**flat, **changes}), [Machine("", "", 8, 4, gpu_bytes)])
        assert [shard.cards for shard in shards] == cards
    with pytest.raises(ConfigError, match=r"weights take .* no machine has GPUs for them"):
        shards_of_a_run(resolve(flat), [Machine("", "", 8, 4, numbers // 2)])


def test_the_plan_goes_by_what_the_gpus_hold(tmp_path: Path) -> None:
    one = plan(tmp_path)
    shard = Shard(4, 2.0, gpu_bytes=10**6)
    some = replace(one, shards=(shard,))
    assert "trainer 0 on this machine, 2 GPUs, over which the base model is spread, and 4 thread(s): " in shown(some)
    assert some.record()["shards"][0]["gpus"] == 2.0
    assert one.most_clients == 64
    assert 1 < replace(one, num_parameters=10, shards=(shard,)).most_clients < 256
    assert replace(one, num_parameters=10, shards=(replace(shard, gpu_bytes=10**10),)).most_clients == 256


def test_what_cannot_be_spread_is_refused() -> None:
    config = SimpleNamespace(quantization_config=None)
    for model, saved in (
        (ModelConfig("minilm", quantization="nf4"), None),
        (ModelConfig("minilm"), {"load_in_4bit": True}),
    ):
        with pytest.raises(ConfigError, match=r"engine.gpus = 2: a quantised base model stays on one GPU; set"):
            device_map(model, SimpleNamespace(quantization_config=saved), 2)
    with pytest.raises(
        ConfigError, match=r"engine.gpus = 2: a base model with model.quantization = 'nf4' stays on one"
    ):
        read_config({"engine.gpus": 2, "engine.dtype": "float32", "model.quantization": "nf4"})
    with pytest.raises(ConfigError, match=r"engine.gpus = 64: this process has \d+ GPU\(s\); lower it"):
        device_map(ModelConfig("minilm"), config, 64)
    model = small_model("bert")
    model.hf_device_map = {"bert": 0, "classifier": 1}
    check_spread(model, 2)
    model.hf_device_map = {"bert": 0, "classifier": "disk"}
    with pytest.raises(ConfigError, match=r"engine.gpus = 2: the base model does not fit onto them; raise it"):
        check_spread(model, 2)
    distilbert = small_model("distilbert")
    distilbert.hf_device_map = {"distilbert": 0, "classifier": 1}
    with pytest.raises(ConfigError, match=r"which modules of a distilbert model must stay together"):
        check_spread(distilbert, 2)
