"""A real sweep: two processes, a group that cannot work, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from fedlora.config import to_toml
from fedlora.plugins import schema
from simulations.sweeps.file import Sweep
from tests.support.runs import fedlora
from tests.support.tiny import save_tiny_model
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path) -> None:
    """Two processes with a group each, one of which cannot work; tuned and final cells, tables; what is done stays."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "rounds": 9})
    good, broken = flat.pop("model.name"), Path(save_tiny_model(tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "query.weight" in name))
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    grid = {"grid.model.name": [good, str(broken)], "grid.seed": [0, 1], "tune.train.learning-rate": [0.01, 0.1]}
    file = tmp_path / "mini.toml"
    file.write_text(to_toml({**flat, **grid}))
    done = fedlora("sweep", file, "--workers", "2", "-c", "rounds=1")
    assert done.returncode == 1, "a cell failed"
    assert "[1/2] cell 4/4 final" in done.stdout, done.stdout + done.stderr
    assert "[2/2] cell 2/4 tune" in done.stdout
    assert "8 cells in" in done.stdout
    assert "the checkpoint has no weights for" in done.stdout, "which only shows once they are loaded"
    folder = tmp_path / "runs" / "mini"
    results = pd.read_parquet(folder / "results.parquet")
    assert (results["status"] == "ok").sum() == 4
    assert (results["status"] == "failed").sum() == 2
    assert results[results["stage"] == "tune"]["test_accuracy"].isna().all()
    final = results[results["stage"] == "final"]
    assert len(final) == 2
    assert final["test_accuracy"].between(0, 1).all()
    tuned = results[(results["stage"] == "tune") & (results["status"] == "ok")]
    best = tuned[tuned["dev_accuracy"] == tuned["dev_accuracy"].max()]
    assert set(final["train.learning-rate"]) <= set(best["train.learning-rate"])
    groups = pd.read_csv(folder / "groups.csv")
    assert groups["n"].tolist() == [2]
    assert groups["test_accuracy_mean"].iloc[0] == pytest.approx(final["test_accuracy"].mean())
    assert groups["test_accuracy_std"].iloc[0] == pytest.approx(final["test_accuracy"].std())
    written = (folder / "summary.md").read_text()
    best = groups["train.learning-rate"].iloc[0]
    mean, deviation = final["test_accuracy"].mean(), final["test_accuracy"].std()
    assert f"| `{good}` | `{best}` | 2 | {mean:.4f} ± {deviation:.4f} |" in written
    assert "`train.learning-rate` was chosen on dev rows among 0.01, 0.1." in written
    assert f"`{broken}`" not in written, "no cell of it finished"
    for cell in final["folder"]:
        curve = [json.loads(line) for line in (Path(cell) / "metrics.jsonl").read_text().splitlines()]
        assert all(line["test_accuracy"] is None and line["dev_accuracy"] is not None for line in curve)
        trainers = json.loads((Path(cell) / "trainers.json").read_text())
        assert [trainer["base_loads"] for trainer in trainers] == [1], "one process, one base model"
    left = Sweep.read(str(folder / "sweep.toml"), schema().defaults()).unfinished()
    assert [cell.config.model.name for cell in left] == [str(broken)] * 2, "a second call would try these again"
    mini = file.read_text().replace(f'grid.model.name = ["{good}", "{broken}"]', f'model.name = "{good}"')
    (tmp_path / "here.toml").write_text(mini)
    assert fedlora("sweep", tmp_path / "here.toml", "--in-process", "-c", "rounds=1").returncode == 0
    here = pd.read_parquet(tmp_path / "runs" / "here" / "results.parquet")
    assert len(here) == 4
    under_flower = results[results["status"] == "ok"]
    for one, other in zip(here["folder"], under_flower["folder"], strict=True):
        assert numbers(Path(one)) == numbers(Path(other)), "to the bit, bytes of messages included"
        ours, theirs = (load_file(Path(folder) / "adapter" / "adapter_model.safetensors") for folder in (one, other))
        assert all((ours[name] == theirs[name]).all() for name in theirs)


def numbers(cell: Path) -> list[dict[str, object]]:
    """Return the lines of a cell's rounds and clients, but for the time that they took."""
    lines = [
        json.loads(line)
        for name in ("metrics", "clients")
        for line in (cell / f"{name}.jsonl").read_text().splitlines()
    ]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
