"""The run folder: what it refuses to share and to continue, and checkpoints that come back to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import Config
from fedlora.plugins import read_config
from fedlora.runs.folder import RunFolder, read_lines


def config_of(folder: Path, **flat: Any) -> Config:
    return read_config({"run.dir": str(folder), "run.name": "run", "rounds": 4, **flat})


def opened(folder: Path, **flat: Any) -> RunFolder:
    """A run's folder as it is when the run has just begun, or goes on."""
    with RunFolder.opened(config_of(folder, **flat)) as written:
        return written


def finished(folder: Path, **flat: Any) -> RunFolder:
    """A run of four rounds that is finished."""
    written = opened(folder, **flat)
    written.append("metrics.jsonl", *({"round": number} for number in range(1, 5)))
    written.checkpoint(4, {"B": np.ones(3)}, {"base": "mine", "start": "seed"})
    written.write_json("result.json", {"test_accuracy": 0.5})
    return written


def test_a_run_folder_is_not_shared(tmp_path: Path) -> None:
    opened(tmp_path)
    with pytest.raises(ValueError, match=r"run.name = 'run': .* is there already; choose another name"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"is finished; raise rounds to go on with it"),
        ({"seed": 5}, r"another configuration: seed was 0 and is 5"),
        ({"train.batch-size": 2}, r"train.batch-size was 8 and is 2"),
        ({"run.name": "none"}, r"holds no run to continue; start it without run.resume"),
    ],
)
def test_what_cannot_be_resumed_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, **{"run.resume": True, **changes})


def test_a_finished_run_is_known_before_anything_starts(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(ValueError, match=r"is finished; raise rounds to go on with it"):
        RunFolder.check(config_of(tmp_path, **{"run.resume": True}))
    RunFolder.check(config_of(tmp_path, **{"run.resume": True, "rounds": 5}))


def test_what_a_run_settles_is_no_other_configuration(tmp_path: Path) -> None:
    """The planted bug: a command compared what it was given with what data and Flower had made of it."""
    dp: dict[str, Any] = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-5}
    opened(tmp_path, **dp, **{"privacy.client-size": 19})
    RunFolder.check(config_of(tmp_path, **dp, **{"run.resume": True}))  # as it was first given, with the size left open
    opened(tmp_path, **dp, **{"run.resume": True, "privacy.client-size": 19})
    with pytest.raises(ValueError, match=r"privacy.client-size was 19 and is 0"):
        opened(tmp_path, **dp, **{"run.resume": True})


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_more_rounds_than_a_schedule_was_laid_out_for(schedule: str, tmp_path: Path) -> None:
    """With a constant rate a run may be made longer; with a schedule its past rounds would have been others."""
    keys: dict[str, Any] = {"train.round-schedule": schedule}
    written = finished(tmp_path, **keys)
    (written.path / "result.json").unlink()
    keys |= {"run.resume": True}
    assert opened(tmp_path, **keys).path == written.path, "it did not finish"
    with pytest.raises(
        ValueError, match=rf"rounds was 4 and is 9, but train.round-schedule = '{schedule}'.* rounds = 4"
    ):
        opened(tmp_path, **{**keys, "rounds": 9})


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    folder = opened(tmp_path, **{"rounds": 9, "run.resume": True})
    with pytest.raises(ValueError, match=r"the checkpoint in .* has base = 'mine', and this is 'other'"):
        folder.read_checkpoint({"base": "other"})
    with pytest.raises(ValueError, match=r"has start = 'seed', and this is 'other' \(the adapter in method.start, or "):
        folder.read_checkpoint({"base": "mine", "start": "other"})
    file = folder.path / "checkpoint" / "state.json"
    state = json.loads(file.read_text())
    for key, value in {"fedlora": "0.0.1", "format": 3}.items():
        file.write_text(json.dumps({**state, key: value}))
        with pytest.raises(ValueError, match=rf"has {key} = {value!r}, and this is"):
            folder.read_checkpoint({})


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Any type and shape, names with a slash, a nested state; what was written after it is taken back."""
    folder = opened(tmp_path)
    generator = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "m.0.q.lora_B": generator.standard_normal((3, 4)).astype(np.float32),
        "optimizer/second/m.0.q.lora_B": generator.standard_normal((4, 3)).T,
        "step": np.array(7),
        "empty": np.zeros((0, 5)),
    }
    state = {
        "clients": {"3": {"rounds": [1, 2], "spent": False}},
        "rate": 0.1 + 0.2,
        "best": math.inf,
        "seen": [[0, 1]],
    }
    folder.append("metrics.jsonl", {"round": 1}, {"round": 2}, {"round": 3})
    folder.checkpoint(1, {"old": np.ones(1)}, {})
    folder.checkpoint(2, arrays, state)
    read = RunFolder(folder.path).read_checkpoint({})
    assert read is not None
    assert read.round == 2
    assert read.arrays.keys() == arrays.keys()
    for name, value in arrays.items():
        assert (read.arrays[name].dtype, read.arrays[name].shape) == (value.dtype, value.shape)
        assert np.array_equal(read.arrays[name], value)
    assert {key: read.state[key] for key in state} == state
    assert [line["round"] for line in read_lines(folder.path / "metrics.jsonl")] == [1, 2]
    assert [path.name for path in folder.path.glob("checkpoint/*.safetensors")] == ["round-2.safetensors"]


def test_a_state_that_json_would_change_is_refused(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(AssertionError, match="must be texts"):
        folder.checkpoint(1, {}, {"versions": [{3: 1}]})
    with pytest.raises(AssertionError, match="are a checkpoint's own entries"):
        folder.checkpoint(1, {}, {"round": 1})


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    """What a process that was killed in mid-write leaves."""
    (tmp_path / "metrics.jsonl").write_text('{"round": 1}\n{"round": 2, "los')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"round": 1}]


def test_lines_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("clients.jsonl", {"loss": float("nan"), "steps": 3, "other": float("inf")})
    assert "NaN" not in (tmp_path / "clients.jsonl").read_text()
    assert read_lines(tmp_path / "clients.jsonl") == [{"loss": None, "steps": 3, "other": None}]
