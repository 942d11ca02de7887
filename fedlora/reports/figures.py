"""How figures look: their size, colours, labels at the lines, and the conditions below them.

They are made for half a page: large type, and colours that differ for the colour-blind (Okabe & Ito). No display and no
global state of matplotlib is used.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fedlora.storage import write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
GREY = "#666666"
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1)))
MARKS = "osD^vP*"
SIZE = 11
"""Points of type, on a figure of 6.4 inches that is shown at half of it."""


def write_plot(figure: Any, path: Path) -> None:
    """Write a figure as a picture, whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(path, buffer.getvalue())


def plain_text(name: str) -> str:
    """Return a name as text: matplotlib reads $...$ as mathematics and leaves out names that begin with _."""
    return f" {name}".replace("$", r"\$")


def new_figure(size: tuple[float, float] = (6.4, 3.6), rows: int = 1) -> tuple[Any, Any]:
    """Return a figure that needs no display and no global state, and its axes: several below one another."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows)


def framed(condition: str) -> tuple[Any, Any]:
    """Return a figure for half a page, with the conditions of its epsilon below, and its axes."""
    figure, axes = new_figure((6.4, 4.0))
    axes.tick_params(labelsize=SIZE - 1)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(SIZE)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    foot(figure, condition)
    return figure, axes


def foot(figure: Any, words: str) -> None:
    """Write what must be known of a figure below it."""
    figure.supxlabel(textwrap.fill(plain_text(words), 92), fontsize=8, color=GREY, x=0.02, ha="left")


def colour_of(number: int) -> str:
    """Return the colour of a figure's n-th line."""
    return COLOURS[number % len(COLOURS)]


def line_look(number: int) -> Mapping[str, Any]:
    """Return colour, stroke and marker of a figure's n-th line."""
    return {
        "color": colour_of(number),
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKS[number % len(MARKS)],
        "markersize": 4,
    }


def draw_lines(axes: Any, lines: Iterable[tuple[str, pd.Series[float]]]) -> list[tuple[float, str, str]]:
    """Draw lines, each with its name, over their index; return what :func:`label_ends` takes."""
    ends = []
    for number, (name, line) in enumerate(lines):
        axes.plot(line.index, line, **line_look(number))
        ends.append((float(line.iloc[-1]), name, colour_of(number)))
    return ends


def label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write each line's name beside its right end, as near to its height as the names beside it allow.

    Args:
        axes: The axes, with their scales and limits set.
        ends: Each line's last value, name and colour.
    """
    transform, height = axes.transData, 0.075 * (1 + max((name.count("\n") for _, name, _ in ends), default=0) / 2)
    x = axes.get_xlim()[0]  # anywhere: of the point its height counts
    heights = {name: axes.transAxes.inverted().transform(transform.transform((x, value)))[1] for value, name, _ in ends}
    at, placed = -height, dict[str, float]()
    for name in sorted(heights, key=lambda name: heights[name]):
        at = max(at + height, heights[name])
        placed[name] = at
    over = max(placed.values(), default=0.0) - 1.0
    for _, name, colour in ends:
        axes.text(
            1.02,
            placed[name] - max(0.0, over),
            plain_text(name),
            color=colour,
            fontsize=SIZE - 1,
            va="center",
            transform=axes.transAxes,
        )


def plain_ticks(axes: Any, values: Sequence[float]) -> None:
    """Have a horizontal axis show these values, as plain numbers."""
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def few_ticks(axes: Any) -> None:
    """Have a logarithmic vertical axis show 1, 2 and 5 of each decade, as plain numbers."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
