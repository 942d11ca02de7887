"""``fedlora tune``: the search, its time, and what it reads."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.config import to_toml
from simulations.cli import main
from simulations.options import for_tuning
from simulations.tune import FILE, Search, Trial, best_of, next_exponent
from tests.support.plans import plan as planned
from tests.support.trainers import tiny_flat

ROOT = Path(__file__).parents[1]


def searched(value: Callable[[float], float | None], most: int = 20) -> tuple[float | None, int]:
    """Search a function of the exponent to the end; return the best and how many were tried."""
    trials: dict[float, Trial] = {}
    while (exponent := next_exponent(trials, best_of(trials, True, 10**9))) is not None:
        assert exponent not in trials
        found = value(exponent)
        trials[exponent] = Trial(10**exponent, 1, found, None if found is None else -found, 1.0)
        assert len(trials) <= most
    return best_of(trials, True, 10**9), len(trials)


@pytest.mark.parametrize("peak", [-2.6, -1.0, -0.4, 0.0, 0.1, 0.5, 1.7, 3.0])
def test_search_ends_within_a_quarter_step_of_the_peak(peak: float) -> None:
    best, tried = searched(lambda exponent: 1 / (1 + abs(exponent - peak)))
    assert best is not None
    assert abs(best - peak) <= 0.25
    assert tried <= 5 + math.ceil(abs(peak))


def test_search_stops_before_a_cliff() -> None:
    assert searched(lambda exponent: 0.5 + exponent / 10 if exponent < 1.2 else None)[0] == 1.0


def test_where_nothing_trains_it_goes_down_and_ends() -> None:
    assert searched(lambda _: None) == (None, 6)
    assert searched(lambda exponent: 1 / (1 + abs(exponent + 2)) if exponent < -1 else None)[0] == -2.0


def test_a_plateau_keeps_the_rate_that_was_found() -> None:
    assert searched(lambda _: 0.5)[0] == 0.0


def test_where_nothing_learns_it_goes_up_and_ends() -> None:
    trials: dict[float, Trial] = {}
    while (exponent := next_exponent(trials, best_of(trials, True, 100))) is not None:
        trials[exponent] = Trial(10**exponent, 1, 0.7 if exponent < 3 else 0.9, 0.5, 1.0, learned=exponent >= 3)
    assert best_of(trials, True, 100) == 3.0
    assert min(trials) == 0.0


def test_on_few_rows_the_loss_decides_among_what_chance_may_have_made() -> None:
    trials = {0.0: Trial(1.0, 1, 0.70, 0.5, 1.0), 1.0: Trial(3.0, 1, 0.72, 0.9, 1.0)}
    assert best_of(trials, True, 50) == 0.0
    assert best_of(trials, True, 5000) == 1.0
    assert best_of(trials, False, 50) == 0.0  # a loss, or a distance: the smaller one


def search(folder: Path, minutes: float, clock: Callable[[], float] | None = None, **changes: Any) -> Search:
    plan = planned(folder, **for_tuning(changes))
    return Search(plan, minutes, Console(file=io.StringIO(), width=200), **({"clock": clock} if clock else {}))


@pytest.mark.slow
def test_a_rate_that_is_too_small_is_left_behind(tmp_path: Path) -> None:
    """The planted default: with 1e-6 next to nothing is learned, and the search has to climb away from it."""
    own = {"train.learning-rate": 1e-6, "train.local-steps": 40, "rounds": 2, "strategy.name": "fedavg"}
    one = search(tmp_path, 10.0, **own)
    while one.step():
        pass
    assert one.finished
    assert one.best is not None
    assert one.trials[one.best].rate > 1e-4
    assert (one.trials[one.best].loss or 0) < (one.trials[0.0].loss or 0)
    assert {trial.rounds for trial in one.trials.values()} == {2}


class Clock:
    """Seconds that pass with each look at it."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_it_ends_in_time_with_as_many_rounds_as_that_allows(tmp_path: Path) -> None:
    """Every look at the clock takes 10 s: a round as well. Of 5 minutes each of five trials gets one."""
    clock = Clock(10.0)
    one = search(tmp_path, 5.0, clock, **{"rounds": 50})
    while one.step():
        pass
    assert clock.now <= 5 * 60 + 20
    assert not one.finished or len(one.trials) >= 3
    rounds = {trial.rounds for trial in one.trials.values()}
    assert len(rounds) == 1
    assert 1 <= rounds.pop() < 50
    assert isinstance(one.console.file, io.StringIO)
    assert "of 50 rounds, as many as the time allows" in one.console.file.getvalue()


def command(folder: Path, *options: str, **changes: Any) -> int:
    file = folder / "config.toml"
    file.write_text(to_toml(tiny_flat(folder, **changes)), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["tune", str(ROOT), *options, "-c", str(file)])
    return int(end.value.code or 0)


def test_the_command_leaves_the_test_rows_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"run.dir": str(tmp_path / "runs"), "run.name": "search", "strategy.name": "fedsa-lora"}
    code = command(tmp_path, "--minutes", "2", **own)
    shown = capsys.readouterr().out
    assert code == 0, shown
    folder = tmp_path / "runs" / "search"
    record = json.loads((folder / FILE).read_text(encoding="utf-8"))
    assert record["measure"] == "personal_accuracy"
    assert record["best"] in [trial["rate"] for trial in record["trials"]]
    assert record["default"] in [trial["rate"] for trial in record["trials"]]
    assert "next: fedlora run" in shown
    assert f"train.learning-rate={record['best']:g}" in shown
    config = (folder / "config.toml").read_text(encoding="utf-8")
    assert "eval.test = false" in config
    assert command(tmp_path, "--minutes", "2", **own) == 2  # the folder is there


def test_under_dp_it_says_what_the_choice_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"run.dir": str(tmp_path / "runs"), "privacy.mode": "dp", "privacy.noise-multiplier": 1e-3}
    command(tmp_path, "--minutes", "1", **own, **{"data.partition": "iid"})
    assert "a rate chosen on rows costs privacy that no epsilon of the run holds" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    assert command(tmp_path, "--minutes", minutes, **{"run.dir": str(tmp_path / "runs")}) == 2
    assert "must be above 0" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
