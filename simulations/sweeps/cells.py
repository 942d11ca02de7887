"""The runs that a sweep consists of, and the shares of them that processes take."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from fedlora.config import Config, ConfigError
from fedlora.metrics import Metric, Population
from fedlora.tasks import TASKS
from simulations.setup import resolve

Values = dict[str, Any]


@final
@dataclass(frozen=True)
class Share:
    """The groups of a sweep that one of several processes runs: each n-th.

    Attributes:
        number: Which of them, from 1.
        of: How many there are.
    """

    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        """Read a share such as ``2/4``, the value of ``run.share``."""
        number, of = text.split("/")
        return cls(int(number), int(of))

    def __str__(self) -> str:
        """Return the share as ``run.share`` has it."""
        return f"{self.number}/{self.of}"


@final
@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        stage: ``tune`` or ``final``.
        varied: What distinguishes it, by dotted key or the column of cases.
        flat: Its configuration, by dotted key.
    """

    stage: str
    varied: Values
    flat: Values

    @cached_property  # a sweep lists its cells often, thousands of them, and asks most of them for their folder alone
    def config(self) -> Config:
        """Its resolved configuration.

        Raises:
            ConfigError: It cannot work.
        """
        return resolve(self.flat)

    @classmethod
    def of(cls, stage: str, flat: Values, varied: Values, folder: Path) -> Cell:
        """Return the cell of a configuration, whose run folder is named by what distinguishes it and a digest.

        Args:
            stage: ``tune`` or ``final``.
            flat: The configuration.
            varied: What distinguishes it from that of other cells.
            folder: Where run folders go.
        """
        if stage == "tune":
            flat = {**flat, "eval.test": False, "eval.baselines": False}
        identity = json.dumps({key: value for key, value in flat.items() if not key.startswith("run.")}, sort_keys=True)
        words = [
            re.sub(r"[^A-Za-z0-9.]+", "-", Path(str(value)).stem if "/" in str(value) else str(value))
            for value in varied.values()
        ]
        name = "-".join([stage, *words])[:80] + "-" + hashlib.sha256(identity.encode()).hexdigest()[:8]
        return cls(stage, varied, {**flat, "run.dir": str(folder), "run.name": name})

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.flat["run.dir"]) / self.name

    @property
    def name(self) -> str:
        """Its name in the sweep, that of its folder."""
        return str(self.flat["run.name"])

    def outcome(self) -> dict[str, Any] | None:
        """Return its result; None where it did not finish."""
        file = self.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def score(self) -> float | None:
        """Return the number that a tuning cell is chosen by: its measure on rows that are not test rows."""
        outcome = self.outcome() or {}
        _, personal, dev = measures(self.config)
        value = outcome.get(dev.key, outcome.get(personal.key))
        return float(value) if value is not None and math.isfinite(value) else None


def measures(config: Config) -> tuple[Metric, Metric, Metric]:
    """Return the measure of a configuration's task on test rows, on clients' own, and on dev rows."""
    name = TASKS[config.task].measure.name
    return Metric(name, Population.TEST), Metric(name, Population.PERSONAL), Metric(name, Population.DEV)


def combinations(values: Mapping[str, list[Any]]) -> Iterator[Values]:
    """Yield every combination of the values of some keys."""
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def check_values(table: str, key: str, values: Any) -> None:
    """Refuse what is not a list of different values.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(values, list) or not values:
        raise ConfigError(f"[{table}] {key} = {values!r}: must be a list of values, such as [1, 2].")
    if len({str(value) for value in values}) < len(values):
        raise ConfigError(f"[{table}] {key} = {values!r}: holds a value twice.")


def describe(varied: Values) -> str:
    """Return what distinguishes a cell, or a group of them, in words."""
    return " ".join(f"{key}={value}" for key, value in varied.items()) or "the base configuration"
