"""Figures of privacy budgets: what they must say, read from the figures themselves."""

from __future__ import annotations

import io
import math
from itertools import product
from typing import Any

import pandas as pd
import pytest

from fedlora.metrics import OUTSIDE
from fedlora.privacy.accounting import Use
from fedlora.reports import privacy_plots as plots
from simulations.api import plan
from simulations.budget import accountants, noise_by_epsilon
from tests.support.trainers import tiny_flat


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    return plots.conditions_line(plan(tiny_flat(folder, **{"privacy.mode": "dp", "privacy.epsilon": 4.0})).config)


def words(figure: Any) -> str:
    """Draw a figure, and return all that is written in it."""
    figure.savefig(io.BytesIO(), format="png")
    axes = [text for one in figure.axes for text in (*one.texts, one.xaxis.label, one.yaxis.label, one.title)]
    ticks = [text for one in figure.axes for text in (*one.get_xticklabels(), *one.get_yticklabels())]
    legends = [text for one in figure.axes if one.get_legend() for text in one.get_legend().get_texts()]
    return " ".join(text.get_text().replace("\n", " ") for text in (*figure.texts, *axes, *ticks, *legends))


def says_its_conditions(text: str) -> bool:
    parts = ("Delta", "unit: record", "neighbours: add or remove", "adversary:", "sampling: Poisson", "accountant: pld")
    return all(part in text for part in parts)


def test_accuracy_by_epsilon(condition: str) -> None:
    groups = pd.DataFrame(
        {"strategy.name": name, "privacy.epsilon": budget, "test_accuracy_mean": 0.5, "test_accuracy_std": 0.1}
        for name, budget in product(("fedavg", "ffa-lora"), (0.0, 1.0, 8.0))
    )
    text = words(plots.draw_utility(groups, "test_accuracy", condition, chance=0.25))
    assert says_its_conditions(text)
    assert all(word in text for word in ("fedavg", "ffa-lora", "none", "the commonest class", "test accuracy"))
    one_seed = groups.assign(test_accuracy_std=math.nan)[groups["privacy.epsilon"] > 0]
    assert "ffa-lora" in words(plots.draw_utility(one_seed, "test_accuracy", condition))


def test_epsilon_by_client(condition: str) -> None:
    lines = [(client, number, number * 1.0, client == 1 and number == 3) for client in (0, 1) for number in (1, 2, 3)]
    spending = pd.DataFrame(lines, columns=["client", "round", "epsilon", "stopped"])
    text = words(plots.draw_spending(spending, 3.5, condition))
    assert says_its_conditions(text)
    assert "budget 3.5" in text
    assert "1 client(s) stop" in text
    words(plots.draw_spending(spending.assign(epsilon=math.inf), 3.5, condition))


def test_noise_accountants_schedules_and_cells(condition: str) -> None:
    noise = noise_by_epsilon([2.0, 8.0], [0.1, 1.0], steps=2, delta=1e-4)
    frame = accountants(Use(1.0, 0.01, 100), delta=1e-5, points=2)
    buys = pd.DataFrame(
        {"rounds": rounds, "batch_size": batch, "clients": 2, "signal_to_noise": 1.0, "signal_to_noise_of_mean": 2.0}
        for rounds, batch in product((1, 10), (4, 8))
    )
    cells = pd.DataFrame({"rounds": [1, 10], "seedless": 3, "n": 2, "test_accuracy_mean": [0.4, 0.6]})
    for figure, expected in (
        (plots.draw_noise(noise, condition), ("rate 0.1", "rate 1", "noise multiplier")),
        (plots.draw_accountants(frame, condition), ("PLD (counts)", "PRV", "RDP", "GDP: no bound")),
        (plots.draw_schedules(buys, condition, learns_from=1.6), ("batch 4", "batch 8", "1.6: runs on SST-2 learned")),
        (plots.draw_schedules(buys, condition, across="clients"), ("batch 4", "clients")),
        (plots.draw_cells(cells, "test_accuracy", condition), ("rounds 1", "rounds 10")),
    ):
        text = words(figure)
        assert says_its_conditions(text)
        assert all(word in text for word in expected), text
    assert "seedless" not in text, "what does not vary distinguishes nothing"


def test_what_no_guarantee_covers_says_so() -> None:
    lines = [("mos", number, 0.9, 0.2) for number in (1, 2)]
    frame = pd.DataFrame(lines, columns=["strategy", "round", "clipped_fraction", "signal_to_noise"])
    text = words(plots.draw_diagnostics(frame))
    assert OUTSIDE in text
    assert all(word in text for word in ("mos", "clipped rows", "signal to noise"))


def test_who_is_named(condition: str) -> None:
    frame = pd.DataFrame(
        {
            "training": training,
            "attack": attack,
            "named": 0.1,
            "named_low": 0.0,
            "named_high": 0.2,
            "named_at_most": 1,
            "epsilon": 8.0,
        }
        for training, attack in product(("over-fitted", "epsilon 8"), ("by loss", "by gradient"))
    )
    text = words(plots.draw_membership(frame, condition))
    assert says_its_conditions(text)
    assert all(
        word in text for word in ("over-fitted", "epsilon 8", "by loss", "by gradient", "blind guess", "at 1% false")
    )


def test_who_sees_what() -> None:
    text = words(plots.draw_trust())
    assert all(word in text for word in ("client", "server", "is the adversary", "Promised", "Not promised"))
