"""Sweeps: a grid of runs in one resident process, hyper-parameters chosen on dev rows, one table at the end.

A sweep's file is a run configuration with two more tables. ``[grid]`` lists values by key, and every combination
of them is a cell. ``[tune]`` lists hyper-parameters to choose: for each combination but for the seed, with the first
seed, each is tried on dev rows, with the test rows not even loaded; the best then runs for every seed, and each of
those runs reads the test rows once, after its last round.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import statistics
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from clients.ray_site import TrainerLostError
from fedlora.config import Config, ConfigError, from_toml, to_toml
from fedlora.messages import first_line
from fedlora.reports.format import human_time
from fedlora.storage import write_whole
from fedlora.tasks import TASKS
from simulations.session import Session
from simulations.setup import resolve
from simulations.sweep_tables import summary, terminal_table

_DEV_SHARE = 0.1  # of the training rows that choices are made on, where the file does not say
_ATTEMPTS = 2  # of a cell in which the whole process died
Values = dict[str, Any]


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

    def groups(self, sweep: Sweep) -> list[Values]:
        """Return the groups."""
        return sweep.groups()[self.number - 1 :: self.of]

    def attempt(self, sweep: Sweep) -> Path:
        """Return the file that says which cell is running, and how often it was started without coming to an end."""
        return sweep.folder / f"attempt-{self.number}.json"

    def errors(self, sweep: Sweep) -> Path:
        """Return the file that says which cells failed, and why."""
        return sweep.folder / f"errors-{self.number}.json"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        stage: ``tune`` or ``final``.
        varied: What distinguishes it, by dotted key.
        config: Its resolved configuration.
    """

    stage: str
    varied: Values
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.config.run.dir) / self.config.run.name

    def outcome(self) -> dict[str, Any] | None:
        """Return what it came to; None where it did not finish."""
        file = self.folder / "result.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


@dataclass(frozen=True)
class Sweep:
    """A sweep, as its file says it.

    Attributes:
        base: The configuration that all cells share, by dotted key.
        grid: Values by key.
        tune: Values of the hyper-parameters to choose, by key.
    """

    base: Values
    grid: dict[str, list[Any]]
    tune: dict[str, list[Any]]

    @classmethod
    def read(cls, file: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Sweep:
        """Read a sweep's file over the app's ``defaults`` and under ``overrides``, and check every cell of it.

        Raises:
            ConfigError: It cannot be read, or a cell cannot work.
        """
        path = Path(file).expanduser()
        try:
            flat = from_toml(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the sweep {file} cannot be read: {first_line(error)}") from error
        parts: dict[str, dict[str, Any]] = {"grid": {}, "tune": {}, "": {}}
        for key, value in flat.items():
            table, _, rest = key.partition(".")
            where = table if table in ("grid", "tune") else ""
            parts[where][rest if where else key] = value
        for table in ("grid", "tune"):
            for key, values in parts[table].items():
                _check_values(table, key, values)
        for key in overrides or {}:
            if key in parts["grid"] or key in parts["tune"]:
                raise ConfigError(f"{key}: the sweep goes through values of it; change them in {file}.")
        base = {
            **defaults,
            **parts[""],
            **(overrides or {}),
            "run.sweep": "",
            "run.share": str(Share()),
            "run.resume": False,
        }
        base["run.name"] = base["run.name"] or path.stem
        if parts["tune"]:
            base["data.dev-share"] = base["data.dev-share"] or _DEV_SHARE
        sweep = cls(base, parts["grid"], parts["tune"])
        sweep._check()
        return sweep

    @property
    def first(self) -> Config:
        """The configuration with the first of all values: what all cells share can be read from it."""
        values = {key: values[0] for key, values in (*self.grid.items(), *self.tune.items())}
        return resolve({**self.base, **values})

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(str(self.base["run.dir"]), str(self.base["run.name"])).expanduser().resolve()

    def to_toml(self) -> str:
        """Return the sweep as a file that :meth:`read` understands."""
        tables = {"grid": self.grid, "tune": self.tune}
        return to_toml(
            {
                **self.base,
                **{f"{table}.{key}": values for table, part in tables.items() for key, values in part.items()},
            }
        )

    def _check(self) -> None:
        both = sorted(set(self.grid) & set(self.tune))
        if both:
            raise ConfigError(f"{both[0]} is in [grid] and in [tune]; a key is either compared or chosen.")
        if "seed" in self.tune:
            raise ConfigError("seed is in [tune]: a seed is not chosen by its result; put it in [grid].")
        if "train.learning-rate" in self.grid and self.base["eval.test"]:
            raise ConfigError(
                "train.learning-rate is in [grid]: the best of them would be chosen by the test rows. Put it in "
                "[tune], which chooses on dev rows, or set eval.test = false."
            )
        if not self.grid and not self.tune:
            raise ConfigError("the sweep has neither [grid] nor [tune]: it is a single run, for fedlora run.")
        for cell in self.tuning():  # every combination of values, whether or not it will be chosen
            assert cell.config
        for varied in _combinations(self.grid):
            self._cell("final", {**varied, **{key: values[0] for key, values in self.tune.items()}})

    def groups(self) -> list[Values]:
        """Return the combinations of the grid but for the seed."""
        return list(_combinations({key: values for key, values in self.grid.items() if key != "seed"}))

    def tuning(self, group: Values | None = None) -> list[Cell]:
        """Return the cells on which hyper-parameters are chosen, of one group or of all."""
        if not self.tune:
            return []
        seed = {"seed": self.grid["seed"][0]} if "seed" in self.grid else {}
        chosen = self.groups() if group is None else [group]
        return [self._cell("tune", {**one, **seed, **tried}) for one in chosen for tried in _combinations(self.tune)]

    def finals(self, group: Values, chosen: Values) -> list[Cell]:
        """Return the cells of a group for every seed, with the hyper-parameters that were chosen."""
        seeds: list[Values] = [{"seed": seed} for seed in self.grid["seed"]] if "seed" in self.grid else [{}]
        return [self._cell("final", {**group, **seed, **chosen}) for seed in seeds]

    def size(self) -> int:
        """Return the number of cells."""
        return len(self.tuning()) + sum(len(self.finals(group, {})) for group in self.groups())

    def _cell(self, stage: str, varied: Values) -> Cell:
        flat = {**self.base, **varied}
        if stage == "tune":
            flat |= {"eval.test": False, "eval.baselines": False}
        told = json.dumps({key: value for key, value in flat.items() if not key.startswith("run.")}, sort_keys=True)
        words = [
            re.sub(r"[^A-Za-z0-9.]+", "-", Path(str(value)).stem if "/" in str(value) else str(value))
            for value in varied.values()
        ]
        name = "-".join([stage, *words])[:80] + "-" + hashlib.sha256(told.encode()).hexdigest()[:8]
        return Cell(stage, varied, resolve({**flat, "run.dir": str(self.folder / "cells"), "run.name": name}))

    def choose(self, group: Values) -> Values:
        """Return the hyper-parameters that did best on the dev rows of a group.

        Raises:
            ValueError: None of the group's cells finished.
        """
        if not self.tune:
            return {}
        scored = [(score, cell) for cell in self.tuning(group) if (score := _dev(cell)) is not None]
        if not scored:
            raise ValueError(f"no cell of {_told(group)} finished, so nothing can be chosen for it")
        higher = TASKS[scored[0][1].config.task].measure.higher_is_better
        best = (max if higher else min)(scored, key=lambda pair: pair[0])[1]
        return {key: best.varied[key] for key in self.tune}

    # -- running ------------------------------------------------------------------------------------------

    def run(self, session: Session, console: Console, share: Share) -> None:
        """Run what has not run yet of a share; a cell that fails costs itself only."""
        progress = _Progress(self, console, share)
        for group in share.groups(self):
            for cell in self.tuning(group):
                progress.run(cell, session)
            try:
                chosen = self.choose(group)
            except ValueError as error:
                progress.skip(group, error)
                continue
            for cell in self.finals(group, chosen):
                progress.run(cell, session)
        self.write_tables()

    def finish(self, console: Console) -> None:
        """Write the tables and ``summary.md``, and print what came of it."""
        self.write_tables()
        write_whole(self.folder / "summary.md", summary(self).encode())
        console.print(terminal_table(self))
        for name, reason in self.errors().items():
            console.print(f"failed: {name}: {reason}", markup=False)
        console.print(f"sweep folder: {self.folder}", markup=False)

    def errors(self) -> dict[str, str]:
        """Return why cells failed, by the names of their folders, whatever process ran them."""
        told: dict[str, str] = {}
        for file in sorted(self.folder.glob("errors-*.json")):
            told |= json.loads(file.read_text(encoding="utf-8"))
        return told

    def cells(self, share: Share | None = None) -> Iterator[Cell]:
        """Yield the cells that are known by now, of a share or all: tuning, and what was chosen for the end."""
        for group in (share or Share()).groups(self):
            yield from self.tuning(group)
            try:
                yield from self.finals(group, self.choose(group))
            except ValueError:
                continue

    def unfinished(self, share: Share | None = None) -> list[Cell]:
        """Return the known cells without a result, of a share or all."""
        return [cell for cell in self.cells(share) if cell.outcome() is None]

    def state(self, share: Share) -> tuple[int, str]:
        """Return how far a share is: cells without a result, and attempts at the one that is running."""
        file = share.attempt(self)
        return len(self.unfinished(share)), file.read_text(encoding="utf-8") if file.is_file() else ""

    def write_tables(self) -> None:
        """Write ``results`` (a line a cell) and ``groups`` (mean and spread over seeds), as parquet and csv."""
        rows, errors = [], self.errors()
        for cell in self.cells():
            outcome = cell.outcome()
            error = errors.get(cell.config.run.name, "")
            status = "ok" if outcome is not None else "failed" if error else "missing"
            varied = {key: cell.varied.get(key) for key in (*self.grid, *self.tune)}
            told = {key: value for key, value in (outcome or {}).items() if isinstance(value, int | float)}
            rows.append(
                {"stage": cell.stage, **varied, "status": status, **told, "error": error, "folder": str(cell.folder)}
            )
        results = pd.DataFrame(rows)
        _write_table(self.folder / "results", results)
        _write_table(self.folder / "groups", self._grouped(results))

    def _grouped(self, results: pd.DataFrame) -> pd.DataFrame:
        """Return mean, standard deviation and number of the finished final cells of each group, for every number."""
        keys = [key for key in (*self.grid, *self.tune) if key != "seed"]
        done = results[(results["stage"] == "final") & (results["status"] == "ok")]
        rows = []
        for _, group in done.groupby([done[key].astype(str) for key in keys], sort=False) if keys else [("", done)]:
            if group.empty:
                continue
            row: Values = {key: group[key].iloc[0] for key in keys} | {"n": len(group)}
            for name in group.columns:
                values = group[name].dropna()
                if name not in (*keys, "seed") and len(values) and pd.api.types.is_numeric_dtype(values):
                    row |= {f"{name}_mean": values.mean(), f"{name}_std": values.std() if len(values) > 1 else math.nan}
                    if len(values) < len(group):
                        row[f"{name}_n"] = len(values)  # the others have no such number
            rows.append(row)
        return pd.DataFrame(rows)


class _Progress:
    """Runs cells one after the other, says how far it got, and remembers what failed."""

    def __init__(self, sweep: Sweep, console: Console, share: Share) -> None:
        self.sweep = sweep
        self.console = console
        self.share = share
        self.errors: dict[str, str] = {}
        self.number = 0
        groups = share.groups(sweep)
        self.total = sum(len(sweep.tuning(group)) + len(sweep.finals(group, {})) for group in groups)
        self._remember()
        self._seconds: list[float] = []

    def run(self, cell: Cell, session: Session) -> None:
        """Run a cell, or go on with it, unless it is finished."""
        self.number += 1
        started = time.monotonic()
        outcome = cell.outcome()
        if outcome is not None:
            self._say(cell, outcome, "was there already")
            return
        try:
            self._count_attempt(cell)
            resume = (cell.folder / "config.toml").is_file()
            config = resolve({**cell.config.to_flat(), "run.resume": resume})
            outcome = session.run(config, Console(quiet=True))
        except Exception as error:  # whatever it is, it is this cell's own
            if isinstance(error, TrainerLostError):
                session.stop()  # the next cell gets new ones
            self.errors[cell.config.run.name] = f"{type(error).__name__}: {first_line(error)}"
            self._remember()
            self._say(cell, None, self.errors[cell.config.run.name])
            self._forget_attempt()
        else:
            self._forget_attempt()
            self._seconds.append(time.monotonic() - started)
            left = (self.total - self.number) * statistics.median(self._seconds)  # the first one starts the trainers
            self._say(cell, outcome, f"{self._seconds[-1]:.1f} s" + (f", {human_time(left)} left" if left >= 1 else ""))
        self.sweep.write_tables()

    def skip(self, group: Values, error: ValueError) -> None:
        """Leave out the final cells of a group for which nothing could be chosen."""
        self.number += len(self.sweep.finals(group, {}))
        self.errors[_told(group)] = str(error)
        self._remember()

    def _remember(self) -> None:
        """Write the errors where the tables of all shares are made from; of earlier calls none is left."""
        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.share.errors(self.sweep), json.dumps(self.errors).encode())

    def _count_attempt(self, cell: Cell) -> None:
        """Give up a cell in which the process died over and over."""
        file = self.share.attempt(self.sweep)
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        count = before.get("count", 0) + 1 if before.get("cell") == cell.config.run.name else 1
        if count > _ATTEMPTS:
            raise RuntimeError(f"the whole process ended {_ATTEMPTS} times in this cell")
        write_whole(file, json.dumps({"cell": cell.config.run.name, "count": count}).encode())

    def _forget_attempt(self) -> None:
        self.share.attempt(self.sweep).unlink(missing_ok=True)

    def _say(self, cell: Cell, outcome: Mapping[str, Any] | None, remark: str) -> None:
        measure = TASKS[cell.config.task].measure.name
        found = [
            name for name in (f"test_{measure}", f"personal_{measure}", f"dev_{measure}") if name in (outcome or {})
        ]
        value = f"{found[0].replace('_', ' ')} {outcome[found[0]]:.4f}" if outcome and found else "failed"
        share = f"[{self.share}] " if self.share.of > 1 else ""
        self.console.print(
            f"{share}cell {self.number}/{self.total} {cell.stage}  {_told(cell.varied)}  {value}  {remark}",
            markup=False,
        )


def _dev(cell: Cell) -> float | None:
    """Return what a tuning cell is chosen by: its measure on rows that are not test rows."""
    outcome = cell.outcome() or {}
    measure = TASKS[cell.config.task].measure.name
    value = outcome.get(f"dev_{measure}", outcome.get(f"personal_{measure}"))
    return float(value) if value is not None and math.isfinite(value) else None


def _check_values(table: str, key: str, values: Any) -> None:
    if not isinstance(values, list) or not values:
        raise ConfigError(f"[{table}] {key} = {values!r}: must be a list of values, such as [1, 2].")
    if len({str(value) for value in values}) < len(values):
        raise ConfigError(f"[{table}] {key} = {values!r}: holds a value twice.")


def _combinations(values: Mapping[str, list[Any]]) -> Iterator[Values]:
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _told(varied: Values) -> str:
    return " ".join(f"{key}={value}" for key, value in varied.items()) or "the base configuration"


def _write_table(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A column of mixed types, such as learning rates beside a missing one, is text to parquet.
    plain = table.convert_dtypes()
    write_whole(path.with_suffix(".parquet"), plain.to_parquet(index=False))
    write_whole(path.with_suffix(".csv"), plain.to_csv(index=False).encode())
