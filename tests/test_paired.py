"""Paired differences: intervals that hold, verdicts on planted differences, and seeds that are enough."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedlora.reports.paired import beside_the_best, paired_differences, paired_lines, seeds_line, seeds_needed
from simulations.cli import main
from simulations.options import read_overrides
from simulations.sweeps.file import Sweep
from simulations.sweeps.tables import summary, write_tables
from tests.support.trainers import tiny_flat

KEY = "strategy.name"
RESULT = {"seconds": 3.0, "rounds": 1, "bytes_up": 10, "trained_parameters": 5}


def results(
    seeds: int, gaps: dict[str, float], noise: float = 0.01, partition: float = 0.05, start: int = 0, **other: Any
) -> pd.DataFrame:
    """Return runs whose measure is that of their partition, with a gap for each strategy and noise of their own."""
    rows = []
    for seed in range(seeds):
        of_seed = np.random.default_rng([start, seed]).normal(0.8, partition)
        for place, (name, gap) in enumerate(gaps.items()):
            own = np.random.default_rng([start, seed, place + 1]).normal(0, noise)
            rows.append({KEY: name, "seed": seed, "accuracy": of_seed + gap + own, **other})
    return pd.DataFrame(rows)


def test_differences_are_those_of_scipys_paired_test() -> None:
    frame = results(7, {"a": 0.0, "b": 0.01})
    (_, line), *others = paired_differences(frame, [KEY], "accuracy").iterrows()
    assert not others
    a, b = (frame[frame[KEY] == name]["accuracy"].to_numpy() for name in "ab")
    test = stats.ttest_rel(a, b)
    low, high = test.confidence_interval(0.95)
    assert (line["one"], line["other"], line["n"]) == ("a", "b", 7)
    assert line["difference"] == pytest.approx((a - b).mean(), abs=1e-15)
    assert (line["low"], line["high"]) == pytest.approx((low, high), abs=1e-12)
    assert line["distinct"] == (test.pvalue < 0.05)


def test_pairs_see_what_means_do_not() -> None:
    """A gap of a fifth of the partitions' spread: told from eight pairs, hidden where partitions are not the same."""
    gaps = {"a": 0.0, "b": 0.01}
    paired = paired_differences(results(8, gaps, noise=0.003), [KEY], "accuracy").iloc[0]
    assert paired["distinct"]
    one, other = results(8, gaps, 0.003), results(8, gaps, 0.003, start=1)
    apart = pd.concat([one[one[KEY] == "a"], other[other[KEY] == "b"]])
    planted = paired_differences(apart, [KEY], "accuracy").iloc[0]
    assert not planted["distinct"], "planted: the second strategy has other partitions"
    assert planted["deviation"] > 5 * paired["deviation"]


def test_nothing_is_called_different_where_nothing_differs() -> None:
    """Five strategies that are one: in 200 tables at most a few hold any verdict; without the correction many do."""
    called = naive = 0
    for start in range(200):
        found = paired_differences(results(6, dict.fromkeys("abcde", 0.0), start=start), [KEY], "accuracy")
        called += bool(found["distinct"].any())
        naive += bool(((found["low"] > 0) | (found["high"] < 0)).any())
    assert called <= 20, "5 % of 200 are 10"
    assert naive > 40


def test_the_best_is_the_reference_whatever_is_better() -> None:
    frame = results(6, {"a": 0.0, "b": 0.2, "c": -0.2})
    found = paired_differences(frame, [KEY], "accuracy")
    for higher, best, sign in ((True, "b", -1), (False, "c", 1)):
        beside = beside_the_best(found, higher)
        assert set(beside["other"]) == {best}
        assert set(beside["one"]) == set("abc") - {best}
        assert (np.sign(beside["difference"]) == sign).all()
        assert (beside["low"] <= beside["difference"]).all()
        assert (beside["difference"] <= beside["high"]).all()
    lines = paired_lines(beside_the_best(found, True))
    assert len(lines) == 6
    assert all("| distinguishable |" in line for line in lines[2:4])


def test_runs_on_other_data_are_no_pairs() -> None:
    parts = [results(3, {"a": 0.0, "b": 0.1}, **{"data.alpha": alpha}) for alpha in (0.5, 0.1)]
    found = paired_differences(pd.concat(parts), [KEY, "data.alpha"], "accuracy")
    assert found["data.alpha"].tolist() == [0.5, 0.1]
    assert list(zip(found["one"], found["other"], strict=True)) == [("a", "b"), ("a", "b")]


def test_seeds_that_one_lacks_are_left_out() -> None:
    frame = results(5, {"a": 0.0, "b": 0.1})
    frame.loc[(frame[KEY] == "b") & (frame["seed"] > 1), "accuracy"] = np.nan
    (found,) = paired_differences(frame, [KEY], "accuracy").to_dict("records")
    assert found["n"] == 2
    frame.loc[(frame[KEY] == "b") & (frame["seed"] > 0), "accuracy"] = np.nan
    found = paired_differences(frame, [KEY], "accuracy")
    assert found[["n", "distinct"]].to_numpy().tolist() == [[1, False]]
    assert found["low"].isna().all()
    assert seeds_line(found, 0.01) == ""
    assert "| one seed says nothing |" in paired_lines(beside_the_best(found, True))[2]
    frame.loc[(frame[KEY] == "a") & (frame["seed"] < 1), "accuracy"] = np.nan
    none = paired_differences(frame, [KEY], "accuracy")
    assert none.empty, "no seed in common"
    assert beside_the_best(none, True).empty


def test_data_on_which_no_two_share_a_seed_hide_no_others() -> None:
    whole = results(3, {"a": 0.0, "b": 0.1}, **{"data.alpha": 0.5})
    torn = results(2, {"a": 0.0, "b": 0.1}, **{"data.alpha": 0.1})
    torn = torn[(torn[KEY] == "a") == (torn["seed"] == 0)]
    found = paired_differences(pd.concat([whole, torn]), [KEY, "data.alpha"], "accuracy")
    assert beside_the_best(found, True)["data.alpha"].tolist() == [0.5]


def test_equal_differences_are_no_certainty() -> None:
    """Accuracies are k of 100 rows: two seeds differ by the same hundredth now and then, and show nothing by it."""
    rows = [(0, "a", 0.81), (0, "b", 0.80), (1, "a", 0.79), (1, "b", 0.78)]
    (found,) = paired_differences(pd.DataFrame(rows, columns=["seed", KEY, "accuracy"]), [KEY], "accuracy").to_dict(
        "records"
    )
    assert not found["distinct"]
    assert math.isnan(found["low"])
    frame = pd.DataFrame(rows, columns=["seed", KEY, "accuracy"])
    best = beside_the_best(paired_differences(frame, [KEY], "accuracy"), True)
    assert "| no verdict: all differences are alike |" in paired_lines(best)[2]
    equal = frame.assign(accuracy=1.0)
    assert seeds_line(paired_differences(equal, [KEY], "accuracy"), 0.01) == ""


def test_few_seeds_that_agree_well_are_enough() -> None:
    """Three seeds whose partitions are far apart and whose differences are not: nothing but their deviation counts."""
    rows = [
        (k, name, value)
        for k, base in enumerate((2.0, 2.5, 3.1))
        for name, value in (("a", base), ("b", base + 0.1 + 1e-4 * k))
    ]
    frame = pd.DataFrame(rows, columns=["seed", KEY, "loss"]).assign(**{"data.path": "x"})
    (alone,) = paired_differences(frame, [KEY, "data.path"], "loss").to_dict("records")
    assert alone["distinct"]
    assert alone["deviation"] == pytest.approx(1e-4)
    more = pd.concat([frame, frame.assign(**{"data.path": "y"}, loss=frame["loss"] * 7)])
    assert paired_differences(more, [KEY, "data.path"], "loss")["deviation"].iloc[0] == alone["deviation"]


def test_two_runs_of_one_seed_are_refused() -> None:
    frame = results(3, {"a": 0.0, "b": 0.1})
    with pytest.raises(ValueError, match=r"two runs of one configuration have the seed 1; name one of them"):
        paired_differences(pd.concat([frame, frame[(frame[KEY] == "b") & (frame["seed"] == 1)]]), [KEY], "accuracy")


@pytest.mark.parametrize(("deviation", "lines"), [(0.004, 1), (0.02, 1), (0.02, 15), (0.05, 3)])
def test_the_seeds_needed_are_enough_and_hardly_more(deviation: float, lines: int) -> None:
    """A difference of a point is seen in about four of five studies of so many pairs, by the table's own verdict."""
    n = seeds_needed(deviation, 0.01, lines)
    assert n is not None
    drawn = np.random.default_rng(0).normal(0.01, deviation, (4000, n))
    reach = stats.t.ppf(1 - 0.05 / lines / 2, n - 1) * drawn.std(1, ddof=1) / math.sqrt(n)
    share = float((drawn.mean(1) - reach > 0).mean())
    assert 0.76 < share < 0.97 if n < 6 else 0.76 < share < 0.86
    assert seeds_needed(1000.0, 0.01) is None
    counts = [seeds_needed(deviation, 0.01) for deviation in (0.01, 0.03, 0.1, 0.5)]
    assert all(one < other for one, other in itertools.pairwise(filter(None, counts)))


def test_a_sweep_writes_pairs_and_the_plan_counts_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells as a sweep leaves them: two strategies, four seeds, and the first seed's tuning left out."""
    flat = {**tiny_flat(tmp_path), "run.name": "grid", "run.dir": str(tmp_path)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items() if key not in ("strategy.name", "seed")]
    file = tmp_path / "grid.toml"
    file.write_text(
        "\n".join([*lines, "[grid]", 'strategy.name = ["fedavg", "ffa-lora", "rolora"]', "seed = [0, 1, 2, 3]"])
    )
    sweep = Sweep.read(str(file), read_overrides(Path(), []))
    values = results(4, {"fedavg": 0.0, "ffa-lora": -0.1, "rolora": 0.0})
    for cell in sweep.cells():
        if cell.varied == {KEY: "rolora", "seed": 2}:
            continue  # it has failed
        mine = values[(values[KEY] == cell.varied[KEY]) & (values["seed"] == cell.varied["seed"])]
        cell.folder.mkdir(parents=True)
        (cell.folder / "result.json").write_text(
            json.dumps({"test_accuracy": float(mine["accuracy"].iloc[0]), **RESULT})
        )
    write_tables(sweep)
    pairs = pd.read_parquet(sweep.folder / "pairs.parquet")
    assert pairs[["one", "other", "n", "distinct"]].to_numpy().tolist() == [
        ["fedavg", "ffa-lora", 4, True],
        ["fedavg", "rolora", 3, False],
        ["ffa-lora", "rolora", 3, True],
    ]
    text = summary(sweep)
    assert "## Test accuracy beside the best, seed by seed" in text
    assert "over all 3 pairs) takes" in text
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--sweep", str(file)])
    assert not ended.value.code
    shown = " ".join(capsys.readouterr().out.split())
    assert "12 final ones (3 combinations by 4 seeds); 11 have finished" in shown
    assert "To tell a difference of 0.01 (power 80%, error 5% over all 3 pairs) takes" in shown
    for cell in sweep.cells():  # all alike: nothing varies, and nothing fails
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "result.json").write_text(json.dumps({"test_accuracy": 1.0, **RESULT}))
    write_tables(sweep)
    assert "no verdict: all differences are alike" in summary(sweep)
    one_seed = replace(sweep, grid={**sweep.grid, "seed": [0]})
    write_tables(one_seed)
    assert not (sweep.folder / "pairs.parquet").exists(), "of the grid before"
    assert "beside the best" not in summary(one_seed)
