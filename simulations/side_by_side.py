"""Cells of a sweep in this process, without Flower: one by one, or several whose clients train in common packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from clients.resident import Resident
from clients.shared_rows import SharedRows
from simulations.local_session import local_session
from simulations.lockstep import Lockstep
from simulations.session import Session
from simulations.sweeps.progress import RunCells, one_by_one


def cells_in_process(threads: int, together: int, rows: Path, gpu_share: float = 1.0) -> RunCells:
    """Return what runs cells in this process.

    Args:
        threads: CPU threads that it may use.
        together: Cells that run side by side.
        rows: Where the sweep's processes keep the rows that they have tokenized.
        gpu_share: Share of a GPU's memory that it may take.
    """
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    if together == 1:
        return one_by_one(local_session(threads, rows))
    lockstep, resident = Lockstep(), Resident(threads, SharedRows(rows))
    sessions = [local_session(threads, rows, lockstep.train, resident) for _ in range(together)]

    def run_cells(cells: Sequence[Callable[[Session], None]]) -> None:
        for at in range(0, len(cells), together):
            pairs = zip(cells[at : at + together], sessions, strict=False)
            lockstep.run([partial(cell, session) for cell, session in pairs])

    return run_cells
