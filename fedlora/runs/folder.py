"""The run folder: everything that a user may want to know of a run, in files of plain formats."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from fedlora import __version__
from fedlora.config import Config, to_toml

_LIBRARIES = ("flwr", "flwr-datasets", "torch", "transformers", "peft", "ray", "numpy", "datasets", "tokenizers")


@dataclass(frozen=True)
class RunFolder:
    """Writes a run's files.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def create(cls, config: Config) -> RunFolder:
        """Make ``<run.dir>/<run.name>``, and write the configuration into it.

        Raises:
            ValueError: The folder holds a run already, or cannot be made.
        """
        path = run_path(config)
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            raise ValueError(
                f"run.name = {config.run.name!r}: {path} is there already; choose another name."
            ) from error
        except OSError as error:
            raise ValueError(f"run.dir = {config.run.dir!r}: the folder {path} cannot be made ({error}).") from error
        folder = cls(path)
        folder.write_text("config.toml", to_toml(config.to_flat()))
        return folder

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole, or leave what was there."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file whole, or leave what was there."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(data)
        partial.replace(target)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line of JSON; numbers that are not finite become null, JSON has none."""
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, allow_nan=False) + "\n")

    def checkpoint(
        self, round_number: int, tensors: Mapping[str, NDArray[np.floating]], state: Mapping[str, Any]
    ) -> None:
        """Write what the server holds after a round; the previous checkpoint stays until this one is whole."""
        name = f"round-{round_number}.safetensors"
        arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        self.write_bytes(f"checkpoint/{name}", save(arrays))
        self.write_json("checkpoint/state.json", {"round": round_number, "tensors": name, **state})
        for other in (self.path / "checkpoint").glob("round-*.safetensors"):
            if other.name != name:
                other.unlink()


def run_path(config: Config) -> Path:
    """Return the run's folder, whether or not it exists."""
    return (Path(config.run.dir).expanduser() / config.run.name).resolve()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
