"""Runs a share of a sweep's cells in one session."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

from rich.console import Console

from clients.errors import TrainerLostError
from fedlora.messages import first_line
from fedlora.reports.format import human_time
from fedlora.storage import write_whole
from simulations.session import Session
from simulations.setup import resolve
from simulations.sweeps.cells import Cell, Share, Values, describe, measures
from simulations.sweeps.file import Sweep
from simulations.sweeps.tables import write_tables

_ATTEMPTS = 2  # of a cell in which the whole process died
_TABLES = 0.05  # of the time may go into the tables of what has finished so far


RunCells = Callable[[Sequence[Callable[[Session], None]]], None]
"""Runs cells, each a function of a session: one after the other, or side by side."""


def run_share(sweep: Sweep, run_cells: RunCells, console: Console, share: Share) -> None:
    """Run what has not run yet of a share; a cell that fails does not stop the others."""
    progress = _Progress(sweep, console, share)

    def run(cells: Sequence[Cell]) -> None:
        run_cells([partial(progress.run, cell) for cell in cells])

    for group in sweep.groups(share):
        for cell in sweep.tuning(group):  # what they differ in may be the model's
            run([cell])
        try:
            chosen = sweep.choose(group)
        except ValueError as error:
            progress.skip(group, error)
            continue
        for finals in sweep.finals_by_seed(group, chosen):
            suspects = [cell for cell in finals if progress.tried(cell)]  # of those at work, one made the process die
            for cell in suspects:
                run([cell])
            run([cell for cell in finals if cell not in suspects])
    write_tables(sweep)


def one_by_one(session: Session) -> RunCells:
    """Return what runs cells in one session, one after the other."""

    def run_cells(cells: Sequence[Callable[[Session], None]]) -> None:
        for cell in cells:
            cell(session)

    return run_cells


@final
class _Progress:
    """Runs cells one after the other, reports progress, and records what failed."""

    def __init__(self, sweep: Sweep, console: Console, share: Share) -> None:
        self.sweep = sweep
        self.console = console
        self.share = share
        self.errors: dict[str, str] = {}
        file = sweep.attempt_file(share)
        self._attempts: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        self.number = 0
        groups = sweep.groups(share)
        self.total = sum(len(sweep.tuning(group)) + len(sweep.finals(group, {})) for group in groups)
        self._record_errors()
        self._ran, self._started = 0, time.monotonic()
        self._tables_at = self._started

    def run(self, cell: Cell, session: Session) -> None:
        """Run a cell, or go on with it, unless it is finished."""
        self.number += 1
        started = time.monotonic()
        outcome = cell.outcome()
        if outcome is not None:
            self._report(cell, outcome, "was there already")
            return
        try:
            self._begin_attempt(cell)
            resume = (cell.folder / "config.toml").is_file()
            config = resolve({**cell.config.to_flat(), "run.resume": resume})
            outcome = session.run(config, Console(quiet=True))
        except Exception as error:  # whatever it is, it is this cell's own
            if isinstance(error, TrainerLostError):
                session.stop()  # the next cell gets new ones
            self.errors[cell.name] = f"{type(error).__name__}: {first_line(error)}"
            self._record_errors()
            self._report(cell, None, self.errors[cell.name])
            self._end_attempt(cell)
        else:
            self._end_attempt(cell)
            self._ran += 1
            now = time.monotonic()
            left = (self.total - self.number) * (now - self._started) / self._ran
            remark = f", {human_time(left)} left" if left >= 1 else ""
            self._report(cell, outcome, f"{now - started:.1f} s{remark}")
        self._write_tables()

    def _write_tables(self) -> None:
        """Write the tables so far, unless that would take more than a small share of the time: they grow."""
        started = time.monotonic()
        if started < self._tables_at:
            return
        write_tables(self.sweep)
        now = time.monotonic()
        self._tables_at = now + (now - started) / _TABLES * self.share.of  # each share writes those of all

    def skip(self, group: Values, error: ValueError) -> None:
        """Leave out the final cells of a group for which nothing could be chosen."""
        self.number += len(self.sweep.finals(group, {}))
        self.errors[describe(group)] = str(error)
        self._record_errors()

    def _record_errors(self) -> None:
        """Write the errors where the tables of all shares are made from; of earlier calls none is left."""
        self.sweep.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.sweep.errors_file(self.share), json.dumps(self.errors).encode())

    def tried(self, cell: Cell) -> bool:
        """Return whether the process died in this cell, or in others beside it."""
        return cell.name in self._attempts

    def _begin_attempt(self, cell: Cell) -> None:
        """Give up a cell in which the process died over and over."""
        count = self._attempts.get(cell.name, 0) + 1
        if count > _ATTEMPTS:
            raise RuntimeError(f"the whole process ended {_ATTEMPTS} times in this cell")
        self._attempts[cell.name] = count
        self._record_attempts()

    def _end_attempt(self, cell: Cell) -> None:
        self._attempts.pop(cell.name, None)
        self._record_attempts()

    def _record_attempts(self) -> None:
        """Write which cells are running, and how often each was started without ending."""
        write_whole(self.sweep.attempt_file(self.share), json.dumps(self._attempts).encode())

    def _report(self, cell: Cell, outcome: Mapping[str, Any] | None, remark: str) -> None:
        found = [metric for metric in measures(cell.config) if metric.key in (outcome or {})]
        value = f"{found[0].label} {outcome[found[0].key]:.4f}" if outcome and found else "failed"
        share = f"[{self.share}] " if self.share.of > 1 else ""
        self.console.print(
            f"{share}cell {self.number}/{self.total} {cell.stage}  {describe(cell.varied)}  {value}  {remark}",
            markup=False,
        )
