"""Tries every cell of a sweep before the first one runs: one that cannot work is refused with its values."""

from __future__ import annotations

import time

from rich.console import Console

from fedlora.config import ConfigError
from simulations.preflight import Preflight, what_is_read
from simulations.sweeps.cells import describe
from simulations.sweeps.file import Sweep

_PROGRESS_S = 10.0


def check_cells(sweep: Sweep, preflight: Preflight, console: Console) -> None:
    """Try the cells without a result, in an order in which the same rows are read once.

    Raises:
        ConfigError: One cannot work; nothing was started, and what earlier calls finished stays.
    """
    cells = sweep.expected()
    left = sorted((cell for cell in cells if cell.outcome() is None), key=lambda cell: repr(what_is_read(cell.config)))
    said, tried = time.monotonic(), set[str]()
    for number, cell in enumerate(left):
        if time.monotonic() - said > _PROGRESS_S:
            said = time.monotonic()
            console.print(f"checked {number} of {len(left)} cells", markup=False)
        group = cell.stage + describe({key: value for key, value in cell.varied.items() if key != "seed"})
        try:
            # Of a combination that was tried another seed draws other rows, and nothing else.
            (preflight.deal if group in tried else preflight.plan)(cell.config)
            tried.add(group)
        except ValueError as error:
            done = len(cells) - len(left)
            kept = f" Finished already, and kept: {done} of {len(cells)} cells in {sweep.folder}." if done else ""
            raise ConfigError(f"cell {describe(cell.varied)}: {error}{kept}") from error
