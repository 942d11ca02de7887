"""DyLoRA: the draw by round, what is sent, trained and averaged, the model cut to a rank; bugs planted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file, save_file

from clients.worker import Worker
from fedlora.config import Config, ConfigError, to_toml
from fedlora.exchange import Instruction
from fedlora.methods.products import pairs
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.server import Core
from fedlora.shapes import first_ranks
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.tasks import CausalLM
from fedlora.wire import read_instruction
from simulations.cli import run as main
from simulations.setup import federation_of, resolve
from strategies import DyLoraOptions, FedAvg
from strategies.build import build_strategy
from strategies.fedprox import FedProx
from tests.support.exported import language_flat
from tests.support.families import random_examples, small_model, without_float32
from tests.support.federation import one_round, run, server_of, strategy_of
from tests.support.formulas import LAYERS
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import CONFIGS, engine_of, random_start, setting
from tests.support.plans import plan, shown
from tests.support.trainers import dp_worker, tiny_job, tiny_worker

WHOLE = 3
PER_RANK = 8 * sum(layer.d_in + layer.d_out for layer in LAYERS)


def dylora(least: int = 1, seed: int = 0, **changes: Any) -> Strategy:
    config = Config(seed=seed).with_options(DyLoraOptions(least))
    return strategy_of("dylora", "lora", config=config, **changes)


def off(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# -- the draw -----------------------------------------------------------------------------------------


def test_each_rank_comes_once_in_a_cycle_in_a_new_order() -> None:
    """By seed and round, for all clients and whatever is around the strategy."""
    strategy = dylora()
    assert strategy.period == FedProx(strategy, 0.1).period == WHOLE
    drawn = [strategy.rank(number) for number in range(1, 10 * WHOLE + 1)]
    assert drawn == [FedProx(strategy, 0.1).rank(number, 4) for number in range(1, 10 * WHOLE + 1)]
    cycles = [tuple(drawn[at : at + WHOLE]) for at in range(0, len(drawn), WHOLE)]
    assert all(sorted(one) == [1, 2, 3] for one in cycles)
    assert len(set(cycles)) > 2
    assert [dylora(seed=1).rank(number) for number in range(1, 10 * WHOLE + 1)] != drawn
    assert {dylora(2).rank(number) for number in range(1, 9)} == {2, 3}


# -- messages and the server's mean -------------------------------------------------------------------


def test_what_crosses_is_cut_to_the_rounds_rank_and_measured_is_the_whole() -> None:
    """Clients that keep their heads are measured after each round, by all ranks."""
    strategy = dylora(head=Role.PERSONAL)
    server = server_of(strategy, "lora")
    grid = LoopGrid({1: node_of(server), 2: node_of(server)})
    run(server, grid, 4)
    for message in grid.sent:
        told = read_instruction(message.content)
        train = message.metadata.message_type == "train"
        rank = strategy.rank(told.round) if train else WHOLE
        assert told.tensors["m.0.q.lora_A"].shape == (rank, 6)
        assert told.tensors["m.0.q.lora_B"].shape == (10, rank)
        assert told.ranks == ((rank,) * len(told.clients) if train else ())
    assert server.replies is not None
    last = strategy.rank(4)
    assert last is not None
    assert server.replies.traffic.bytes_up == 5 * PER_RANK * last
    assert server.replies.traffic.bytes_down == 5 * PER_RANK * (last + WHOLE)


def test_the_first_ranks_are_averaged_and_the_others_stay() -> None:
    """From the formula, in every round of a cycle; what stays does so to the bit."""
    strategy, total = dylora(), sum(map(examples_of, range(5)))
    for number in range(1, WHOLE + 1):
        rank, before = strategy.rank(number), update_of(99, 7, setting("lora").specs)
        server = server_of(strategy, "lora", ServerState(before))
        after = one_round(server, LoopGrid({1: node_of(server), 2: node_of(server)}), number)
        own = [update_of(k, number, strategy.expected(number)) for k in range(5)]
        for _, a, b in pairs(strategy.setting.specs):
            assert np.array_equal(after[a][rank:], before[a][rank:])
            assert np.array_equal(after[b][:, rank:], before[b][:, rank:])
            for j in range(rank or 0):
                mean_a = sum(examples_of(k) / total * one[a][j] for k, one in enumerate(own))
                mean_b = sum(examples_of(k) / total * one[b][:, j] for k, one in enumerate(own))
                assert np.abs(after[a][j] - mean_a).max() < 1e-13
                assert np.abs(after[b][:, j] - mean_b).max() < 1e-13


def test_planted_clients_that_draw_for_themselves() -> None:
    """As DyLoRA's do, by step: an update of another rank than the round's is refused, not padded or cut."""
    strategy = dylora()
    server = server_of(strategy, "lora")
    other = next(number for number in range(1, WHOLE + 1) if strategy.rank(number) != strategy.rank(1))

    def spoil(client: int, update: Arrays) -> Arrays:
        return update_of(client, 1, strategy.expected(other)) if client == 3 else update

    run(server, LoopGrid({k: node_of(server, spoil) for k in range(1, 6)}), 1)
    assert server.replies is not None
    assert list(server.replies.refused) == [3]
    assert "has shape" in server.replies.refused[3]


def test_one_rank_alone_is_fedavg_to_the_bit() -> None:
    results = []
    for strategy in (dylora(WHOLE), FedAvg(setting("lora"))):
        server = server_of(strategy, "lora", dtype="float32")
        results.append(run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 3))
    assert all(np.array_equal(results[0][name], value) for name, value in results[1].items())


# -- clients ------------------------------------------------------------------------------------------

RANK = 4
KEYS = {"strategy.name": "dylora", "method.rank": RANK, "method.alpha": 8.0}


def told(worker: Any, **changes: Any) -> Instruction:
    """What the server tells all four clients of a round that trains rank 2, of an adapter without a zero."""
    model = worker.loaded.model
    strategy, draws = build_strategy(model.config, model.specs), np.random.default_rng(0)
    held = {name: value + 0.2 * draws.standard_normal(value.shape) for name, value in model.initial.items()}
    number = next(number for number in range(1, RANK + 1) if strategy.rank(number) == 2)
    return replace(
        Core(strategy, federation_of(model.config), ServerState(held)).instruction(number, range(4)), **changes
    )


def test_a_client_trains_what_a_lora_of_that_rank_would(tmp_path: Path) -> None:
    """With the same scale, and the same numbers; in a pack or alone. At another scale it does not: a control."""
    worker = tiny_worker(tmp_path, **KEYS)
    instruction = told(worker)
    updates = worker.train(instruction)
    for same, alpha in ((True, 4.0), (False, 8.0)):
        keys = {"strategy.name": "fedavg", "method.rank": 2, "method.alpha": alpha}
        plain = tiny_worker(tmp_path, **keys).train(replace(instruction, ranks=()))
        apart = max(off(one.tensors, other.tensors) for one, other in zip(updates, plain, strict=True))
        assert apart < 1e-10 if same else apart > 1e-4
    for client in range(4):
        (alone,) = worker.train(instruction.part((client,)))
        assert off(alone.tensors, updates[client].tensors) < 1e-10
    for name, value in updates[0].tensors.items():
        assert not np.array_equal(value, instruction.tensors[name]), "control: it trains"


def test_noise_under_dp_is_for_the_ranks_that_are_trained(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path, **KEYS)
    for update in worker.train(told(worker, ledger_heads=("",) * 4)):
        assert update.report.reason == ""
        assert update.report.ledger_head
        assert {v.shape[0] for n, v in update.tensors.items() if n.endswith("lora_A")} == {2}
        assert {v.shape[1] for n, v in update.tensors.items() if n.endswith("lora_B")} == {2}


# -- the model, cut -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_an_adapter_is_cut_without_an_svd(rank: int, tmp_path: Path) -> None:
    """By its files, as docs/strategies.md says, in PEFT: what the model computes whose other ranks are zero."""
    engine = engine_of("lora", "gpt2")
    tensors = random_start(engine)
    for file, content in adapter_files(engine, tensors, CONFIGS["lora"]).items():
        (tmp_path / file).write_bytes(content)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in weights.items():
        if "lora_A" in name:
            weights[name] = value[:rank].contiguous()
        elif "lora_B" in name:
            weights[name] = value[:, :rank].contiguous()
    save_file(weights, tmp_path / "adapter_model.safetensors")
    about = tmp_path / "adapter_config.json"
    text = about.read_text()
    for key in ("r", "lora_alpha"):
        assert f'"{key}": {WHOLE}' in text
        text = text.replace(f'"{key}": {WHOLE}', f'"{key}": {rank}')
    about.write_text(text)
    batch = engine.task.collate(random_examples(4, seed=2, family="gpt2"), range(4), torch.device("cpu"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}

    def logits(held: Mapping[str, Any]) -> torch.Tensor:
        factors = engine.method.factors({name: engine.tensor(value) for name, value in held.items()})
        with torch.no_grad(), engine.grouped.placed(factors, engine.layout(np.zeros(4, int), 1, np.ones(4))) as model:
            return model(**inputs).logits

    loaded = PeftModel.from_pretrained(without_float32(small_model("gpt2")), str(tmp_path)).eval()
    with torch.no_grad():
        found = loaded(**inputs).logits
    assert float((found - logits(first_ranks(tensors, engine.method.specs(), rank))).abs().max()) < 1e-10
    assert float((found - logits(tensors)).abs().max()) > 1e-3, "control: the ranks behind it count"


@pytest.mark.slow
def test_a_run_reports_its_model_at_smaller_ranks(tmp_path: Path) -> None:
    """As a worker measures what the run has ended with, without the ranks behind."""
    keys = {**KEYS, "rounds": 4, "train.learning-rate": 0.05, "run.dir": str(tmp_path / "runs"), "run.name": ""}
    flat, file = language_flat(tmp_path, **keys), tmp_path / "one.toml"
    file.write_text(to_toml({**flat, "grid.seed": [0]}))
    assert main(["sweep", str(file), "--in-process"], Console(quiet=True)) == 0
    folder = Path(pd.read_csv(tmp_path / "runs" / "one" / "results.csv")["folder"][0])
    outcome = json.loads((folder / "result.json").read_text())
    found = {name: value for name, value in outcome.items() if name.startswith("test_perplexity")}
    held = load_arrays(folder / "checkpoint" / "round-4.safetensors")
    job = tiny_job(resolve(flat), tmp_path)
    worker = Worker(lambda: job, 1)
    specs, rows = worker.loaded.model.specs, range(len(worker.loaded.model.examples["test"]))

    def perplexity(rank: int) -> float:
        cut = first_ranks({name: held[f"tensors/{name}"] for name in specs}, specs, rank)
        sums = CausalLM.sums(worker.evaluate(cut, "test", rows))
        return CausalLM.metrics({name: value / len(rows) for name, value in sums.items()})["perplexity"]

    expected = {"test_perplexity": RANK, "test_perplexity_rank_1": 1, "test_perplexity_rank_2": 2}
    assert found == {name: pytest.approx(perplexity(rank), rel=1e-9) for name, rank in expected.items()}
    assert len({round(value, 6) for value in found.values()}) == 3, "control: ranks make a difference"


# -- plans and settings -------------------------------------------------------------------------------


def test_the_plan_has_each_rounds_bytes(tmp_path: Path) -> None:
    keys = {"method.rank": 2, "method.head": "frozen", "rounds": 4}
    one = plan(tmp_path, **{"strategy.name": "dylora", **keys})
    ranks = [one.strategy.rank(number) for number in range(1, 5)]
    ups, downs = one.traffic
    whole = plan(tmp_path, **{"strategy.name": "fedavg", **keys}).traffic[0][0]
    assert ups == downs == [whole * (rank or 0) // 2 for rank in ranks]
    said = shown(one)
    assert f"ranks by round: {', '.join(map(str, ranks))}; measured and exported with all 2" in said
    assert "means over 2 rounds" in said


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"dylora.min-rank": 0}, r"dylora.min-rank = 0: must be at least 1"),
        ({"dylora.min-rank": 9}, r"dylora.min-rank = 9: must be at most method.rank = 8"),
        ({"method.ranks": "uniform:2-4"}, r"strategy 'dylora' takes tensors of one shape from all clients"),
        ({"method.name": "mos"}, r"method.name = 'mos': strategy 'dylora' works with lora"),
        (
            {"local.term": "scaffold", "train.optimizer": "sgd"},
            r"strategy 'dylora' does not average in a fixed basis at one rank",
        ),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "dylora", **flat})
