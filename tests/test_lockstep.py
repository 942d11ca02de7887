"""Runs whose clients train in common packs: what each of them gives alone."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from fedlora.config import ConfigError, TrainConfig, to_toml
from fedlora.engine import train_pack
from fedlora.experts import ALL, OWN
from simulations import lockstep
from simulations.cli import run
from simulations.lockstep import Lockstep
from tests.support.matrix import engine_of, random_start, works
from tests.support.trainers import tiny_flat

SEEDS = [0, 1, 2]
PRIVATE = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.seed": 5, "data.partition": "iid"}


def swept(folder: Path, name: str, together: int, **changes: Any) -> list[Path]:
    """The folders of a sweep's cells, one a seed."""
    flat = tiny_flat(folder, **{"run.dir": str(folder / "runs"), "run.name": "", **changes})
    file = folder / f"{name}.toml"
    file.write_text(to_toml({**flat, "grid.seed": SEEDS}))
    assert run(["sweep", str(file), "--in-process", "--together", str(together)], Console(quiet=True)) == 0
    return [Path(cell) for cell in pd.read_csv(folder / "runs" / name / "results.csv")["folder"]]


def tensors(cell: Path) -> dict[str, Any]:
    return load_file(cell / "checkpoint" / "round-2.safetensors")


def lines(cell: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "a of each run's own": {"strategy.name": "ffa-lora"},
    "personal": {"strategy.name": "feddpa", "data.holdout": 0.2},
    "experts of clusters": {"strategy.name": "fedlease", "data.holdout": 0.2},
    "a second term that grows": {"strategy.name": "fedex-lora"},
    "ranks by client": {"strategy.name": "zero-padding", "method.ranks": "uniform:1-2"},
    "a rank by round, of each run's own": {"strategy.name": "dylora", "method.rank": 4},
    "gates, and ranks by client": {
        **{"strategy.name": "zero-padding", "method.name": "sora", "method.ranks": "uniform:1-2"},
    },
    "modules by client": {"strategy.name": "fed-plora", "method.ranks": "uniform:1-2"},
    "heads by client": {"strategy.name": "ravan", "ravan.heads": 2, "method.ranks": "uniform:1-2"},
    "control variates": {"local.term": "scaffold", "train.optimizer": "sgd", "train.learning-rate": 0.1},
    "packs that differ": {"strategy.name": "mos"},
    "private, a of each run's own": {**PRIVATE, "strategy.name": "ffa-lora"},
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(value, id=name, marks=[] if name.startswith("a of") else pytest.mark.slow)
        for name, value in CASES.items()
    ],
)
def test_each_run_is_what_it_is_alone(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packs: list[int] = []

    def counted(engine: Any, asked: Any, *args: Any, **others: Any) -> Any:
        packs.append(len(asked))
        return train_pack(engine, asked, *args, **others)

    monkeypatch.setattr(lockstep, "train_pack", counted)
    alone, together = swept(tmp_path, "alone", 1, **changes), swept(tmp_path, "together", 3, **changes)
    assert max(packs, default=0) == (4 if changes.get("strategy.name") == "mos" else 12), "its seeds draw indices"
    for one, other in zip(alone, together, strict=True):
        expected, found = tensors(one), tensors(other)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
        for mine, theirs in zip(lines(other), lines(one), strict=True):
            assert mine["bytes_up"] == theirs["bytes_up"]
            loss = "personal_loss" if theirs["test_loss"] is None else "test_loss"
            assert mine[loss] == pytest.approx(theirs[loss], rel=1e-9)


def off_by_experts() -> float:
    """Train two runs side by side, one with two experts and one with three; return how far they are from alone."""
    engine, off = engine_of("lora-experts", "bert"), []
    both, train = Lockstep(), TrainConfig(learning_rate=0.02)

    def each(count: int) -> None:
        start = random_start(engine)
        trained = {name: start.pop(name) for name in list(start) if not name.endswith((ALL, OWN))}
        common = {name: value[:count] if name.endswith(ALL) else value for name, value in start.items()}
        asked = [replace(work, fixed={OWN: np.eye(count)[0]}) for work in works(trained, "bert")]
        alone = train_pack(engine, asked, common, train)
        for one, other in zip(both.train(engine, asked, common, train), alone, strict=True):
            off.extend(float(np.abs(one.tensors[name] - value).max()) for name, value in other.tensors.items())

    both.run([partial(each, 2), partial(each, 3)])
    return max(off)


def test_runs_with_other_numbers_of_experts_train_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pack the smaller number would be padded, with experts that routers choose: planted, it is seen."""
    assert off_by_experts() < 1e-10
    monkeypatch.setattr(lockstep._Request, "key", lambda _self: ())
    assert off_by_experts() > 1e-4


@pytest.mark.slow
def test_settings_that_are_tried_do_not_mix(tmp_path: Path) -> None:
    """A scale is the method's, and no key of a training: cells that differ in it train one by one."""
    flat = {"tune.method.alpha": [2.0, 64.0], "data.dev-share": 0.2, "rounds": 1}
    for name, together in (("alone", 1), ("together", 3)):
        swept(tmp_path, name, together, **flat)
    found = [
        sorted(lines(cell)[0]["train_loss"] for cell in (tmp_path / "runs" / name / "cells").glob("tune-*"))
        for name in ("alone", "together")
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert found[0][0] < found[0][1] - 1e-6, "which another scale does change"


def test_a_pack_that_fails_is_trained_run_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under DP a round is paid before it trains: none of the runs pays for another's lack of memory."""
    train_pack, sizes = lockstep.train_pack, []

    def short(engine: Any, works: Any, *args: Any, **others: Any) -> Any:
        sizes.append(len(works))
        if len(works) > 4:
            raise torch.OutOfMemoryError("no memory for so many")
        return train_pack(engine, works, *args, **others)

    monkeypatch.setattr(lockstep, "train_pack", short)
    budget = {"privacy.mode": "dp", "privacy.epsilon": 8.0, "data.partition": "iid"}
    cells = swept(tmp_path, "together", 3, **budget)
    assert [size for size in sizes if size >= 4] == [12, 4, 4, 4] * 2, "and a trial with one client each before"
    assert [len(lines(cell)) for cell in cells] == [2, 2, 2], "all rounds"
    assert all(line["clients_ok"] == 4 for cell in cells for line in lines(cell))


def test_a_run_that_fails_stops_no_other(tmp_path: Path) -> None:
    """And an error that is no run's own is raised at the end."""
    both, log = Lockstep(), []

    def fails() -> None:
        raise OSError("no space left")

    def runs() -> None:
        log.append(threading.current_thread())

    with pytest.raises(OSError, match="no space left"):
        both.run([fails, runs])
    assert len(log) == 1


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mini.toml"
    file.write_text(to_toml({**tiny_flat(tmp_path), "grid.seed": SEEDS}))
    for options in (["--together", "2"], ["--in-process", "--together", "0"]):
        with pytest.raises(ConfigError, match=r"--together \d: must be 1 or more, and goes with --in-process"):
            run(["sweep", str(file), *options], Console(quiet=True))
