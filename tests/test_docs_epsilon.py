"""docs/choosing-epsilon.md: its numbers are the accountant's."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from fedlora.privacy import default_delta, epsilon, least_noise_multiplier
from fedlora.privacy.accounting import Use

TEXT = (Path(__file__).parents[1] / "docs" / "choosing-epsilon.md").read_text(encoding="utf-8")
SIZE, DELTA, STEPS = 2000, 1e-5, 120


def rows(head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins so."""
    lines = TEXT[TEXT.index(f"| {head}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def test_what_an_attacker_may_learn() -> None:
    for stated, sure, named in rows("epsilon | sure at most")[1:]:
        odds = math.exp(float(stated))
        assert float(sure.rstrip(" %")) == pytest.approx(100 * odds / (1 + odds), abs=0.6)
        found = odds * 0.01 + DELTA
        assert (
            named == "no bound"
            if found >= 1
            else float(named.rstrip(" %")) == pytest.approx(100 * found, abs=0.06, rel=0.01)
        )


def test_how_epsilon_grows_over_the_rounds() -> None:
    assert default_delta(SIZE) == DELTA
    noise = least_noise_multiplier(target_epsilon=3.0, target_delta=DELTA, sample_rate=64 / SIZE, steps=STEPS)
    after, spent = rows("after round")
    for number, stated in zip(after[1:], spent[1:], strict=True):
        assert epsilon([Use(noise, 64 / SIZE, 10 * int(number))], target_delta=DELTA) == pytest.approx(
            float(stated), rel=2e-3
        )
    for runs, stated in re.findall(r"(two|three)[^.]*? to (\d\.\d\d)", TEXT):
        uses = [Use(noise, 64 / SIZE, STEPS)] * {"two": 2, "three": 3}[runs]
        assert epsilon(uses, target_delta=DELTA) == pytest.approx(float(stated), abs=0.01)
    assert "three to" in TEXT


def test_what_the_budget_buys() -> None:
    table = rows("batch size | rounds")[1:]
    assert len(table) == 5
    for batch, rounds, steps, noise, _ in table:
        assert int(steps) == 10 * int(rounds)
        found = least_noise_multiplier(
            target_epsilon=3.0, target_delta=DELTA, sample_rate=int(batch) / SIZE, steps=int(steps)
        )
        assert float(noise) == pytest.approx(found, rel=2e-3)
