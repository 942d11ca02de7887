"""docs/choosing-epsilon.md: its numbers are the accountant's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from fedlora.privacy import default_delta, epsilon, least_noise_multiplier
from fedlora.privacy.accounting import Use

TEXT = (Path(__file__).parents[1] / "docs" / "choosing-epsilon.md").read_text(encoding="utf-8")
SIZE, DELTA, STEPS = 2000, 1e-5, 120
NUMBERS = 39_944  # that FFA-LoRA trains of MiniLM, as the page quotes


def rows(head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins so."""
    lines = TEXT[TEXT.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def test_what_an_attacker_may_learn() -> None:
    for stated, sure, named in rows("epsilon | sure at most")[1:]:
        odds = math.exp(float(stated))
        assert float(sure.rstrip(" %")) == pytest.approx(100 * odds / (1 + odds), abs=0.6)
        found = min(odds * 0.01 + DELTA, 1 - (1 - DELTA - 0.01) / odds)
        assert float(named.rstrip(" %")) == pytest.approx(100 * found, abs=0.06, rel=0.01)


def test_how_epsilon_grows_over_the_rounds() -> None:
    assert default_delta(SIZE) == DELTA
    noise = least_noise_multiplier(target_epsilon=3.0, target_delta=DELTA, sample_rate=64 / SIZE, steps=STEPS)
    after, spent = rows("after round")
    for number, stated in zip(after[1:], spent[1:], strict=True):
        assert epsilon([Use(noise, 64 / SIZE, 10 * int(number))], target_delta=DELTA) == pytest.approx(
            float(stated), rel=2e-3
        )
    two, three = re.findall(r"two runs of the file above come to (\d\.\d\d) together,\s+three to (\d\.\d\d)", TEXT)[0]
    for runs, stated in ((2, two), (3, three)):
        uses = [Use(noise, 64 / SIZE, STEPS)] * runs
        assert epsilon(uses, target_delta=DELTA) == pytest.approx(float(stated), abs=0.01)


def test_what_the_budget_buys() -> None:
    table = rows("batch size | rounds")[1:]
    assert len(table) == 5
    for batch, rounds, steps, noise, signal in table:
        assert int(steps) == 10 * int(rounds)
        found = least_noise_multiplier(
            target_epsilon=3.0, target_delta=DELTA, sample_rate=int(batch) / SIZE, steps=int(steps)
        )
        assert float(noise) == pytest.approx(found, rel=2e-3)
        assert float(signal) == pytest.approx(int(batch) / found * math.sqrt(int(steps) / NUMBERS), rel=3e-3)


def test_what_is_suggested_keeps_to_its_budget() -> None:
    for budget, words, _, _ in rows("epsilon | what is suggested")[1:]:
        found = re.fullmatch(r"(\d+) rounds of (\d+) steps of (?:all )?([\d,]+)(?: letters)?, noise ([\d.]+)", words)
        assert found, words
        rounds, steps, batch, noise = (float(one.replace(",", "")) for one in found.groups())
        use = Use(noise, batch / SIZE, int(rounds * steps))
        assert epsilon([use], target_delta=DELTA) == pytest.approx(float(budget), rel=5e-3)


def test_what_it_cost_in_accuracy() -> None:
    """The table of section 5 is the study's."""
    folder = Path(__file__).parents[1] / "benchmarks" / "results" / "privacy"
    private, free = (pd.read_csv(folder / f"{name}.csv") for name in ("private", "free"))
    whole = pd.concat([private, free.assign(**{"privacy.epsilon": 0})])
    stated = rows("strategy | trained numbers")[1:]
    assert len(stated) == 5
    for name, trained, *cells in stated:
        own = whole[whole["strategy.name"] == name.strip("`")].set_index("privacy.epsilon")
        assert int(trained.replace(",", "")) == own["trained_parameters_mean"].iloc[0]
        for budget, cell in zip((1, 2, 4, 8, 0), cells, strict=True):
            line = own.loc[budget]
            assert cell == f"{line['test_accuracy_mean']:.3f} ± {line['test_accuracy_std']:.3f}"
            assert line["n"] == 3
