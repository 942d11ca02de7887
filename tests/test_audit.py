"""``fedlora audit`` passes on the shipped code and fails on each planted bug."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients import resident
from clients.accounts import Accounts
from clients.errors import RefusedError
from fedlora.config import to_toml
from fedlora.data import load_federated
from fedlora.engine import Batching, train_pack
from fedlora.privacy import Ledger, Mechanism, PrivateRandom, step
from fedlora.tasks import TASKS
from simulations.audit import Finding, audit
from simulations.audit.site import Audited
from simulations.audit.statistical import one_run, repeated
from simulations.cli import main
from simulations.options import absolute_paths, read_overrides
from simulations.setup import resolve, settle
from tests.support.trainers import TokenMean, dp_config

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).parents[1]


def findings(folder: Path, train: Any = train_pack, **changes: Any) -> list[Finding]:
    config = dp_config(folder, **{"privacy.noise-multiplier": 0.8, **changes})
    return audit(config, load_federated(config, 4), train)


@pytest.mark.parametrize(
    ("strategy", "checks"),
    [
        *(("ffa-lora", 14), ("fedsa-lora", 14), ("mos-personal", 14), ("feddpa", 14), ("s2-lora", 14)),
        *(("rolora", 20), ("fedlease", 20), pytest.param("dylora", 14, marks=pytest.mark.slow)),
    ],
)
def test_the_shipped_code_passes(strategy: str, checks: int, tmp_path: Path) -> None:
    """Those whose roles change are checked in every turn."""
    found = findings(tmp_path, **{"strategy.name": strategy})
    assert [finding for finding in found if not finding.passed] == []
    assert len(found) == checks


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("fedsa-lora", "vera"),
        ("fedsa-lora", "dora"),
        ("fedavg", "uni-lora"),
        ("fedsa-lora", "block-lora"),
        ("fedavg", "sora"),
    ],
)
def test_other_methods_pass(strategy: str, method: str, tmp_path: Path) -> None:
    """With vectors of their own for outputs, personal ones among them; one vector for all; blocks of A."""
    small = {"uni-lora.length": 32, "block-lora.blocks": 2}
    found = findings(tmp_path, **{"strategy.name": strategy, "method.name": method, **small})
    assert [finding for finding in found if not finding.passed] == []
    assert len(found) == 14


def test_a_budget_that_is_nearly_spent_does_not_stop_it(tmp_path: Path) -> None:
    """As in the recipe: few rounds of one step, with noise that just keeps to epsilon."""
    changes = {"privacy.epsilon": 8.0, "privacy.noise-multiplier": 0.0, "train.local-steps": 1, "rounds": 3}
    assert [finding for finding in findings(tmp_path, **changes) if not finding.passed] == []


def test_full_batches_pass(tmp_path: Path) -> None:
    """A sample rate of one: every row in every batch."""
    found = findings(tmp_path, **{"train.batch-size": 20, "privacy.client-size": 20})
    assert [finding for finding in found if not finding.passed] == []


def scaled_noise(factor: float) -> Callable[[Patch], None]:
    def plant(patch: Patch) -> None:
        real = step.noisy_mean

        def noisy_mean(sums: torch.Tensor, private: step.PrivateStep, *own: Any) -> torch.Tensor:
            less = replace(private.mechanism, noise_multiplier=factor * private.mechanism.noise_multiplier)
            return real(sums, replace(private, mechanism=less), *own)

        patch.setattr(step, "noisy_mean", noisy_mean)

    return plant


def clip_per_layer(patch: Patch) -> None:
    real = step.PrivateSum.add

    def add(self: Any, sums: torch.Tensor, parts: Sequence[Any], slot_n: torch.Tensor) -> None:
        for part in parts:
            real(self, sums, [part], slot_n)

    patch.setattr(step.PrivateSum, "add", add)


def clip_the_mean(patch: Patch) -> None:
    patch.setattr(step, "clip_factors", lambda norms, _: torch.ones_like(norms))
    real = step.PrivateSum.release

    def release(self: Any, sums: torch.Tensor, *groups: Any) -> torch.Tensor:
        bound = self._step.mechanism.max_grad_norm * self._step.mechanism.expected_batch_size
        norms = sums.norm(dim=1, keepdim=True)
        return real(self, sums * torch.clamp(bound / (norms + 1e-6), max=1.0), *groups)

    patch.setattr(step.PrivateSum, "release", release)


def token_mean(patch: Patch) -> None:
    patch.setitem(TASKS._entries, "classification", TokenMean)
    patch.setattr(resident, "find_batching", lambda *_: Batching())


def fixed_size_batches(patch: Patch) -> None:
    def sample(self: PrivateRandom, rows: Any, rate: float) -> Any:
        return rows[np.argsort(self.words(len(rows)))[: round(rate * len(rows))]]

    patch.setattr(PrivateRandom, "sample", sample)


def skip_empty_batches(patch: Patch) -> None:
    real = step.PrivateSum.release

    def release(self: Any, *arguments: Any) -> torch.Tensor:
        empty = (self._turn[0] == 0)[:, None]
        return real(self, *arguments).masked_fill(empty, 0.0)

    patch.setattr(step.PrivateSum, "release", release)


def actual_batch_size(patch: Patch) -> None:
    real = step.PrivateSum.release

    def release(self: Any, sums: torch.Tensor, *groups: Any) -> torch.Tensor:
        rows = self._turn[0].clamp(min=1)
        return real(self, sums, *groups) * (self._step.mechanism.expected_batch_size / rows).to(sums.dtype)[:, None]

    patch.setattr(step.PrivateSum, "release", release)


def seed_of_all_clients(patch: Patch) -> None:
    keys: dict[int, bytes] = {}

    def random(self: Accounts, client: int, number: int) -> PrivateRandom:
        return PrivateRandom(keys.setdefault(number, os.urandom(32)))

    patch.setattr(Accounts, "random", random)


def run_seed(patch: Patch) -> None:
    def random(self: Accounts, client: int, number: int) -> PrivateRandom:
        return PrivateRandom.reproducible(self.config.seed, client, number)

    patch.setattr(Accounts, "random", random)


def personal_head_without_noise(patch: Patch) -> None:
    real = step.noisy_mean

    def noisy_mean(sums: torch.Tensor, private: step.PrivateStep, *own: Any) -> torch.Tensor:
        out = real(sums, private, *own)
        out[:, -2:] = sums[:, -2:] / private.mechanism.expected_batch_size  # the head's bias
        return out

    patch.setattr(step, "noisy_mean", noisy_mean)


def ledger_reset_by_round(patch: Patch) -> None:
    real = Ledger.charge

    def charge(self: Ledger, number: int, use: Any, **_: Any) -> Any:
        self.path.unlink(missing_ok=True)
        return real(self, number, use)

    patch.setattr(Ledger, "charge", charge)


def sent_before_it_is_written(patch: Patch) -> None:
    real = Accounts.charge

    def charge(self: Accounts, client: int, number: int, head: str) -> str:
        def later() -> None:
            with suppress(RefusedError):
                real(self, client, number, head)

        thread = threading.Thread(target=later)
        thread.start()
        thread.join()  # so that all other checks see a ledger that is whole
        entries = self.ledger(client).entries()
        return entries[-1].hash

    patch.setattr(Accounts, "charge", charge)


def the_same_rows_always(patch: Patch) -> None:
    patch.setattr(Mechanism, "batches", lambda self, random, rows: [rows[:4]] * self.steps)


def fewer_steps_in_the_ledger(patch: Patch) -> None:
    patch.setattr(Mechanism, "use", lambda self, rounds=1: claimed_use(self, rounds))


def claimed_use(mechanism: Mechanism, rounds: int) -> Any:
    from fedlora.privacy import Use

    return Use(mechanism.noise_multiplier, mechanism.sample_rate, rounds)


def test_a_trainer_without_privacy(tmp_path: Path) -> None:
    """Neither clip nor noise, with an honest ledger."""

    def without(engine: Any, works: Any, common: Any, train: Any, private: Any = None, **local: Any) -> Any:
        return train_pack(engine, works, common, train, **local)

    failed = [finding.name for finding in findings(tmp_path, without) if not finding.passed]
    assert any("clipped to C" in name for name in failed)
    assert any("every tensor has the noise" in name for name in failed)


BUGS: dict[str, tuple[Callable[[Patch], None], str]] = {
    "noise halved": (scaled_noise(0.5), "noise"),
    "noise x 0.97": (scaled_noise(0.97), "noise is as large"),
    "clipping per layer": (clip_per_layer, "removing one row changes"),
    "clipping the mean": (clip_the_mean, "clipped to C"),
    "batch-wide token mean": (token_mean, "a batch's sum is that of its rows"),
    "fixed-size batches accounted as Poisson": (fixed_size_batches, "batch sizes are binomial"),
    "skipped empty batches": (skip_empty_batches, "also where no row was sampled"),
    "actual batch size in the denominator": (actual_batch_size, "by the expected batch size"),
    "seed shared between clients": (seed_of_all_clients, "share noise"),
    "run seed used for sampling": (run_seed, "share samples"),
    "personal tensor without noise": (personal_head_without_noise, "every tensor has the noise"),
    "ledger reset by round": (ledger_reset_by_round, "the ledger holds every step"),
    "update sent before the ledger is written": (sent_before_it_is_written, "no update leaves before"),
    "the same rows always": (the_same_rows_always, "batch sizes are binomial"),
    "fewer steps in the ledger than were taken": (fewer_steps_in_the_ledger, "the ledger holds every step"),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_fails_the_audit(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    plant, expected = BUGS[name]
    changes = {"method.head": "personal"} if "personal tensor" in name else {}
    plant(monkeypatch)
    failed = [finding.name for finding in findings(tmp_path, **changes) if not finding.passed]
    assert any(expected in one for one in failed), failed


# -- by attacks -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_attacks_on_the_shipped_code_stay_below_its_epsilon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(to_toml(dp_config(tmp_path, **{"strategy.name": "ffa-lora"}).to_flat()), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["audit", "--statistical", ".", "-c", str(file)])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0, shown
    assert "16 of 16 checks hold" in shown
    assert "repeated releases with and without a row" in shown


def test_attacks_see_something(tmp_path: Path) -> None:
    """The bound is some way up to the truth, which is here that of the ledger."""
    config = dp_config(tmp_path)
    finding = repeated(Audited(config, load_federated(config, 4), tmp_path, train_pack))
    assert finding.passed, finding.numbers
    seen, claimed = (float(number) for number in re.findall(r"(?:at least|,) ([\d.]+) by", finding.numbers))
    assert 0.25 * claimed < seen


@pytest.mark.parametrize(
    "name",
    [
        "noise halved",
        pytest.param("clipping the mean", marks=pytest.mark.slow),
        pytest.param("seed shared between clients", marks=pytest.mark.slow),
    ],
)
def test_attacks_on_planted_bugs_come_out_above(name: str, tmp_path: Path, monkeypatch: Patch) -> None:
    plant, _ = BUGS[name]
    plant(monkeypatch)
    config = dp_config(tmp_path)
    finding = repeated(Audited(config, load_federated(config, 4), tmp_path, train_pack))
    assert not finding.passed, finding.numbers


@pytest.mark.slow
@pytest.mark.parametrize("noise", [1.0, 0.05], ids=["the shipped code", "a twentieth of the noise"])
def test_one_run_tells_a_twentieth_of_the_noise(noise: float, tmp_path: Path, monkeypatch: Patch) -> None:
    """On real texts and the built-in model: a small model's rows are too much alike to be told apart in one sum.

    With a twentieth of the noise the bound was 2.4 to 3.2 in 60 draws of it, where the ledger says 1.7; with a tenth it
    was above in two of three.
    """
    monkeypatch.setattr(sys.modules[one_run.__module__], "_CANARIES", 300)
    flat = absolute_paths(read_overrides(ROOT, [str(ROOT / "simulations/recipes/dp.toml")]))
    config = resolve({**flat, "run.dir": str(tmp_path)})
    config, data = settle(config, 2, load_federated(config, 2))
    scaled_noise(noise)(monkeypatch)
    finding = one_run(Audited(config, data, tmp_path, train_pack))
    assert finding.passed == (noise == 1.0), finding.numbers
