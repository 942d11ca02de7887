"""What the packed engine was aimed at on one GPU, beside what was measured: a table of ``docs/performance.md``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

Line = dict[str, Any]
Value = Callable[[Sequence[Line]], float | None]


@final
@dataclass(frozen=True)
class Goal:
    """A goal.

    Attributes:
        shape: The model.
        tokens: Tokens of a client-step.
        what: What is compared, in words.
        bound: What was aimed at.
        value: Takes it from the lines of one number of clients and steps; None where they do not say.
        most: Whether the bound is one from above.
    """

    shape: str
    tokens: int
    what: str
    bound: float
    value: Value
    most: bool = False

    def measured(self, groups: Sequence[Sequence[Line]]) -> tuple[float, str] | None:
        """Return the best value of several numbers of clients, and the GPU that gave it."""
        values = ((self.value(lines), str(lines[0]["device"])) for lines in groups)
        found = [(value, gpu) for value, gpu in values if value is not None]
        if not found:
            return None
        return min(found) if self.most else max(found)


def _ours(lines: Sequence[Line], method: str = "lora", *, dp: bool = False, ragged: bool = False) -> Line | None:
    for line in lines:
        same = line["method"] == method and line["dp"] == dp and bool(line.get("ragged")) == ragged
        if line["way"] == "fedlora" and same and "ms" in line:
            return line
    return None


def _times(*ways: str) -> Value:
    """Return what says how many times as fast as the fastest of these ways LoRA is; None where one is missing."""

    def value(lines: Sequence[Line]) -> float | None:
        own = _ours(lines, dp=ways[0].startswith("opacus"))
        times = own.get("times", {}) if own else {}
        return min(times[way] for way in ways) if all(way in times for way in ways) else None

    return value


def _share(lines: Sequence[Line]) -> float | None:
    own = _ours(lines)
    return own["share"] if own else None


def _by_lora(
    method: str = "lora", *, dp: bool = False, ragged: bool = False
) -> Callable[[Sequence[Line]], float | None]:
    """Return what says how long a step is, by LoRA's without privacy."""

    def value(lines: Sequence[Line]) -> float | None:
        own, lora = _ours(lines, method, dp=dp, ragged=ragged), _ours(lines)
        return own["ms"] / lora["ms"] if own and lora else None

    return value


_BEST = "times as fast as sequential training, compiled or as a CUDA graph"
_ANY = "times as fast as any sequential training"
_CEILING = "of the ceiling"
_DP = "DP-SGD's step by that without privacy"
GOALS = (
    Goal("roberta-large", 1024, _BEST, 4.0, _times("graph", "compile")),
    Goal("roberta-large", 1024, "times as fast as eager sequential training", 20.0, _times("eager")),
    Goal("roberta-large", 1024, _CEILING, 0.6, _share),
    Goal("roberta-large", 64, _BEST, 20.0, _times("graph", "compile")),
    Goal("minilm", 1024, _BEST, 6.0, _times("graph", "compile")),
    Goal("llama-3.2-1b", 128, _BEST, 6.0, _times("graph", "compile")),
    Goal("llama-3.2-1b", 128, _CEILING, 0.6, _share),
    Goal("llama-3.2-3b", 2048, _ANY, 1.0, _times("graph", "compile", "eager")),
    Goal("llama-2-7b", 2048, _ANY, 1.0, _times("graph", "compile", "eager")),
    Goal("roberta-large", 1024, _DP, 1.1, _by_lora(dp=True), most=True),
    Goal("roberta-large", 64, _DP, 1.3, _by_lora(dp=True), most=True),
    Goal("roberta-large", 1024, "times as fast as Opacus's hooks, under DP-SGD", 30.0, _times("opacus-hooks")),
    *(
        Goal("roberta-large", 1024, f"`{method}`'s step by that of `lora`", 1.1, _by_lora(method), most=True)
        for method in ("mos", "s2-lora", "ffa-lora")
    ),
    Goal("roberta-large", 1024, "the step of ranks 2 to 8 by that of rank 8", 1.15, _by_lora(ragged=True), most=True),
)


def rows_of(lines: Sequence[Line], steps: Sequence[int]) -> list[list[str]]:
    """Return the cells of each goal: model, tokens, what, bound, and for each number of steps the best measured value.

    Args:
        lines: Measured lines of GPUs.
        steps: Steps a round.
    """
    rows = []
    for goal in GOALS:
        sign = "at most" if goal.most else "at least"
        cells = [goal.shape, str(goal.tokens), goal.what, f"{sign} {goal.bound:g}"]
        for count in steps:
            found = goal.measured(_groups(lines, goal, count))
            if found is None:
                cells.append("")
                continue
            value, gpu = found
            met = value <= goal.bound if goal.most else value >= goal.bound
            cells.append(f"{value:.3g} ({gpu}{'' if met else ', not met'})")
        rows.append(cells)
    return rows


def scaling_goal(arguments: Line, times: float | None, steps: Sequence[int]) -> list[str]:
    """Return the cells of the goal of several GPUs.

    Args:
        arguments: What ``python -m benchmarks.scaling`` was given.
        times: How many times as fast the most trainers are as the fewest; None: it was not measured.
        steps: Steps a round that have a column; another number is named in the last.
    """
    what = f"times as fast on {max(arguments['trainers'])} GPUs as on {min(arguments['trainers'])}, by `fedlora run`"
    bound, own = 0.95 * max(arguments["trainers"]) / min(arguments["trainers"]), arguments["steps"]
    shown = "" if times is None else f"{times:.3g}{'' if times >= bound else ' (not met)'}"
    cells = [shown if own == count else "" for count in steps]
    if shown and own not in steps:
        cells[-1] = f"{shown}, {own} steps"
    tokens = str(arguments["rows"] * arguments["tokens"])
    return [arguments["shape"], tokens, what, f"at least {bound:g}", *cells]


def _groups(lines: Sequence[Line], goal: Goal, steps: int) -> list[list[Line]]:
    """Return the lines of a goal's model and tokens, those of one run and number of clients together."""
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        if (line["shape"], line["rows"] * line["tokens"], line["steps"]) == (goal.shape, goal.tokens, steps):
            groups.setdefault((line["run"], line["clients"]), []).append(line)
    return list(groups.values())
