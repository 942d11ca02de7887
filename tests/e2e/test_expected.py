"""What people expect beside a run, by one real run: trackers, generation metrics, and the adapter's answers."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from tests.support.exported import language_flat
from tests.support.runs import Finished, fedlora, fedlora_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
TRACKERS = ("tensorboard", "mlflow", "wandb")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("expected")
    keys = {"run.trackers": ",".join(TRACKERS), "eval.generate": 7, "data.label-column": "label"}
    return fedlora_run(folder, **language_flat(folder, **keys))


def test_trackers_have_the_run(run: Finished) -> None:
    assert run.code == 0, run.output
    assert run.left == []
    assert "run.trackers" not in run.output, "no warning"
    with closing(sqlite3.connect(run.folder.parent / "mlflow.db")) as database:
        (found,) = database.execute("select status, name from runs").fetchall()
        metrics = dict(database.execute("select key, value from metrics where step = 2"))
    assert found == ("FINISHED", "run")
    assert metrics["test_perplexity"] == run.metrics[-1]["test_perplexity"]
    assert metrics["result/test_generated_rouge_l"] == run.json("result.json")["test_generated_rouge_l"]
    own = run.folder / "trackers"
    assert list((own / "tensorboard").glob("events.*"))
    assert list((own / "wandb").glob("offline-run-*/*.wandb"))
    assert all((own / f"{name}.log").is_file() for name in TRACKERS)


def test_generation_is_measured_once_and_kept(run: Finished) -> None:
    result, lines = run.json("result.json"), read_lines(run.folder / "generated.jsonl")
    assert result["test_generated_rows"] == len(lines) == 7
    assert result["test_generated_exact_match"] == sum(line["written"] == line["wanted"] for line in lines) / 7
    assert not any("generated" in key for line in run.metrics for key in line)
    assert "test generated rouge l" in run.output
    assert "test generated rouge l" in (run.folder / "summary.md").read_text()


def test_the_adapter_answers(run: Finished) -> None:
    done = fedlora("try", run.folder, "w1 w2 w3")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert done.stdout.strip()


def test_each_cell_of_a_sweep_is_a_tracked_run(tmp_path: Path) -> None:
    """Also where clients keep tensors: each then writes with its own, on rows that it holds out."""
    keys = {"run.name": "s", "run.dir": str(tmp_path / "runs"), "run.trackers": "mlflow", "eval.generate": 6}
    flat = language_flat(tmp_path, **{**keys, "rounds": 1})
    file = tmp_path / "s.toml"
    file.write_text(to_toml({**flat, "grid.strategy.name": ["fedavg", "fedsa-lora"]}))
    done = fedlora("sweep", file)
    assert done.returncode == 0, done.stdout + done.stderr
    with closing(sqlite3.connect(next((tmp_path / "runs").rglob("mlflow.db")))) as database:
        found = database.execute("select status from runs").fetchall()
        rows = dict(database.execute("select key, value from metrics where key like '%generated_rows'"))
    assert found == [("FINISHED",), ("FINISHED",)]
    assert rows == {"result/test_generated_rows": 6, "result/personal_generated_rows": 6}
