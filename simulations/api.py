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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import pandas as pd

from fedlora.config import Config, ConfigError, to_toml
from fedlora.reports.comparison import comparison
from fedlora.reports.run import Run
from fedlora.reports.summary import write_report
from fedlora.runs.folder import run_path
from simulations.launch import COLOURS
from simulations.options import absolute_paths, read_overrides
from simulations.plan import Plan
from simulations.preflight import preflight
from simulations.setup import resolve
from simulations.sweeps.file import Sweep

APP = Path(__file__).resolve().parents[1]
"""The app that is run: this checkout."""

Settings = Mapping[str, Any]
"""Values by dotted key, such as ``{"train.max-length": 32}``; see docs/configuration.md."""

_NODES = 2
_TOLD = ("round ", "cell ", "estimate")
_TAIL = 40  # lines of a failed command's output


class CommandError(RuntimeError):
    """A command failed; the message ends with the last lines of what it printed."""


@final
@dataclass(frozen=True)
class Swept:
    """A sweep that has run.

    Attributes:
        sweep: Its cells.
        results: A line a cell.
        groups: Mean (``..._mean``), deviation (``..._std``) and number (``n``) of finished cells, by what they vary in.
    """

    sweep: Sweep
    results: pd.DataFrame
    groups: pd.DataFrame

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
    whole = configuration(settings, {"run.name": name, "run.dir": str(folder), "run.resume": again})
    path = run_path(whole)
    if (path / "result.json").is_file():
        done = Run.read(path)
        _check_same(settings, done)
        return done
    _command("run", str(APP), "-c", _file(whole, path.parent))
    return Run.read(path)


def sweep(
    name: str,
    settings: Settings,
    grid: Mapping[str, Sequence[Any]],
    *,
    tune: Mapping[str, Sequence[Any]] | None = None,
    folder: Path | str = "runs",
    workers: int = 1,
) -> Swept:
    """Run a grid of federations as ``fedlora sweep`` does; cells that have finished are read.

    Args:
        name: Of the sweep's folder.
        settings: The configuration that all cells share, over the app's own.
        grid: Values by key, every combination of which is a cell; ``seed`` repeats cells.
        tune: Hyper-parameters to choose on dev rows, by key.
        folder: What the sweep's folder is in.
        workers: Processes side by side, on all GPUs.

    Raises:
        ConfigError: A cell cannot work.
        CommandError: A cell failed.
    """
    own = {**settings, "run.name": name, "run.dir": str(Path(folder).resolve())}
    tables = {"grid": grid, "tune": tune or {}}
    keys = {f"{table}.{key}": list(values) for table, part in tables.items() for key, values in part.items()}
    file = Path(folder).resolve() / f"{name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(to_toml({**own, **keys}), encoding="utf-8")
    done = Sweep.read(str(file), read_overrides(APP, []))
    if done.unfinished() or not (done.folder / "groups.parquet").is_file():
        _command("sweep", str(file), str(APP), "--workers", str(workers))
    results, groups = (pd.read_parquet(done.folder / f"{table}.parquet") for table in ("results", "groups"))
    return Swept(done, results, groups)


def plan(settings: Settings) -> Plan:
    """Return what a run would do, send and spend, as ``fedlora plan`` finds it.

    Raises:
        ValueError: The configuration cannot work.
    """
    return preflight(configuration(settings), _NODES)[0]


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


def _check_same(settings: Settings, done: Run) -> None:
    """Refuse a finished run of other settings."""
    had = done.config.to_flat()
    other = [key for key, value in absolute_paths(dict(settings)).items() if key in had and had[key] != value]
    differ = [key for key in other if settings[key] not in (0, 0.0, "", "auto")]  # which a run fills in
    if differ:
        raise ConfigError(
            f"{done.path} holds a finished run with another {', '.join(differ)}; give this one another name, or remove "
            "that folder."
        )


def _command(*arguments: str) -> None:
    """Run a command of fedlora's in a process of its own, and print its lines that say how far it is."""
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
    tail = list[str]()
    for line in _lines(process):
        tail = [*tail[-_TAIL:], line]
        if line.startswith(_TOLD):
            print(line, flush=True)  # noqa: T201
    if process.wait() != 0:
        raise CommandError(f"fedlora {' '.join(arguments)} failed:\n" + "\n".join(tail))


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    try:
        for line in process.stdout:
            yield line.rstrip()
    except BaseException:  # the notebook's kernel was interrupted: the command ends what it has started
        process.terminate()
        process.wait()
        raise
