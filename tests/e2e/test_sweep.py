"""A real sweep: two processes, a group that cannot work, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from fedlora.config import to_toml
from fedlora.plugins import schema
from simulations.sweeps.file import Sweep
from tests.support.runs import fedlora
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e


@pytest.mark.slow
def test_a_real_sweep(tmp_path: Path) -> None:
    """Two processes with a group each, one of which cannot work; tuned and final cells, tables; what is done stays."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "rounds": 9})
    flat.pop("federation.num-clients")
    grid = {"grid.federation.num-clients": [4, 500], "grid.seed": [0, 1], "tune.train.learning-rate": [0.01, 0.1]}
    file = tmp_path / "mini.toml"
    file.write_text(to_toml({**flat, **grid}))
    done = fedlora("sweep", file, "--workers", "2", "-c", "rounds=1")
    assert done.returncode == 1, "a cell failed"
    assert "[1/2] cell 4/4 final" in done.stdout, done.stdout + done.stderr
    assert "[2/2] cell 2/4 tune" in done.stdout
    assert "8 cells in" in done.stdout
    assert "500: 86 training rows cannot give each client 1" in done.stdout
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
    assert f"| `4` | `{best}` | 2 | {mean:.4f} ± {deviation:.4f} |" in written
    assert "`train.learning-rate` was chosen on dev rows among 0.01, 0.1." in written
    assert "`500`" not in written, "no cell of it finished"
    for cell in final["folder"]:
        curve = [json.loads(line) for line in (Path(cell) / "metrics.jsonl").read_text().splitlines()]
        assert all(line["test_accuracy"] is None and line["dev_accuracy"] is not None for line in curve)
        trainers = json.loads((Path(cell) / "trainers.json").read_text())
        assert [trainer["base_loads"] for trainer in trainers] == [1], "one process, one base model"
    left = Sweep.read(str(folder / "sweep.toml"), schema().defaults()).unfinished()
    assert [cell.config.federation.num_clients for cell in left] == [500, 500], "a second call would try these again"
