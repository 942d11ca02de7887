"""Whether a run under DP will learn, and the schedules that ``fedlora plan --suggest`` proposes."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.config import ConfigError, to_toml
from simulations import found
from simulations.advice import check_can_suggest, enough_epsilon, learns_from, proposals, suggest, verdict
from simulations.cli import main
from simulations.options import read_options
from simulations.privacy import PrivacyPlan, settle_privacy
from simulations.rates import settle_rate
from simulations.setup import resolve
from tests.support.trainers import tiny_flat

ROOT = Path(__file__).parents[1]
LORA, HALF = 74_498, 37_634  # numbers that fedavg and ffa-lora train of MiniLM, head included


def planned(trained: int = HALF, **changes: Any) -> PrivacyPlan:
    """The privacy of a run on SST-2: ten clients of 692 rows, with the defaults but for what is changed."""
    flat = {"privacy.mode": "dp", "privacy.epsilon": 8.0, "federation.num-clients": 10, **changes}
    return PrivacyPlan(settle_rate(settle_privacy(resolve(flat), [692] * 10)), trained)


def said(plan: PrivacyPlan, asked: tuple[str, ...] = ("fedlora", "run"), **trained: int) -> str:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    suggest(plan, trained, asked, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_ended_by_chance_is_said_to_hardly_learn() -> None:
    """SST-2 at epsilon 8 with the defaults of then, a rate of 0.01 among them, ended at 0.499, and nothing said so."""
    plan = planned(**{"train.learning-rate": 0.01})
    line, rate = verdict(plan)
    assert line.startswith("note: this run may hardly learn, it is at the edge of what did")
    assert rate.startswith("note: train.learning-rate = 0.01 is far below ")
    assert f"is {plan.signal_to_noise(plan.steps):.2g}, and on SST-2 runs began to learn at" in line
    assert f"at {learns_from(plan.config):g}. " in line
    assert "fedlora plan --suggest" in line


def test_what_reached_eighty_percent_is_not() -> None:
    """``simulations/sweeps/sst2-dp.toml`` at epsilon 8."""
    own = {"rounds": 12, "train.local-steps": 10, "train.batch-size": 64, "train.optimizer": "sgd"}
    (line,) = verdict(planned(LORA, **own, **{"strategy.name": "fedavg"}))
    assert line.startswith("privacy: signal to noise")
    assert "above" in line


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rounds": 5, "train.local-steps": 4, "train.batch-size": 256}, "20 steps in all are few"),
        ({"strategy.name": "local", "rounds": 12, "train.local-steps": 10, "train.batch-size": 256}, "no average rids"),
        ({"privacy.epsilon": 0.5, "rounds": 12, "train.local-steps": 10, "train.batch-size": 64}, "signal to noise"),
    ],
)
def test_each_reason_is_given(changes: dict[str, Any], reason: str) -> None:
    (line,) = verdict(planned(**changes))
    assert line.startswith("note: ")
    assert reason in line


@pytest.mark.parametrize("strategy", ["dylora", "lisa", "lora-lego"])
def test_nothing_is_promised_of_what_was_not_measured(strategy: str) -> None:
    plan = planned(LORA, **{"strategy.name": strategy})
    assert "learns from was not measured" in "".join(verdict(plan))
    with pytest.raises(ConfigError, match=f"what signal to noise {strategy} learns from was not measured"):
        check_can_suggest(plan.config)


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.5, "note: this run will hardly"), (0.8, "note: this run may hardly"), (1.1, "privacy: signal")],
)
def test_how_near_the_bound_decides_how_plainly_it_is_said(share: float, words: str) -> None:
    plan = planned()
    times = plan.signal_to_noise(plan.steps) / (share * learns_from(plan.config))
    (line,) = verdict(replace(plan, trained=int(plan.trained * times**2)))
    assert line.startswith(words)


def test_bounds_are_those_of_what_a_strategy_trains() -> None:
    for strategy, like in {"fedavg": "fedavg", "mos": "fedavg", "fedsvd": "ffa-lora", "s2-cyclic": "s2-lora"}.items():
        assert learns_from(planned(**{"strategy.name": strategy}).config) == found.LEARNS_FROM[like]


@pytest.mark.parametrize("changes", [{}, {"federation.clients-per-round": 3}, {"privacy.max-grad-norm": 0.5}])
def test_proposals_keep_to_the_budget_and_learn(changes: dict[str, Any]) -> None:
    plan = planned(**changes)
    made = proposals(plan)
    assert made[0].learns
    assert [one.examples for one in made if one.learns] == sorted(one.examples for one in made if one.learns)
    for one in made:
        assert one.plan.epsilon(one.plan.rounds[1]) <= 8.0
        assert one.plan.config.train.optimizer == "sgd"
        assert one.plan.config.privacy.epsilon == 8.0
        if one.learns:
            assert verdict(one.plan)[0].startswith("privacy: ")


def test_the_printed_command_runs_what_was_proposed() -> None:
    plan = planned()
    asked = ("fedlora", "run", "-c", "data.path='my file.csv' privacy.mode='dp' privacy.epsilon=8.0")
    line = next(line for line in said(plan, asked).splitlines() if line.startswith("suggested: "))
    words = shlex.split(line.removeprefix("suggested: "))
    options = read_options([words[at + 1] for at, word in enumerate(words) if word == "-c"])
    assert options["data.path"] == "my file.csv"
    best = proposals(plan)[0]
    again = planned(**{key: value for key, value in options.items() if not key.startswith("data.")})
    assert again.config == replace(best.plan.config, run=again.config.run)


@pytest.mark.slow
def test_where_nothing_helps_it_is_said_with_what_would() -> None:
    """100 rows a client at epsilon 2: no batch is clear of the noise."""
    plan = planned(LORA, **{"privacy.epsilon": 2.0, "privacy.client-size": 100, "strategy.name": "fedavg"})
    text = said(plan, fedavg=LORA)
    assert "note: no schedule learns within epsilon 2: with 100 rows a client and 74,498 trained numbers" in text
    assert "suggested:" not in text
    epsilon = enough_epsilon(plan)
    assert epsilon
    assert f"privacy.epsilon = {epsilon:g} would be enough" in text
    more = replace(plan, config=replace(plan.config, privacy=replace(plan.config.privacy, epsilon=epsilon)))
    assert proposals(more)[0].learns


@pytest.mark.slow
def test_other_strategies_that_would_learn_are_named() -> None:
    plan = planned(100 * LORA, **{"strategy.name": "fedavg"})
    text = said(plan, **{"fedavg": 100 * LORA, "ffa-lora": HALF, "local": HALF})
    assert "; strategies that would learn: ffa-lora (strategy.name)" in text


def test_what_keeps_its_noise_is_not_proposed() -> None:
    plan = planned(**{"strategy.name": "local"})
    assert not any(one.learns for one in proposals(plan))
    assert "note: no schedule is proposed for local: what clients keep to themselves" in said(plan)


@pytest.mark.parametrize("changes", [{}, {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0}])
def test_without_a_budget_there_is_nothing_to_look_for(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"within a budget: set privacy.mode = 'dp' and privacy.epsilon"):
        check_can_suggest(resolve(changes))


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"privacy.mode": "dp", "privacy.epsilon": 8.0, "data.partition": "iid"}
    file = tmp_path / "config.toml"
    file.write_text(to_toml(tiny_flat(tmp_path, **own)), encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(ROOT), "--suggest", "-c", str(file)])
    shown = capsys.readouterr().out
    assert end.value.code in (0, None), shown
    assert "schedules that keep to epsilon 8, by plain SGD" in shown
    assert "suggested: fedlora run" in shown or "note: no schedule learns" in shown
