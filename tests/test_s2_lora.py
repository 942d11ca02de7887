"""S2-LoRA: shapes, the proximal step on clients and server, and what is reported of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlora.config import TrainConfig
from fedlora.engine import train_pack
from fedlora.engine.optimizers import build_optimizer
from fedlora.methods import S2Lora, S2Options, count_parameters, initial_tensors, soft_threshold
from fedlora.methods.base import Layer
from fedlora.plugins import read_config
from fedlora.runs.export import adapter_files
from fedlora.runs.ranks import FILE, effective_ranks, strengths, zero_share
from fedlora.seeded import Seeded
from strategies import S2
from tests.support.federation import run, server_of
from tests.support.loop import LoopGrid, node_of
from tests.support.matrix import CONFIGS, Arrays, engine_of, random_start, setting, works


def test_one_pair_a_shape() -> None:
    """RoBERTa-large, query and value, r = 32: 67,072 numbers, 8.5 % of LoRA of rank 8, and r numbers a matrix."""
    layers = [Layer(f"l.{n}.{kind}", 1024, 1024, True, False) for n in range(24) for kind in ("query", "value")]
    specs = S2Lora(layers, rank=32, alpha=32.0, sparsity=0.01, orthogonality=0.0).specs()
    assert set(specs) == {"s2.1024x1024.A", "s2.1024x1024.B", "s2.1024x1024.s"}
    assert count_parameters(specs) == 67_072
    assert specs["s2.1024x1024.s"].shape == (48, 32)
    assert [specs[f"s2.1024x1024.{kind}"].l1 for kind in "ABs"] == [0.0, 0.0, 0.01]


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_soft_threshold(threshold: float) -> None:
    x = np.array([-2.0, -0.3, -0.1, 0.0, 0.2, 0.3, 5.0])
    expected = np.sign(x) * np.maximum(np.abs(x) - threshold, 0)
    assert np.array_equal(soft_threshold(x, threshold), expected)
    assert torch.equal(
        soft_threshold(torch.from_numpy(x), torch.tensor(threshold, dtype=torch.float64)), torch.from_numpy(expected)
    )


def test_the_proximal_step_is_each_clients_own() -> None:
    """It follows a client's own schedule, and leaves one that has finished alone."""
    value = torch.full((2, 3), 1.0, dtype=torch.float64)
    config = TrainConfig(optimizer="sgd", learning_rate=0.1, schedule="linear")
    optimizer = build_optimizer(value, config, torch.tensor([1, 2]), torch.full((3,), 0.5, dtype=torch.float64))
    for active in (slice(0, 2), torch.tensor([1])):  # side by side, and any
        optimizer.step(torch.zeros_like(value[active]), active)
    assert torch.allclose(value[0], torch.tensor(1 - 0.05, dtype=torch.float64))
    assert torch.allclose(value[1], torch.tensor(1 - 0.05 - 0.025, dtype=torch.float64))


def test_more_sparsity_gives_more_zeros_and_too_much_is_an_error() -> None:
    engine = engine_of("s2-lora", "bert")
    start = random_start(engine)
    zeros = []
    for sparsity in (0.0, 2.0, 6.0, 1000.0):
        method = S2Lora(engine.base.structure.adapted, rank=3, alpha=6.0, sparsity=sparsity, orthogonality=0.0)
        planted = replace(engine, method=type(engine.method)(method, engine.base.structure.head))  # type: ignore[call-arg]
        result = train_pack(planted, works(start, "bert"), {}, TrainConfig(learning_rate=0.02))[0]
        zeros.append(int(np.sum(result.tensors["s2.16x16.s"] == 0)))
    assert zeros[0] == 0
    assert zeros[1] < zeros[2] < zeros[3] == start["s2.16x16.s"].size
    assert "the proximal step set all of s2.16x16.s to zero" in result.error


def test_the_server_takes_the_step_once_more() -> None:
    """Each of two clients has set to zero what the other has not: their mean is sparse again, and bases stay."""

    def sparse(client: int, update: Arrays) -> Arrays:
        s = update["s2.10x6.s"]
        s[:] = 0.0
        s[client] = [0.08, 3.0, -0.08]
        return {**update, "s2.10x6.A": np.full_like(update["s2.10x6.A"], 0.01)}

    strategy = S2(setting("s2-lora"))
    federated = server_of(strategy, "s2-lora", clients=2, weights="equal", learning_rate=1.0)
    server = run(federated, LoopGrid({k: node_of(federated, sparse) for k in (1, 2)}), 1)
    assert CONFIGS["s2-lora"].options(S2Options).sparsity == 0.05
    assert np.allclose(server["s2.10x6.s"], [[0.0, 1.45, 0.0], [0.0, 1.45, 0.0], [0.0, 0.0, 0.0]])
    assert np.allclose(server["s2.10x6.A"], 0.01)


def test_ranks_are_reported() -> None:
    """A layer's strengths are norms of its rank-one components; zero coefficients are zero exactly, and counted."""
    engine = engine_of("s2-lora", "bert")
    tensors = random_start(engine)
    tensors["s2.16x16.s"][0] = [0.0, 2.0, 0.0]
    told = strengths(engine.method.factors({name: engine.tensor(value) for name, value in tensors.items()}))
    first = engine.base.structure.adapted[0].name
    a, b = tensors["s2.16x16.A"], tensors["s2.16x16.B"]
    expected = [0.0, float(np.linalg.norm(6.0 / 3 * 2.0 * np.outer(b[:, 1], a[1]))), 0.0]
    assert np.allclose(told[first], expected)
    one = {name: np.array([values]) for name, values in told.items()}
    assert effective_ranks(one).tolist() == [1, 3, 3, 3]
    assert zero_share(one) == 2 / 12
    two = {name: np.array([[1.0, 0.0], [0.0, 2.0]]) for name in told}
    assert effective_ranks(two).tolist() == [1, 1, 1, 1], "of each client, not of what some client uses"
    files = adapter_files(engine, tensors, CONFIGS["s2-lora"])
    assert json.loads(files[FILE]) == told
    config = json.loads(files["adapter_config.json"])
    assert sorted(config["rank_pattern"].values()) == [1]


def test_an_adapter_without_any_rank_can_be_loaded(tmp_path: Path) -> None:
    """Nothing has been learned: PEFT still loads it, and it does nothing."""
    from peft import PeftModel

    from tests.support.families import small_model

    engine = engine_of("s2-lora", "bert")
    tensors = initial_tensors(engine.method.specs(), Seeded(0))
    for file, content in adapter_files(engine, tensors, CONFIGS["s2-lora"]).items():
        (tmp_path / file).write_bytes(content)
    loaded = PeftModel.from_pretrained(small_model("bert"), str(tmp_path)).eval()
    ids = torch.tensor([[3, 4, 5]])
    plain = small_model("bert").bert(input_ids=ids).last_hidden_state
    assert torch.equal(loaded.base_model.model.bert(input_ids=ids).last_hidden_state, plain)


def test_configuration() -> None:
    config = read_config({"method.name": "s2-lora", "s2.sparsity": 0.5})
    assert config.options(S2Options) == S2Options(sparsity=0.5)
    assert read_config(config.to_flat()) == config
    for key in ("sparsity", "orthogonality"):
        with pytest.raises(ValueError, match=f"s2.{key} = -1.0: must be at least 0"):
            read_config({f"s2.{key}": -1.0})
