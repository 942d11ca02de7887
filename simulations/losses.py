"""Trainers that were lost in a run, and what became of their packs: on the console and in ``losses.jsonl``."""

from __future__ import annotations

from typing import final

from rich.console import Console

from clients.pool import TrainerPool
from fedlora.reports.losses import FILE, loss_line
from fedlora.runs.folder import RunFolder
from fedlora.server.observers import Observer, RoundEnd


@final
class TrainerLosses(Observer):
    """Reports what was lost since it was last asked.

    Args:
        pool: The trainers.
        folder: The run folder.
        console: Where progress goes.
    """

    def __init__(self, pool: TrainerPool, folder: RunFolder, console: Console) -> None:
        self._pool, self._folder, self._console = pool, folder, console
        self._known = len(pool.losses())  # of the runs before on the same trainers

    def on_round(self, end: RoundEnd) -> None:
        """Report what was lost in the round."""
        self.write()

    def write(self) -> None:
        """Report what was lost so far."""
        records = [loss.record() for loss in self._pool.losses()[self._known :]]
        for record in records:
            self._console.print(f"note: {loss_line(record)}", markup=False)
        if records:
            self._folder.append(FILE, *records)
        self._known += len(records)
