"""The run folder: configuration, metrics, checkpoints and records of a run, in files of plain formats."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fedlora import __version__
from fedlora.config import Config, from_toml, to_toml
from fedlora.plugins import schema
from fedlora.runs.lock import LOCK_FILES, held, refuse_held
from fedlora.storage import append_whole, check_can_write, write_whole, writing

_LIBRARIES = (
    *("flwr", "flwr-datasets", "torch", "transformers", "peft", "ray", "numpy", "datasets", "tokenizers"),
    *("opacus", "dp-accounting", "cryptography"),
)


CHECKPOINT_FORMAT = 5  # raise when what a checkpoint holds, or what it means, changes
_MAY_DIFFER = (
    *(
        "run.resume",
        "run.trackers",
        "rounds",
        "method.start",  # where it is; what is there is compared with the checkpoint
        "federation.timeout",
        "federation.failure-threshold",
        "federation.roster",
    ),
    *("federation.min-replies", "federation.grace", "federation.wait", "federation.max-change"),
)

_BEHIND = {"start": " (the adapter in method.start, or the head in the model's checkpoint, is not what it was)"}


@dataclass(frozen=True)
class Checkpoint:
    """What a run that is continued starts from.

    Attributes:
        round: Rounds that are complete.
        arrays: The arrays that were written after them.
        state: What else was written with them, as JSON has it: lists for tuples.
    """

    round: int
    arrays: dict[str, NDArray[Any]]
    state: dict[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    @contextmanager
    def opened(cls, config: Config, laid_out: str = "") -> Iterator[RunFolder]:
        """Make a run's folder, or continue the run in it, and keep every other process from writing it meanwhile.

        Args:
            config: The run's configuration.
            laid_out: The key, with its value, by which the strategy lays the run out over its rounds; empty: none.

        Raises:
            ValueError: Another process writes it, or as for :meth:`check`; or ``run.resume`` finds a run that is
                finished or of another configuration.
            StorageError: It cannot be made or written.
        """
        path = run_path(config)
        _check_place(config, path)  # a folder is not made for what cannot be
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        with held(path):
            _check_start(config, path)
            if config.run.resume:
                _check_same(config, path)
                _check_rounds(config, path, laid_out)
            for partial in path.rglob("*.partial"):  # of a process that was killed while it wrote
                partial.unlink(missing_ok=True)
            if config.run.resume:
                (path / "result.json").unlink(missing_ok=True)
            folder = cls(path)
            folder.write_text("config.toml", to_toml({**config.to_flat(), "run.resume": False}))
            yield folder

    @staticmethod
    def check(config: Config, laid_out: str = "") -> None:
        """Refuse what :meth:`opened` would refuse whatever Flower and the data settle, and change nothing.

        Args:
            config: The run's configuration.
            laid_out: As for :meth:`opened`.

        Raises:
            ValueError: Another process writes the folder, it holds a run already, or none that ``run.resume`` could
                continue.
            StorageError: It cannot be made or written.
        """
        path = run_path(config)
        _check_place(config, path)
        if config.run.resume:
            _check_rounds(config, path, laid_out)

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole, or leave what was there."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole, or leave what was there."""
        target = self.path / name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file; numbers that are not finite become null, JSON has none."""
        self.write_text(name, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")

    def write_lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Write a file of JSON lines whole."""
        self.write_text(name, "".join(map(_line, records)))

    def append(self, name: str, *records: Mapping[str, Any]) -> None:
        """Append lines of JSON, all of them or none."""
        append_whole(self.path / name, "".join(map(_line, records)).encode())

    def checkpoint(self, round_number: int, arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> None:
        """Write what the server holds after a round; the previous checkpoint stays until this one is whole.

        Args:
            round_number: Rounds that are complete.
            arrays: Arrays of any shape and type, by names of any characters.
            state: What else a run starts from: JSON values, nested as they may be, whose mappings have texts as keys.
                Numbers come back to the bit, infinite ones included.
        """
        name = f"round-{round_number}.safetensors"
        self.write_bytes(f"checkpoint/{name}", save({key: np.asarray(one, order="C") for key, one in arrays.items()}))
        header = {"format": CHECKPOINT_FORMAT, "fedlora": __version__, "round": round_number, "tensors": name}
        assert not set(header) & set(state), f"{sorted(set(header) & set(state))} are a checkpoint's own entries"
        _check_keys(state)
        self.write_text("checkpoint/state.json", json.dumps({**header, **state}, indent=2) + "\n")
        for other in (self.path / "checkpoint").glob("round-*.safetensors"):
            if other.name != name:
                other.unlink()

    def read_checkpoint(self, same: Mapping[str, Any]) -> Checkpoint | None:
        """Return the last checkpoint, and take back what was written after it; None where there is none yet.

        Args:
            same: Entries of the state that must be as they were.

        Raises:
            ValueError: It is of another version, or made with something else.
        """
        file = self.path / "checkpoint" / "state.json"
        state: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"round": 0}
        wanted = {"format": CHECKPOINT_FORMAT, "fedlora": __version__, **same} if file.is_file() else {}
        for key, value in wanted.items():
            if state.get(key) != value:
                raise ValueError(
                    f"run.resume = true: the checkpoint in {self.path} has {key} = {state.get(key)!r}, and this is "
                    f"{value!r}{_BEHIND.get(key, '')}; continue it with what it was made with, or start a new run."
                )
        for name in ("metrics.jsonl", "clients.jsonl", "packs.jsonl"):
            if (self.path / name).is_file():
                lines = read_lines(self.path / name)
                self.write_lines(name, [line for line in lines if line["round"] <= state["round"]])
        if not file.is_file():
            return None
        return Checkpoint(state["round"], load_file(self.path / "checkpoint" / state["tensors"]), state)


def _check_place(config: Config, path: Path) -> None:
    """Refuse a folder that another process writes, that cannot be written, or that holds the wrong thing."""
    refuse_held(path)
    _check_start(config, path)
    check_can_write(path)


def _check_start(config: Config, path: Path) -> None:
    """Refuse a new run where one is, and to continue one that is not there."""
    if config.run.resume:
        if not (path / "config.toml").is_file():
            raise ValueError(f"run.resume = true: {path} holds no run to continue; start it without run.resume.")
        return
    own = [one for one in path.iterdir() if one.name not in LOCK_FILES] if path.is_dir() else []
    # An empty one is what a run leaves that is killed right here.
    if any(one.suffix != ".partial" for one in own):
        raise ValueError(
            f"run.name = {config.run.name!r}: {path} is there already; choose another name, or continue that run "
            "with run.resume = true."
        )


def _settled(path: Path) -> dict[str, Any]:
    """Return a run's settled configuration; keys that are newer than the run have their defaults."""
    return {**schema().defaults(), **from_toml((path / "config.toml").read_text(encoding="utf-8"))}


def _check_rounds(config: Config, path: Path, laid_out: str) -> None:
    """Refuse to continue a run that is finished, or for another number of rounds than it was laid out for."""
    before, rounds, schedule = _settled(path)["rounds"], config.rounds, config.train.round_schedule
    why = f"train.round-schedule = {schedule!r}" if schedule != "constant" else laid_out
    if before != rounds and why:
        raise ValueError(
            f"run.resume = true: rounds was {before} and is {rounds}, but {why} was laid out for {before} rounds: with "
            f"another number, those behind it would have been trained otherwise. Continue with rounds = {before}, or "
            "start a new run."
        )
    if (path / "result.json").is_file() and before == rounds:
        raise ValueError(f"run.resume = true: the run in {path} is finished; raise rounds to go on with it.")


def _check_same(config: Config, path: Path) -> None:
    """Refuse to continue a run of another settled configuration; whether its checkpoint can be read is seen later."""
    before, now = _settled(path), config.to_flat()
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key) and key not in _MAY_DIFFER]
    if differing:
        shown = "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in differing[:5])
        raise ValueError(
            f"run.resume = true: the run in {path} has another configuration: {shown}. Continue it with its own "
            "config.toml (only rounds may change), or start a new run."
        )


def _line(record: Mapping[str, Any]) -> str:
    """Return a record as a line; numbers that are not finite become null, JSON has none."""
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _check_keys(value: Any) -> None:
    """Refuse mappings that JSON would change: it has only texts as keys."""
    if isinstance(value, Mapping):
        assert all(isinstance(key, str) for key in value), f"keys of a checkpoint's state must be texts: {list(value)}"
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for one in value:
        _check_keys(one)


def finite(value: Any) -> Any:
    """Return a value with null for every number in it that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def run_path(config: Config) -> Path:
    """Return the run's folder, whether or not it exists."""
    return (Path(config.run.dir).expanduser() / config.run.name).resolve()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, but for a last one that a killed process left unfinished."""
    *whole, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole if line.strip()]


def environment(fingerprint: str) -> dict[str, Any]:
    """Return what the run ran on: versions, machine, code."""
    return {
        "fedlora": __version__,
        "fingerprint": fingerprint,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _commit() -> str | None:
    """Return the commit of the working directory, if it is a checkout of git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
