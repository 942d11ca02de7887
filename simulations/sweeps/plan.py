"""What a sweep would run, what of it has run, and how many seeds a difference takes (``fedlora plan --sweep``)."""

from __future__ import annotations

import statistics

from rich.console import Console

from fedlora.reports.format import human_time
from simulations.sweeps.file import Sweep
from simulations.sweeps.tables import compared


def show_sweep(sweep: Sweep, console: Console) -> None:
    """Print cells, time and seeds; nothing is written."""
    tuning, finals = len(sweep.tuning()), sweep.size() - len(sweep.tuning())
    seeds, cells = len(sweep.grid.get("seed", [0])), list(sweep.cells())
    done = [outcome for cell in cells if (outcome := cell.outcome()) is not None]
    console.print(
        f"{sweep.size()} cells in {sweep.folder}: {finals} final ones ({finals // seeds} combinations by {seeds} "
        f"seeds)"
        + (f", {tuning} to choose {', '.join(sweep.tune)}" if tuning else "")
        + f"; {len(done)} have finished",
        markup=False,
    )
    seconds = [outcome["seconds"] for outcome in done if "seconds" in outcome]
    if seconds and len(done) < sweep.size():
        left = (sweep.size() - len(done)) * statistics.median(seconds)
        console.print(f"about {human_time(left)} left in one process, by the median of those", markup=False)
    lines = [line for _, _, line in compared(sweep) if line] if done else []
    for line in lines or ["how many seeds a difference takes is said once two combinations have two seeds each"]:
        console.print(line, markup=False)
