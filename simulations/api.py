"""Runs, sweeps, plans and reports from Python: what notebooks and other people's scripts call.

Each function takes a configuration as dotted keys, over the app's own, and does what the command of its name does::

    from simulations.api import plan, run, sweep

    plan({"strategy.name": "ffa-lora"}).record()
    one = run("first", {"rounds": 3})  # through `flwr run`; a fedlora.reports.run.Run, read from its folder
    many = sweep("grid", {}, {"strategy.name": ["fedavg", "ffa-lora"], "seed": [0, 1, 2]})
    many.groups  # a data frame: mean and deviation by cell

What has run is not run again: the folder is read. Frames of runs are in :mod:`fedlora.reports.frames`, figures in
:mod:`fedlora.reports.plots` and :mod:`fedlora.reports.privacy_plots`, what a budget buys in :mod:`simulations.budget`,
attacks in :mod:`simulations.membership`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pandas as pd

from fedlora.config import Config, ConfigError, to_toml
from fedlora.reports.comparison import comparison
from fedlora.reports.run import Run
from fedlora.reports.summary import write_report
from fedlora.runs.folder import run_path
from simulations.launch import COLOURS, SUPERNODES
from simulations.options import absolute_paths, read_overrides
from simulations.plan import Plan
from simulations.preflight import preflight
from simulations.setup import resolve
from simulations.sweeps.file import Sweep
from simulations.sweeps.tables import pairs_of, write_tables

APP = Path(__file__).resolve().parents[1]
"""The app that is run: this checkout."""

Settings = Mapping[str, Any]
"""Values by dotted key, such as ``{"train.max-length": 32}``; see docs/configuration.md."""

_TOLD = ("round ", "cell ", "estimate")
# Keys that a run gives a value where the configuration leaves them open.
_FILLED_IN = (
    "data.chat-template",
    "federation.num-clients",
    "train.learning-rate",
    "privacy.client-size",
    "privacy.delta",
    "privacy.noise-multiplier",
)
_TAIL = 40  # lines of a failed command's output


class CommandError(RuntimeError):
    """A command failed, and has printed why."""


@final
@dataclass(frozen=True)
class Swept:
    """A sweep that has run.

    Attributes:
        sweep: Its cells.
        results: A line a cell.
        groups: Mean (``..._mean``), deviation (``..._std``) and number (``n``) of finished cells, by what they vary in.
        pairs: Differences of any two combinations, seed by seed (:mod:`fedlora.reports.paired`); empty with one seed.
    """

    sweep: Sweep
    results: pd.DataFrame
    groups: pd.DataFrame
    pairs: pd.DataFrame

    @property
    def runs(self) -> list[Run]:
        """The runs of the finished final cells, in the order of ``results``."""
        done = self.results[(self.results["stage"] == "final") & (self.results["status"] == "ok")]
        return [Run.read(Path(folder)) for folder in done["folder"]]


def run(name: str, settings: Settings, *, folder: Path | str = "runs", again: bool = False) -> Run:
    """Run one federation as ``fedlora run`` does, and return it; one that has finished is read.

    Args:
        name: Of the run's folder.
        settings: The configuration, over the app's own.
        folder: What run folders are in.
        again: Whether to go on with a run that did not finish.

    Raises:
        ConfigError: The configuration cannot work, or the folder holds a run of another one.
        CommandError: The run failed.
    """
    own = {"run.name": name, "run.dir": str(folder)}
    whole = configuration(settings, own)
    path = run_path(whole)
    if (path / "result.json").is_file():
        done = Run.read(path)
        _check_same(whole, done)
        return done
    if (path / "config.toml").is_file():
        if not again:
            raise ConfigError(
                f"{path} holds a run that did not finish: go on with it by again=True, or remove the folder."
            )
        whole = configuration(settings, {**own, "run.resume": True})
    if _command("run", str(APP), "-c", _file(whole, path.parent)) != 0:
        raise CommandError(f"the run {name} failed; what it printed last is above")
    return Run.read(path)


def sweep(
    name: str,
    settings: Settings,
    grid: Mapping[str, Sequence[Any]],
    *,
    tune: Mapping[str, Sequence[Any]] | None = None,
    folder: Path | str = "runs",
    workers: int = 1,
    partial: bool = False,
) -> Swept:
    """Run a grid of federations as ``fedlora sweep`` does; cells that have finished are read.

    Args:
        name: Of the sweep's folder.
        settings: The configuration that all cells share, over the app's own.
        grid: Values by key, every combination of which is a cell; ``seed`` repeats cells.
        tune: Hyper-parameters to choose on dev rows, by key.
        folder: What the sweep's folder is in.
        workers: Processes side by side, on all GPUs.
        partial: Whether to return what has finished where cells failed; ``results`` says why.

    Raises:
        ConfigError: A cell cannot work.
        CommandError: A cell failed.
    """
    own = absolute_paths({**settings, "run.name": name, "run.dir": str(folder)})
    varied = {key: [absolute_paths({**own, key: value})[key] for value in values] for key, values in grid.items()}
    tables: dict[str, Mapping[str, Sequence[Any]]] = {"grid": varied, "tune": tune or {}}
    keys = {f"{table}.{key}": list(values) for table, part in tables.items() for key, values in part.items()}
    file = Path(folder).resolve() / f"{name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_toml({**own, **keys}), encoding="utf-8")
    done = Sweep.read(str(file), read_overrides(APP, []))
    if done.unfinished():
        failed = _command("sweep", str(file), str(APP), "--workers", str(workers)) != 0
        if failed and not (partial and any(cell.outcome() for cell in done.cells())):
            raise CommandError(f"cells of {name} failed; what was printed last is above")
    write_tables(done)  # of these cells, whatever an earlier grid has left
    results, groups = (pd.read_parquet(done.folder / f"{table}.parquet") for table in ("results", "groups"))
    return Swept(done, results, groups, pairs_of(done, results))


def plan(settings: Settings) -> Plan:
    """Return what a run would do, send and spend, as ``fedlora plan`` finds it.

    Raises:
        ValueError: The configuration cannot work.
    """
    return preflight(configuration(settings), SUPERNODES)[0]


def report(runs: Sequence[Run]) -> pd.DataFrame:
    """Write each run's ``summary.md`` and plots, and return the comparison of ``fedlora report``, a line a run.

    Raises:
        ValueError: The runs do not report the same number.
        StorageError: A folder cannot be written.
    """
    for one in runs:
        write_report(one)
    columns, rows = comparison(list(runs))
    return pd.DataFrame(rows, columns=columns)


def configuration(settings: Settings, own: Settings | None = None) -> Config:
    """Return the whole configuration of settings over the app's own.

    Raises:
        ConfigError: A key or a value cannot work.
    """
    return resolve(absolute_paths({**read_overrides(APP, []), **settings, **(own or {})}))


def _file(config: Config, folder: Path) -> str:
    """Write a configuration beside its run's folder, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config.run.name}.toml"
    file.write_text(to_toml(config.to_flat()), encoding="utf-8")
    return str(file)


def _check_same(whole: Config, done: Run) -> None:
    """Refuse a finished run of another configuration; what a run fills in where it is left open may be anything."""
    asked, had = whole.to_flat(), done.config.to_flat()
    differ = [
        key
        for key, value in asked.items()
        if not key.startswith("run.") and had.get(key) != value and not (key in _FILLED_IN and not value)
    ]
    if differ:
        raise ConfigError(
            f"{done.path} holds a finished run with another {', '.join(differ)}; give this one another name, or remove "
            "that folder."
        )


def _command(*arguments: str) -> int:
    """Run a command of fedlora's in a process of its own; return its exit code.

    Its lines that say how far it is are printed, and where it fails the last ones.
    """
    plain = {key: value for key, value in os.environ.items() if key not in COLOURS}
    process = subprocess.Popen(
        [sys.executable, "-m", "simulations.cli", *arguments],
        cwd=APP,
        env={**plain, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    last = deque[str](maxlen=_TAIL)
    try:
        for line in process.stdout:
            last.append(line)
            if line.startswith(_TOLD):
                print(line, end="", flush=True)  # noqa: T201
        code = process.wait()
    finally:  # where the notebook's kernel was interrupted, the command ends what it has started
        if process.poll() is None:
            process.terminate()
            process.wait()
        process.stdout.close()
    if code != 0:
        print("".join(last), end="", flush=True)  # noqa: T201
    return code
