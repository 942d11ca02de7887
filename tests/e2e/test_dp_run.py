"""Runs under differential privacy whose processes are killed: no ledger shows less than what was released."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from fedlora.privacy import Ledger, Use, epsilon, merged
from fedlora.reports.frames import diagnostics_frame, spending_frame
from fedlora.reports.run import Run
from fedlora.runs.folder import read_lines
from fedlora.runs.privacy import format_epsilon
from tests.support.runs import Family, Finished, fedlora_run, kill_a_trainer

pytestmark = pytest.mark.e2e
DELTA = 1e-3
DP: dict[str, Any] = {
    "engine.pack": 2,
    "strategy.name": "fedsa-lora",
    "data.partition": "iid",
    "privacy.mode": "dp",
    "privacy.epsilon": 40.0,
    "privacy.noise-multiplier": 0.8,  # what is charged twice must fit, too
    "privacy.delta": DELTA,
}


def check_ledgers(run: Finished) -> None:
    """What was accepted is paid for, and ``privacy.json`` says what the ledgers say."""
    lines = read_lines(run.folder / "clients.jsonl")
    accepted = {(line["round"], line["client"]) for line in lines if not line["refused"]}
    record = run.json("privacy.json")
    for client, recorded in enumerate(record["clients"]):
        entries = Ledger(run.folder / "sites" / f"client-{client}" / "ledger.jsonl", client).entries()
        rounds = {entry.round for entry in entries}
        assert {number for number, one in accepted if one == client} <= rounds
        assert (recorded["client"], recorded["rounds"]) == (client, len(rounds))
        assert [Use(**use) for use in recorded["ledger"]] == list(merged(entry.use for entry in entries))
        spent = epsilon([entry.use for entry in entries], target_delta=DELTA)
        assert recorded["epsilon"] == spent <= recorded["budget"] == 40.0
        assert recorded["epsilon"] < recorded["epsilon_rdp"]
        assert recorded["remaining"] == pytest.approx(recorded["budget"] - recorded["epsilon"])
    assert {"unit": "record", "trust": "local", "delta": DELTA, "accountant": "pld"}.items() <= record.items()
    assert "AES-256-CTR" in record["rng"]
    assert record["released"][0]["guarantee"].startswith("differential privacy")


def check_report(run: Finished) -> None:
    """Epsilon with its conditions is in every artefact, and what clients measure of themselves is not sent."""
    spent = [line["epsilon"] for line in run.metrics]
    assert spent == sorted(spent)
    assert spent[0] > 0
    assert all(line["train_loss"] is None for line in run.metrics)
    assert all(0 <= line["personal_accuracy"] <= 1 for line in run.metrics), "the researcher's view, not the server's"
    assert all(line["examples"] == 0 and "loss" not in line for line in read_lines(run.folder / "clients.jsonl"))
    last = format_epsilon(run.json("privacy.json")["clients"][0]["epsilon"])
    for file in ("summary.md", "adapters/client-0/README.md"):
        text = (run.folder / file).read_text()
        assert f"epsilon {spent[-1]:.4g} at delta 0.001 of a budget of 40" in text, file
        assert "neighbours: add or remove one record" in text
        assert "trained tensors of kind" in text
        assert f"| {last} |" in text
    assert (run.folder / "epsilon.png").is_file()
    assert (run.folder / "clipping.png").is_file()
    read = Run.read(run.folder)
    spending, ends = spending_frame(read), [one["epsilon"] for one in run.json("privacy.json")["clients"]]
    assert spending.groupby("client")["epsilon"].max().tolist() == pytest.approx(ends)
    assert not spending["stopped"].any()
    diagnostics = diagnostics_frame([read])
    assert len(diagnostics) >= len(spending)
    assert diagnostics["clipped_fraction"].between(0, 1).all()


@pytest.mark.slow
def test_a_killed_trainer_pays_for_what_it_repeats(tmp_path: Path) -> None:
    """The short form of the three kills."""

    def kill(number: int, family: Family) -> bool:
        if number == 1:
            kill_a_trainer(family)
        return True

    run = fedlora_run(tmp_path, on_round=kill, **DP, rounds=3)
    assert run.code == 0, run.output
    assert run.left == []
    check_ledgers(run)
    check_report(run)


@pytest.mark.slow
def test_three_kills_of_a_run(tmp_path: Path) -> None:
    """kill -9 of trainers and of everything, at random moments."""
    generator = random.Random(5)
    kills = 0

    def kill_one(family: Family) -> None:
        nonlocal kills
        time.sleep(generator.uniform(0.0, 0.5))
        for _ in range(50):  # one that was killed just now may not be back yet
            if family.trainers():
                kill_a_trainer(family)
                kills += 1
                return
            time.sleep(0.1)

    def first(number: int, family: Family) -> bool:
        nonlocal kills
        if number < 2:
            kill_one(family)
            return True
        time.sleep(generator.uniform(0.0, 0.5))
        kills += 1
        return False

    def second(_number: int, family: Family) -> bool:
        if kills == 2:
            kill_one(family)
        return True

    fedlora_run(tmp_path, on_round=first, **DP, rounds=8)
    run = fedlora_run(tmp_path, ["-c", "run.resume=true"], on_round=second, **DP, rounds=8)
    assert run.code == 0, run.output
    assert kills == 3
    accepted = [line for line in read_lines(run.folder / "clients.jsonl") if not line["refused"]]
    assert len(accepted) > 20
    check_ledgers(run)
    check_report(run)
