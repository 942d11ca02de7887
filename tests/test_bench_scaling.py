"""The benchmark of one GPU and two: what it runs is accepted, and what it reads of a run's folder adds up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.engine.report import write
from simulations.options import read_overrides
from simulations.preflight import Preflight
from simulations.setup import resolve
from tools import performance_results, performance_tables

OPTIONS = argparse.Namespace(
    shape="tiny", device="cpu", clients=4, rows=2, tokens=16, steps=3, rounds=3, rate=1e-2, trainers=[1, 2], out=""
)


def test_clients_of_the_federation_have_equal_rows_of_equal_length(tmp_path: Path) -> None:
    flat = scaling.federation(tmp_path, OPTIONS)
    config = resolve({**read_overrides(scaling.ROOT, []), **flat, "engine.trainers": 2})
    plan, structure = Preflight(2).plan(config)
    assert [len(rows) for rows in plan.data.clients] == [2 * 3] * 4
    assert plan.row_tokens == (16.0,) * 4
    assert [len(pack.clients) for pack in plan.packs] == [2, 2]
    assert len(structure.adapted) == 4


def run_folder(path: Path, seconds: list[float], busy: list[list[float]], loss: float) -> dict[str, Any]:
    path.mkdir()
    empty = {"test_accuracy": 0.5, "test_loss": 0.7, "clients_ok": 4, "message_bytes_up": 8}
    metrics = [{"round": n, "seconds": one, "train_loss": loss / n, **empty} for n, one in enumerate(seconds, 1)]
    packs = [
        {"round": n, "trainer": trainer, "clients": 2, "work": 9.0, "seconds": one}
        for n, own in enumerate(busy, 1)
        for trainer, one in enumerate(own)
    ]
    for name, lines in (("metrics.jsonl", metrics), ("packs.jsonl", packs)):
        (path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"run": path.name, "trainers": len(busy[0]), "error": "", "start_s": 30.0, "gpu_busy": {"0": 0.9}}
    return found | scaling.read_run(path)


def test_a_round_is_the_busiest_trainer_and_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run_folder(tmp_path / "one", [99.0, 10.0, 11.0, 12.0], [[90.0], [9.0], [9.5], [10.0]], 2.0)
    two = run_folder(tmp_path / "two", [99.0, 5.5, 5.5, 5.5], [[40.0, 40.0], [5.0, 4.0], [4.0, 5.0], [5.0, 5.0]], 2.0)
    assert one["round_s"] == {"median": 11.0, "min": 10.0, "max": 12.0}, "without the first"
    assert (one["busiest_s"], one["rest_s"], one["uneven"]) == (9.5, 1.5, 1.0)
    assert (two["busiest_s"], two["rest_s"], two["uneven"]) == (5.0, 0.5, 1.25)
    lost = {"run": "x", "trainers": 2, "error": "not done within 9 s"}
    found = scaling.summary([one, two, lost])
    assert (found["times"], found["times_training"]) == (2.0, 1.9), "the rest shrinks, too"
    assert (found["off"], found["alike"]) == (0.0, True)
    other = run_folder(tmp_path / "other", [99.0, 5.5, 5.5, 5.5], [[4.0, 4.0]] * 4, 1.0)
    assert not scaling.summary([one, other])["alike"]
    assert scaling.summary([one, lost])["times"] is None

    monkeypatch.setattr(performance_results, "RESULTS", tmp_path)
    options = argparse.Namespace(**{**vars(OPTIONS), "out": str(tmp_path / "scaling.json")})
    about = {"device": "GPU", "cuda": "13", "command": "c", "cores": 1, "load": [0], "commit": "", "time": ""}
    versions = dict.fromkeys(("torch", "transformers", "peft"), "1")
    write("scaling", options, {**about, "versions": versions}, found, [one, two, lost])
    rows = performance_tables.TABLES["scaling"]()
    assert "11 (10 to 12) | 9.5 | 1.5" in rows[2]
    assert "not done within 9 s" in rows[4]
    assert "2.00 times" in rows[5]
    assert len(performance_tables.TABLES["runs"]()) == 3
    assert performance_tables.TABLES["goals"]()[-1].startswith("| tiny | 32 | times as fast on 2 GPUs as on 1")
