"""Trackers: what each real backend holds afterwards, and that none can stop or slow a run."""

from __future__ import annotations

import json
import logging
import sqlite3
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlora.config import Config, ConfigError
from fedlora.plugins import read_config
from fedlora.runs.folder import RunFolder
from fedlora.server.observers import RoundEnd, Trackers
from fedlora.server.observers import trackers as observer
from simulations.setup import resolve
from tests.support.plugged import forgotten

PLUGIN = str(Path(__file__).parent / "support" / "trackers.py")
DP = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0}
RESULT = {
    "test_accuracy": 0.75,
    "bytes_up": 300,
    "rounds": 3,
    "head": "shared",
    "clients_accuracy": 0.6,
    "nothing": None,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    with forgotten():
        yield


def line(number: int) -> dict[str, Any]:
    measured = {"test_accuracy": 0.5 + number / 100, "personal_accuracy": 0.1 * number, "dev_accuracy": None}
    return {"round": number, **measured, "bytes_up": 100, "head": "shared", "epsilon": float("inf")}


def opened(config: Config) -> RunFolder:
    """Return a new run's folder, which nobody else writes."""
    with RunFolder.opened(config) as folder:
        return folder


def tracked(folder: Path, trackers: str, rounds: range, result: dict[str, Any] | None = RESULT, **flat: Any) -> Config:
    """Feed a run's lines to its trackers; after a first part it is a run that is continued."""
    config = read_config({"run.dir": str(folder), "run.name": "one", "run.trackers": trackers, **DP, **flat})
    first = not (folder / "one").exists()
    written = opened(config) if first else RunFolder(folder / "one")
    watching = Trackers(config, written, [line(number) for number in range(1, rounds.start)])
    for number in rounds:
        anything: Any = None
        watching.on_round(RoundEnd(number, anything, anything, {}, line=line(number)))
    watching.close(result)
    return config


CURVE = {1: 0.51, 2: 0.52, 3: 0.53}


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tracked(tmp_path, "tensorboard", range(1, 3), None)
    tracked(tmp_path, "tensorboard", range(2, 4))  # continued after round 1: the second is trained again
    events = EventAccumulator(str(tmp_path / "one" / "trackers" / "tensorboard"))
    events.Reload()
    scalars = {name: {one.step: one.value for one in events.Scalars(name)} for name in events.Tags()["scalars"]}
    assert scalars["test_accuracy"] == pytest.approx(CURVE)
    assert scalars["result/bytes_up"] == {3: 300}
    assert "epsilon" not in scalars, "infinite: metrics.jsonl has null"
    assert set(scalars) == {"test_accuracy", "personal_accuracy", "bytes_up", "result/test_accuracy"} | {
        "result/bytes_up",
        "result/rounds",
        "result/clients_accuracy",
    }
    texts = {tag: events.Tensors(tag)[-1].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts["outside the guarantee/text_summary"] == "personal_accuracy, clients_accuracy, nothing"
    assert f"| strategy.name | `{config.strategy.name}` |" in texts["config/text_summary"]


@pytest.mark.slow
def test_mlflow_reads_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It imports for seconds and makes a database; beside other tests, in a process that is nice, for much longer.
    monkeypatch.setattr(observer, "_PATIENCE_S", 300.0)
    config = tracked(tmp_path, "mlflow", range(1, 3), None)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("select status from runs").fetchall() == [("FAILED",)]
        tracked(tmp_path, "mlflow", range(3, 4))
        assert database.execute("select status, name from runs").fetchall() == [("FINISHED", "one")]
        params, tags = (dict(database.execute(f"select key, value from {table}")) for table in ("params", "tags"))
        metrics = {
            (name, step): value for name, step, value in database.execute("select key, step, value from metrics")
        }
    assert params == {key: str(value) for key, value in config.to_flat().items()}
    assert {step: value for (name, step), value in metrics.items() if name == "test_accuracy"} == CURVE
    assert (metrics["bytes_up", 3], metrics["result/bytes_up", 3]) == (100, 300)
    assert tags["outside the guarantee"] == "personal_accuracy, clients_accuracy, nothing"
    assert tags["result/head"] == "shared"


def wandb_records(file: Path) -> Iterator[dict[str, Any]]:
    """The records of a file of W&B: protocol buffers in blocks of 32 kB, as LevelDB's log has them."""
    from google.protobuf.json_format import MessageToDict
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _crc, size, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole one, or the last part of one
            message = wandb_internal_pb2.Record()
            message.ParseFromString(record)
            record = b""
            yield MessageToDict(message, preserving_proto_field_name=True)


def test_wandb_reads_it_back(tmp_path: Path) -> None:
    """Offline, as without a key; and what W&B collects by itself is not there."""
    config = tracked(tmp_path, "wandb", range(1, 4))
    (file,) = (tmp_path / "one" / "trackers" / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    found: dict[str, dict[str, Any]] = {"history": {}, "summary": {}, "config": {}}
    curve = {}
    for record in records:
        if "history" in record:
            items = {
                "".join(item.get("nested_key", [item.get("key", "")])): json.loads(item["value_json"])
                for item in record["history"]["item"]
            }
            curve[items["_step"]] = items["test_accuracy"]
        for item in record.get("summary", {}).get("update", []):
            found["summary"]["".join(item.get("nested_key", [item.get("key", "")]))] = json.loads(item["value_json"])
        for item in record.get("run", {}).get("config", {}).get("update", []):
            found["config"][item["key"]] = json.loads(item["value_json"])
    assert curve == CURVE
    assert found["summary"]["result/bytes_up"] == 300
    assert found["summary"]["outside the guarantee"] == "personal_accuracy, clients_accuracy, nothing"
    assert {key: found["config"][key] for key in config.to_flat()} == config.to_flat()
    assert {kind for record in records for kind in record} & {"stats", "output", "output_raw", "tbrecord"} == set()
    assert not list(file.parent.rglob("wandb-metadata.json"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-import", "no-import failed: ImportError: libbroken.so.1: cannot open shared object file"),
        ("raising", "raising failed: RuntimeError: the service said no"),
        ("killed", "killed failed"),
        ("exiting", "exiting failed: goodbye"),
        ("hanging", "hanging was not done in time after the end of the run"),
        ("hanging-end", "hanging-end was not done in time after the end of the run"),
    ],
)
def test_no_tracker_stops_or_slows_a_run(
    name: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is warned of once; a round never waits, and the end not long; its process is gone afterwards."""
    monkeypatch.setattr(observer, "_PATIENCE_S", 5.0 if name.startswith("hanging") else 60.0)
    config = read_config({"run.dir": str(tmp_path), "run.name": "one", "run.trackers": name, "run.plugins": PLUGIN})
    with caplog.at_level(logging.WARNING):
        slowest = fed(Trackers(config, opened(config), []), 3)
    assert slowest < 2.0
    assert f"run.trackers: {message}" in the_warning(caplog)


def test_a_tracker_that_falls_behind_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its queue is bounded: lines that it does not take are not kept for ever."""
    config = read_config(
        {"run.dir": str(tmp_path), "run.name": "one", "run.trackers": "hanging", "run.plugins": PLUGIN}
    )
    with caplog.at_level(logging.WARNING):
        slowest = fed(Trackers(config, opened(config), []), 5000)
    assert slowest < 2.0
    assert "run.trackers: hanging is 1000 lines behind" in the_warning(caplog)


def fed(watching: Trackers, rounds: int) -> float:
    """Feed rounds and a result; return the seconds that the slowest round took."""
    slowest = 0.0
    for number in range(1, rounds + 1):
        started = time.monotonic()
        anything: Any = None
        watching.on_round(RoundEnd(number, anything, anything, {}, line=line(number)))
        slowest = max(slowest, time.monotonic() - started)
    watching.close(RESULT)
    return slowest


def the_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The one warning of a tracker, whose process is gone."""
    (warned,) = [one.getMessage() for one in caplog.records if "run.trackers" in one.getMessage()]
    assert "the run goes on without it" in warned
    assert [one for one in psutil.Process().children() if "fedlora.track" in one.cmdline()] == []
    return warned


def test_what_cannot_work_is_refused_before_training(tmp_path: Path) -> None:
    for trackers, message in (
        ("tensorbord", r"run.trackers: unknown name 'tensorbord'. Did you mean 'tensorboard'"),
        ("mlflow, mlflow", r"run.trackers = 'mlflow, mlflow': names 'mlflow' twice"),
        ("missing", r"run.trackers = 'missing': 'missing' needs a package .* pip install a-package-that-nobody-has"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve({"run.trackers": trackers, "run.plugins": PLUGIN, "run.dir": str(tmp_path)})
    assert resolve({"run.trackers": " tensorboard , wandb "}).run.tracker_names == ("tensorboard", "wandb")
