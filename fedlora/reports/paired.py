"""Whether runs of two configurations differ: by pairs of runs with the same partition, start and seed.

A seed draws the partition as well as what is trained on it, and partitions differ more than strategies do. So runs are
compared seed by seed: the mean of the differences, its interval by Student's t, and a verdict that holds for all lines
of a table together (Bonferroni).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

ERROR = 0.05
"""The chance that an interval misses the truth, and that a table calls anything distinguishable where nothing is."""
POWER = 0.8
_SAME_DATA = ("data.", "federation.num-clients")  # keys that decide what is drawn: over them nothing is paired
_MOST_SEEDS = 100_000
_SAME = 1e-9  # of a measure: less is rounding
_UNTESTED = ("one seed says nothing", "no verdict: all differences are alike")


def draws_data(key: str) -> bool:
    """Return whether a key decides which rows clients get, so that runs with other values of it are no pairs."""
    return key.startswith(_SAME_DATA)


def paired_differences(results: pd.DataFrame, keys: Sequence[str], measure: str) -> pd.DataFrame:
    """Return a line for each two configurations on the same data, with the difference of a measure, pair by pair.

    Args:
        results: A line a run, with ``keys``, ``seed`` and the measure; runs without the measure are left out.
        keys: What distinguishes configurations.
        measure: Such as ``test_accuracy``.

    Returns:
        Columns: the data's keys; ``one`` and ``other``, in words; ``n`` seeds that both have; ``difference`` of the
        means, one less other, with the interval ``low`` to ``high``; ``deviation`` of the differences; ``distinct``:
        whether zero is outside of the interval that holds for all lines together. Of one seed, and where all
        differences are alike (accuracies are k of n rows, and seeds may agree by chance), there is neither.

    Raises:
        ValueError: Two runs have the same configuration and seed, so it is not known which belongs to which.
    """
    done = results.dropna(subset=[measure])
    twice = done.duplicated([*keys, "seed"])
    if twice.any():
        seed = done.loc[twice, "seed"].iloc[0]
        raise ValueError(f"two runs of one configuration have the seed {seed}; name one of them.")
    data = [key for key in keys if draws_data(key)]
    own = [key for key in keys if key not in data]
    lines = []
    for where, rows in _groups(done, data):
        by_seed = {name: part.set_index("seed")[measure].astype(float) for name, part in _groups(rows, own)}
        for one, other in itertools.combinations(by_seed, 2):
            both = pd.concat([by_seed[one], by_seed[other]], axis=1, join="inner").to_numpy(np.float64)
            if len(both):
                about = {**dict(zip(data, where, strict=True)), "one": _words(own, one), "other": _words(own, other)}
                lines.append((about, both))
    columns = [*data, "one", "other", "n", "difference", "low", "high", "deviation", "distinct"]
    tested = sum(len(both) > 1 for _, both in lines)
    return pd.DataFrame([{**about, **_of(both[:, 0], both[:, 1], tested)} for about, both in lines], columns=columns)


def beside_the_best(differences: pd.DataFrame, higher_is_better: bool) -> pd.DataFrame:
    """Return for the configurations on the same data how far each is from the one that is best on average.

    Args:
        differences: Of :func:`paired_differences`.
        higher_is_better: Of the measure.
    """
    data = [str(column) for column in differences.columns[: list(differences.columns).index("one")]]
    turned = differences.rename(columns={"one": "other", "other": "one", "low": "high", "high": "low"})
    turned[["difference", "low", "high"]] *= -1
    both = pd.concat([differences, turned], ignore_index=True)
    lines = []
    for _, rows in _groups(both, data) if len(both) else ():
        # Best: ahead of all others on average, on the seeds that they share.
        ahead = rows.groupby("one", sort=False)["difference"].agg("min" if higher_is_better else "max")
        best = ahead.idxmax() if higher_is_better else ahead.idxmin()
        lines.append(rows[rows["other"] == best])
    return pd.concat(lines, ignore_index=True) if lines else both


def seeds_needed(deviation: float, difference: float, lines: int = 1) -> int | None:
    """Return how many pairs show a difference, with a power of 80 %, as a verdict that holds for all lines of a table.

    Args:
        deviation: The standard deviation of a pair's difference.
        difference: To be seen.
        lines: Of the table; each is tested at an error of 5 % by them.

    Returns:
        The number; None: more than a hundred thousand.
    """
    from scipy.stats import t

    error = ERROR / lines
    for n in itertools.takewhile(lambda n: n < _MOST_SEEDS, _rising()):
        if difference / deviation * math.sqrt(n) >= t.ppf(1 - error / 2, n - 1) + t.ppf(POWER, n - 1):
            return n
    return None


def seeds_line(differences: pd.DataFrame, difference: float) -> str:
    """Return how many seeds a difference takes, by the deviations seen so far; empty where none were seen."""
    seen = differences.dropna(subset=["deviation"])
    if seen.empty:
        return ""
    usual, most = float(seen["deviation"].median()), float(seen["deviation"].max())
    counts = [_count(seeds_needed(value, difference, len(seen))) for value in (usual, most)]
    of_table = f"power {POWER:.0%}, error {ERROR:.0%} over all {len(seen)} pairs"
    return (
        f"To tell a difference of {difference:.2g} ({of_table}) takes {counts[0]} seeds for the usual pair, whose "
        f"differences deviate by {usual:.4f}, and {counts[1]} for the most variable one ({most:.4f}); seen so far: at "
        f"least {int(seen['n'].min())} seeds of each."
    )


def paired_lines(best: pd.DataFrame) -> list[str]:
    """Return differences from the best as a Markdown table, with what they say."""
    data = list(best.columns[: list(best.columns).index("one")])
    columns = [*data, "", "minus", "seeds", "difference", f"{1 - ERROR:.0%} interval", "verdict"]
    lines = [f"| {' | '.join(map(str, columns))} |", "|" + " --- |" * len(columns)]
    for _, row in best.iterrows():
        cells = [*(f"`{row[key]}`" for key in data), f"`{row['one']}`", f"`{row['other']}`", row["n"]]
        lines.append(f"| {' | '.join(map(str, [*cells, *paired_cells(row)]))} |")
    legend = "Intervals are those of each line; verdicts hold for all pairs together, so they ask for more."
    return [*lines, "", f"{legend} Which is the best was found by the same runs."]


def paired_cells(row: pd.Series[Any]) -> list[str]:
    """Return a line's difference, its interval and the verdict, in words."""
    tested = not pd.isna(row["deviation"])
    interval = f"{row['low']:+.4f} to {row['high']:+.4f}" if tested else "-"
    said = ("" if row["distinct"] else "not ") + "distinguishable" if tested else _UNTESTED[row["n"] > 1]
    return [f"{row['difference']:+.4f}", interval, said]


def _count(seeds: int | None) -> str:
    return f"more than {_MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"


def _rising() -> Iterator[int]:
    """Yield numbers from 2: each one at first, by hundredths later."""
    yield from range(2, 200)
    for step in itertools.count():
        yield int(200 * 1.01**step)


def _of(one: NDArray[np.float64], other: NDArray[np.float64], tested: int) -> dict[str, float | int | bool]:
    from scipy.stats import t

    differences = one - other
    n, mean, untested = len(differences), float(differences.mean()), {"low": math.nan, "high": math.nan}
    deviation = float(differences.std(ddof=1)) if n > 1 else math.nan
    if not deviation > _SAME * max(np.abs(one).max(), np.abs(other).max()):  # one seed, or differences all alike
        return {"n": n, "difference": mean, **untested, "deviation": math.nan, "distinct": False}
    of_mean = deviation / math.sqrt(n)
    reach, whole = (float(t.ppf(1 - error / 2, n - 1)) * of_mean for error in (ERROR, ERROR / tested))
    numbers = {"difference": mean, "low": mean - reach, "high": mean + reach, "deviation": deviation}
    return {"n": n, **numbers, "distinct": bool(abs(mean) > whole)}


def _groups(frame: pd.DataFrame, keys: Sequence[str]) -> list[tuple[tuple[object, ...], pd.DataFrame]]:
    """Return the parts of a frame by the values of keys, in order of their first line."""
    if not keys:
        return [((), frame)]
    parts = frame.groupby([frame[key].astype(str) for key in keys], sort=False)
    return [(tuple(part[key].iloc[0] for key in keys), part) for _, part in parts]


def _words(keys: Sequence[str], values: tuple[object, ...]) -> str:
    """Return what distinguishes a configuration: its value alone where one key varies."""
    if len(keys) == 1:
        return str(values[0])
    return ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True))
