"""What ``fedlora plan`` and ``fedlora audit`` print of a run's privacy, and what ``privacy.json`` records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import to_toml
from fedlora.privacy import Entry, Mechanism, Use, epsilon
from fedlora.roles import Role
from fedlora.runs.folder import RunFolder
from fedlora.runs.privacy import client_record, privacy_record, without_privacy
from simulations.cli import main
from simulations.privacy import PrivacyPlan
from tests.support.trainers import EQUAL_PARTS, dp_config, tiny_flat

ROOT = Path(__file__).parents[1]
DP = {"privacy.mode": "dp", "privacy.epsilon": 6.0, **EQUAL_PARTS}


def command(name: str, folder: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> tuple[int, str]:
    config = folder / "config.toml"
    config.write_text(to_toml(tiny_flat(folder, **{**DP, **changes})), encoding="utf-8")
    with pytest.raises(SystemExit) as exit_code:
        main([name, str(ROOT), "-c", str(config)])
    return int(exit_code.value.code or 0), capsys.readouterr().out


def test_plan_says_what_will_be_spent_and_what_else_would_buy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"federation.clients-per-round": 2, "rounds": 9}
    code, shown = command("plan", tmp_path, capsys, **changes)
    assert code == 0, shown
    config = dp_config(tmp_path, **{**DP, **changes, "privacy.noise-multiplier": 0.0})
    plan = PrivacyPlan(config, 100)
    least, most = plan.rounds
    assert least < most
    assert f"epsilon {plan.epsilon(most):.4g} at delta 0.001 of a budget of 6, composed over all rounds" in shown
    for part in ("unit: record", "neighbours: add or remove one record", "adversary: everybody but", "accountant: pld"):
        assert part in shown
    assert f"takes part in {least} round(s) and spends {plan.epsilon(least):.4g}" in shown
    assert "noise that keeps to epsilon 6" in shown
    assert "sampled most" in shown
    assert "sampled least" in shown
    assert all(name in shown for name in ("ffa-lora", "fedavg", "mos", "s2-lora"))


def test_plan_says_when_the_budget_is_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = command("plan", tmp_path, capsys, **{"privacy.noise-multiplier": 0.6, "rounds": 50})
    assert code == 0
    able = int(shown.split("is enough for ")[1].split(" of 50 rounds")[0])
    config = dp_config(tmp_path, **{**DP, "privacy.noise-multiplier": 0.6, "rounds": 50})
    use = Mechanism.of(config).use()
    assert epsilon([use] * able, target_delta=1e-3) <= 6.0 < epsilon([use] * (able + 1), target_delta=1e-3)


def test_fewer_trained_numbers_leave_more_signal(tmp_path: Path) -> None:
    config = dp_config(tmp_path)
    half, whole = PrivacyPlan(config, 500).signal_to_noise(), PrivacyPlan(config, 1000).signal_to_noise()
    assert half == pytest.approx(math.sqrt(2) * whole)


def test_steps_that_agree_add_up_faster_than_their_noise(tmp_path: Path) -> None:
    """By hand: the sum of T steps of B rows of norm 1, over the norm of T draws of P numbers each."""
    plan = PrivacyPlan(dp_config(tmp_path), 400)
    generator = np.random.default_rng(0)
    drawn = generator.normal(scale=plan.mechanism.noise_multiplier, size=(2000, 9, 400)).sum(1)
    noise = np.linalg.norm(drawn, axis=1).mean()
    assert plan.signal_to_noise(9) == pytest.approx(9 * plan.mechanism.expected_batch_size / noise, rel=0.01)
    assert plan.record()["signal_to_noise_together"] > plan.signal_to_noise()


def test_audit_is_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = command("audit", tmp_path, capsys)
    assert code == 0, shown
    assert "14 of 14 checks hold" in shown


def test_audit_fails_with_an_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.test_audit import scaled_noise

    scaled_noise(0.5)(monkeypatch)
    code, shown = command("audit", tmp_path, capsys)
    assert code == 1
    assert "NO" in shown


def test_a_client_that_never_took_part_has_spent_nothing(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"privacy.epsilon": 3.0})
    record = client_record(config, 2, [])
    assert record == {
        "client": 2,
        "rounds": 0,
        "ledger": [],
        "epsilon": 0.0,
        "epsilon_rdp": 0.0,
        "budget": 3.0,
        "remaining": 3.0,
    }


def test_what_a_ledger_that_cannot_be_trusted_has_cost_is_not_known(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"privacy.epsilon": 3.0})
    record = privacy_record(config, {0: [], 1: "it was edited"}, "cpu", {"B": [Role.SHARED]})
    assert record["clients"][1]["epsilon"] == math.inf
    assert record["clients"][1]["error"] == "it was edited"
    assert record["guarantee"].startswith("epsilon inf at delta")
    assert record["private"] is False


def test_noise_too_small_for_any_epsilon_is_not_called_private(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"privacy.noise-multiplier": 1e-6})
    record = privacy_record(config, {0: [Entry(1, Use(1e-6, 0.2, 3), "")]}, "cpu", {"B": [Role.SHARED]})
    assert record["guarantee"].startswith("epsilon inf at delta")
    assert record["private"] is False


def test_a_seeded_run_is_stamped_not_private(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"privacy.seed": 4})
    record = privacy_record(config, {0: [Entry(1, Use(1.0, 0.2, 3), "")]}, "cpu", {"B": [Role.SHARED]})
    assert record["private"] is False
    assert "NOT PRIVATE" in record["guarantee"]
    assert "NOT PRIVATE" in record["rng"]
    assert "NOT PRIVATE" in PrivacyPlan(config, 10).lines()[0]
    assert "NOT PRIVATE" in PrivacyPlan(config, 10).record()["guarantee"]


def test_the_generator_of_a_gpu_is_named(tmp_path: Path) -> None:
    record = privacy_record(dp_config(tmp_path), {}, "cuda:0", {"B": [Role.SHARED]})
    assert "Philox (torch, 64-bit seed; not a cipher)" in record["rng"]


def test_an_epsilon_without_bound_is_null_in_json(tmp_path: Path) -> None:
    """Next to no noise, for an ablation."""
    config = dp_config(tmp_path, **{"privacy.noise-multiplier": 1e-6, "privacy.epsilon": 0.0})
    entries = [Entry(1, Mechanism.of(config).use(), "")]
    RunFolder(tmp_path).write_json("privacy.json", privacy_record(config, {0: entries}, "cpu", {"B": [Role.SHARED]}))
    read = json.loads((tmp_path / "privacy.json").read_text(), parse_constant=pytest.fail)
    assert read["clients"][0]["epsilon"] is None
    assert read["guarantee"].startswith("epsilon inf at delta")


def test_names_of_classes_are_covered_where_they_are_declared(tmp_path: Path) -> None:
    """The labels that rows happen to have show that a row with a rare one is there."""
    for classes, guarantee in (("", "none: they are the labels"), ("bad,good", "independent of rows")):
        config = dp_config(tmp_path, **{"data.classes": classes})
        record = privacy_record(config, {}, "cpu", {"B": [Role.SHARED]})
        (found,) = [one["guarantee"] for one in record["released"] if "classes" in one["what"]]
        assert found.startswith(guarantee)


def test_a_repeated_round_is_one_round_and_two_charges(tmp_path: Path) -> None:
    config = dp_config(tmp_path)
    use = Mechanism.of(config).use()
    record = client_record(config, 0, [Entry(number, use, "") for number in (1, 2, 2)])
    assert (record["rounds"], record["ledger"][0]["steps"]) == (2, 3 * use.steps)


def test_what_leaves_without_privacy_is_listed_too() -> None:
    record = without_privacy({"A": [Role.PERSONAL], "B": [Role.SHARED]})
    assert [one["guarantee"] for one in record["released"]] == ["none"] * 4
    assert record["mode"] == "none"
