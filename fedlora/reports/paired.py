"""Whether runs of two configurations differ: by pairs of runs with the same partition, start and seed.

A seed draws the partition as well as what is trained on it, and partitions differ more than strategies do. So runs are
compared seed by seed: the mean of the differences, its interval by Student's t, and a verdict that holds for all pairs
of a table together (Bonferroni).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

ERROR = 0.05
"""The chance that an interval misses the truth, and that any verdict of a table is wrong where nothing differs."""
POWER = 0.8
_SAME_DATA = ("data.", "federation.num-clients")  # keys that decide what is drawn: over them nothing is paired
_MOST_DRAWS = 100_000


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
        whether zero is outside of the interval that holds for all lines of the same data together.
    """
    done = results.dropna(subset=[measure])
    data = [key for key in keys if draws_data(key)]
    own = [key for key in keys if key not in data]
    lines = []
    for where, rows in _groups(done, data):
        by_seed = {name: part.set_index("seed")[measure].astype(float) for name, part in _groups(rows, own)}
        pairs = list(itertools.combinations(by_seed, 2))
        for one, other in pairs:
            difference = (by_seed[one] - by_seed[other]).dropna()
            names = {"one": _words(own, one), "other": _words(own, other)}
            lines.append({**dict(zip(data, where, strict=True)), **names, **_of(difference.to_numpy(), len(pairs))})
    columns = [*data, "one", "other", "n", "difference", "low", "high", "deviation", "distinct"]
    return pd.DataFrame(lines, columns=columns)


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
    for _, rows in _groups(both, data):
        # Best: ahead of all others on average, on the seeds that they share.
        ahead = rows.groupby("one", sort=False)["difference"].agg("min" if higher_is_better else "max")
        best = ahead.idxmax() if higher_is_better else ahead.idxmin()
        lines.append(rows[rows["other"] == best])
    return pd.concat(lines, ignore_index=True) if lines else both


def draws_needed(deviation: float, difference: float) -> int | None:
    """Return how many pairs show a difference of a mean, with an error of 5 % and a power of 80 %; None: too many.

    Args:
        deviation: The standard deviation of a pair's difference.
        difference: To be seen.
    """
    from scipy.stats import t

    if deviation == 0:
        return 2
    for n in itertools.takewhile(lambda n: n < _MOST_DRAWS, _rising()):
        reach = difference / deviation * math.sqrt(n)
        if reach >= t.ppf(1 - ERROR / 2, n - 1) + t.ppf(POWER, n - 1):
            return n
    return None


def draws_line(differences: pd.DataFrame, difference: float = 0.01) -> str:
    """Return how many seeds a difference needs, by the deviations seen so far; empty where none were seen."""
    seen = differences["deviation"].dropna()
    if seen.empty:
        return ""
    usual, most = (draws_needed(float(value), difference) for value in (seen.median(), seen.max()))
    return (
        f"To tell a difference of {difference:g} (error {ERROR:.0%}, power {POWER:.0%}) takes {_count(usual)} seeds "
        f"for the usual pair, whose differences deviate by {seen.median():.4f}, and {_count(most)} for the most "
        f"variable one ({seen.max():.4f}), by {len(seen)} pairs of at least {int(differences['n'].min())} seeds."
    )


def paired_lines(best: pd.DataFrame) -> list[str]:
    """Return differences from the best as a Markdown table, with what they say."""
    data = list(best.columns[: list(best.columns).index("one")])
    columns = [*data, "", "minus", "seeds", "difference", f"{1 - ERROR:.0%} interval", "verdict"]
    lines = [f"| {' | '.join(map(str, columns))} |", "|" + " --- |" * len(columns)]
    for _, row in best.iterrows():
        interval = "-" if math.isnan(row["low"]) else f"{row['low']:+.4f} to {row['high']:+.4f}"
        said = "distinguishable" if row["distinct"] else "not distinguishable"
        cells = [*(f"`{row[key]}`" for key in data), f"`{row['one']}`", f"`{row['other']}`", row["n"]]
        lines.append(f"| {' | '.join(map(str, [*cells, f'{row.difference:+.4f}', interval, said]))} |")
    return lines


def _count(draws: int | None) -> str:
    return f"more than {_MOST_DRAWS:,}" if draws is None else f"{draws:,}"


def _rising() -> itertools.chain[int]:
    """Numbers from 2, each one first, by hundredths later."""
    return itertools.chain(range(2, 200), (int(200 * 1.01**step) for step in itertools.count()))


def _of(differences: np.ndarray, pairs: int) -> dict[str, float | int | bool]:
    from scipy.stats import t

    n = len(differences)
    mean = float(differences.mean()) if n else math.nan
    if n < 2:
        nothing = dict.fromkeys(("low", "high", "deviation"), math.nan)
        return {"n": n, "difference": mean, **nothing, "distinct": False}
    deviation = float(differences.std(ddof=1))
    of_mean = deviation / math.sqrt(n)
    reach, whole = (float(t.ppf(1 - error / 2, n - 1)) * of_mean for error in (ERROR, ERROR / pairs))
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
