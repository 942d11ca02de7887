"""What composes with strategies, through real Flower: server optimizers, local terms, schedules, ranks by client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from fedlora.config import from_toml, to_toml
from fedlora.plugins import read_config
from fedlora.runs.folder import read_lines
from simulations.in_process import Resident
from simulations.setup import settle
from tests.support.runs import fedlora, fedlora_run
from tests.support.tiny import save_texts
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e
SGD: dict[str, Any] = {"train.optimizer": "sgd", "train.learning-rate": 0.5, "engine.dtype": "float64", "rounds": 3}


def swept(folder: Path, grid: dict[str, list[Any]], **changes: Any) -> pd.DataFrame:
    """Run a sweep over the tiny model and return its table, every cell of which must have finished."""
    flat = tiny_flat(folder, **{"run.dir": str(folder / "runs"), "run.name": "s", **changes})
    file = folder / "s.toml"
    file.write_text(to_toml({**flat, **{f"grid.{key}": values for key, values in grid.items()}}))
    done = fedlora("sweep", file)
    assert done.returncode == 0, done.stdout + done.stderr
    results = pd.read_parquet(folder / "runs" / "s" / "results.parquet")
    assert (results["status"] == "ok").all()
    return results


@pytest.mark.slow
def test_server_optimizers_and_local_terms(tmp_path: Path) -> None:
    """Pairs of them: six runs of one start; SCAFFOLD doubles the bytes, the others add none."""
    grid = {
        "local.term": ["none", "prox", "scaffold"],
        "server.optimizer": ["none", "adam"],
    }
    results = swept(tmp_path, grid, **SGD, **{"strategy.name": "ffa-lora", "train.round-schedule": "cosine"})
    assert len(results) == 6
    up = results.groupby("local.term")["bytes_up"].unique()
    assert up["none"].tolist() == up["prox"].tolist()
    assert up["scaffold"].tolist() == [2 * up["none"][0]]
    curves = {folder: read_lines(Path(folder) / "metrics.jsonl")[-1]["test_loss"] for folder in results["folder"]}
    assert len(set(curves.values())) == 6, "each changes what comes out"


@pytest.mark.slow
def test_ranks_by_client(tmp_path: Path) -> None:
    """Clients of ranks 1, 3, 2 and 3: true bytes, growth where it stacks, adapters of the clients' own ranks."""
    grid: dict[str, list[Any]] = {"strategy.name": ["zero-padding", "flora", "local"], "seed": [0]}
    ranks = {"method.rank": 3, "method.ranks": "1,3,2,3", "method.head": "shared", "rounds": 3}
    results = swept(tmp_path, grid, **ranks).set_index("strategy.name")
    one_rank, head = 2 * 2 * (16 + 16) * 8, (2 * 16 + 2) * 8  # bytes in float64: two layers' queries and values
    whole = (1 + 3 + 2 + 3) * one_rank + 4 * head
    folders = {name: Path(folder) for name, folder in results["folder"].items()}
    lines = {name: read_lines(folder / "metrics.jsonl") for name, folder in folders.items()}
    assert [line["bytes_up"] for line in lines["zero-padding"]] == [whole] * 3
    assert [line["bytes_down"] for line in lines["zero-padding"]] == [whole] * 3
    assert [line["bytes_up"] for line in lines["flora"]] == [whole] * 3
    stacked = [4 * head + 4 * min(9 * number, 16) * one_rank for number in range(3)]
    assert [line["bytes_down"] for line in lines["flora"]] == stacked
    for client, rank in enumerate((1, 3, 2, 3)):
        adapter = folders["local"] / "adapters" / f"client-{client}"
        weights = load_file(adapter / "adapter_model.safetensors")
        assert {value.shape[0] for name, value in weights.items() if "lora_A" in name} == {rank}
    exported = load_file(folders["flora"] / "adapter" / "adapter_model.safetensors")
    assert max(value.shape[0] for name, value in exported.items() if "lora_A" in name) <= 16


@pytest.mark.slow
def test_ranks_and_local_terms_under_dp(tmp_path: Path) -> None:
    """The budget holds and updates are used, whatever is added to the steps or padded in a pack."""
    dp = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.client-size": 20}
    grid: dict[str, list[Any]] = {"strategy.name": ["zero-padding", "flora"]}
    ranks = {"method.rank": 3, "method.ranks": "1,3,2,3", "local.term": "prox"}
    results = swept(tmp_path, grid, **dp, **ranks)
    assert len(results) == 2
    assert np.isfinite(results["epsilon"]).all()
    for folder in results["folder"]:
        assert all(line["clients_ok"] == 4 for line in read_lines(Path(folder) / "metrics.jsonl"))


@pytest.mark.slow
def test_a_resumed_run_with_moments_and_variates_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """What an optimizer and SCAFFOLD keep is part of the state: two rounds and two more are four."""
    keys: dict[str, Any] = {**SGD, "local.term": "scaffold", "server.optimizer": "yogi", "rounds": 2}
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), **keys})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(flat))
    for options in (["-c", "run.name='whole' rounds=4"], ["-c", "run.name='half'"]):
        done = fedlora("run", "-c", file, *options)
        assert done.returncode == 0, done.stdout + done.stderr
    done = fedlora("run", "-c", tmp_path / "runs" / "half" / "config.toml", "-c", "run.resume=true rounds=4")
    assert done.returncode == 0, done.stdout + done.stderr
    whole, half = (tmp_path / "runs" / name / "checkpoint" for name in ("whole", "half"))
    arrays = [load_file(one / json.loads((one / "state.json").read_text())["tensors"]) for one in (whole, half)]
    assert any(name.startswith("extra/variate/") for name in arrays[0])
    assert any(name.startswith("extra/m/") for name in arrays[0])
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])


@pytest.mark.slow
def test_the_server_sends_a_start_that_one_trainer_has_computed(tmp_path: Path) -> None:
    """Two trainers, whose own would differ in rounding: the run's A and B are those of a federation in this process."""
    public = save_texts(tmp_path / "public.csv", rows=12, seed=5)
    keys = {"strategy.name": "fed-sb", "method.init": "gradient", "data.public-path": public, "engine.trainers": 2}
    run = fedlora_run(tmp_path, **keys)
    assert run.code == 0, run.output
    config, data = settle(read_config(from_toml((run.folder / "config.toml").read_text())), 4)
    start = Resident(1).federation(config, data, str(tmp_path / "again")).core.state.arrays()
    fixed = {name: value for name, value in run.checkpoint().items() if name.endswith((".sb_A", ".sb_B"))}
    assert len(fixed) == 8
    assert max(float(np.abs(value - start[name]).max()) for name, value in fixed.items()) < 1e-10
