"""Clients under DP, in this process: what leaves, and what trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.worker import Worker
from fedlora.data import load_federated
from fedlora.engine import train_pack
from fedlora.exchange import Outcome
from fedlora.privacy import Mechanism, Use, epsilon
from simulations.audit.site import Observed
from simulations.privacy import participations, resolve_privacy
from simulations.setup import resolve
from tests.support.tiny import save_tiny_language_model
from tests.support.trainers import (
    EQUAL_PARTS,
    BatchMean,
    ask,
    dp_config,
    dp_worker,
    instruction,
    ledger,
    noted,
    tiny_flat,
    tiny_job,
    tiny_worker,
)


def test_nothing_but_noisy_tensors_leaves(tmp_path: Path) -> None:
    """No number of rows, no loss: what is left of a reply is the update, a public number and a hash."""
    for update in ask(dp_worker(tmp_path)):
        assert (update.report.examples, update.report.reason, update.report.steps) == (0, "", 3)
        assert update.report.metrics == {}
        assert update.report.ledger_head == ledger(tmp_path, update.client).head() != ""


def test_personal_tensors_are_under_the_noise_and_stay(tmp_path: Path) -> None:
    """A step on an empty batch is noise alone, and of the size that is claimed."""
    engine = Observed(train_pack)
    keys = {"train.optimizer": "sgd", "train.learning-rate": 1.0, "train.local-steps": 1}
    worker = dp_worker(tmp_path, engine, **{"method.head": "personal", "privacy.noise-multiplier": 50.0, **keys})
    mechanism, moves = Mechanism.of(worker.loaded.model.config), []
    for number in range(1, 11):
        before = [worker.loaded.store.load(client, number) or worker.loaded.model.initial for client in range(4)]
        with engine.recording():
            updates = ask(worker, number=number)
        assert all("classifier" not in name for update in updates for name in update.tensors)
        for client in range(4):
            kept = worker.loaded.store.load(client, number + 1)
            assert kept is not None
            moves += [(kept[name] - before[client][name]).ravel() for name in kept]
    moved = np.concatenate(moves) / (50.0 * mechanism.max_grad_norm / mechanism.expected_batch_size)
    assert (moved**2).mean() == pytest.approx(1.0, abs=6 * (2 / moved.size) ** 0.5)


def test_the_run_seed_does_not_decide_noise_or_samples(tmp_path: Path) -> None:
    """The server knows the seed; two runs with the same one must have nothing in common."""
    engine = Observed(train_pack)
    with engine.recording() as seen:  # trains on empty batches: what moves is noise
        one, two = ask(dp_worker(tmp_path / "a", engine), (0,)), ask(dp_worker(tmp_path / "b", engine), (0,))
    assert all((one[0].tensors[name] != two[0].tensors[name]).all() for name in one[0].tensors)
    assert not all(map(np.array_equal, seen[0][0], seen[1][0]))


def test_a_privacy_seed_reproduces(tmp_path: Path) -> None:
    one, two, other = (
        ask(dp_worker(tmp_path / name, **{"privacy.seed": seed}), (0, 1))
        for name, seed in zip("abc", (5, 5, 6), strict=True)
    )
    assert all(np.array_equal(one[k].tensors[name], two[k].tensors[name]) for k in (0, 1) for name in one[k].tensors)
    assert not any(np.array_equal(one[0].tensors[name], other[0].tensors[name]) for name in one[0].tensors)
    assert not np.array_equal(one[0].tensors["classifier.weight"], one[1].tensors["classifier.weight"])
    assert "NOT PRIVATE" in ledger(tmp_path / "a", 0).path.read_text(), "in every artefact"


def test_diagnostics_stay_at_the_site(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path)
    ask(worker, (2,))
    lines = (tmp_path / "sites" / "client-2" / "diagnostics.jsonl").read_text().splitlines()
    facts = json.loads(lines[0])
    assert facts["round"] == 1
    assert {"loss", "rows", "empty_steps", "clipped_fraction", "signal_to_noise", "error"} <= facts.keys()


def test_what_the_watch_sees_in_rows_stays_at_the_site(tmp_path: Path) -> None:
    """Whether a row gave a gradient is not covered by the noise: the update leaves as any other."""

    def watched(*args: Any, **local: Any) -> Any:
        results = train_pack(*args, **local)
        return (
            [replace(one, error="lora_B never had a gradient in 3 steps") for one in results] if args[4:] else results
        )

    update = ask(dp_worker(tmp_path, watched), (0,))[0]
    assert update.report.reason == ""
    assert update.tensors
    assert "never had a gradient" in noted(tmp_path, 0)


def test_a_server_that_saturates_the_head_learns_nothing(tmp_path: Path) -> None:
    """With logits so far apart only a row of the other class has a gradient: no reply may show whether there is one."""
    worker = dp_worker(tmp_path, **{"train.batch-size": 20, "privacy.client-size": 20})
    labels = np.asarray(worker.loaded.job.data.corpus.train.labels)
    for number in range(2):
        alike = np.flatnonzero(labels == 0)[:20]
        rows = np.append(alike[:-number], np.flatnonzero(labels == 1)[:number]) if number else alike
        job = replace(worker.loaded.job, data=replace(worker.loaded.job.data, clients=(rows,) * 4))
        held = Worker(lambda job=job: job, 1)  # type: ignore[misc]
        held.loaded.trainer.trainable.add(frozenset(n for n in held.loaded.model.specs if "lora_A" not in n))
        update = ask(held, (0,), number + 1, **{"classifier.bias": np.array([1e4, 0.0])})[0]
        assert (update.report.reason, bool(update.tensors)) == ("", True)


def test_what_an_exception_says_stays_at_the_site(tmp_path: Path) -> None:
    """It may quote a row; and the round is paid for, because that it failed is seen."""

    def fail(*args: Any, **local: Any) -> Any:
        if len(args) == 4:  # on made-up rows, without a private step
            return train_pack(*args, **local)
        raise ValueError("row says: patient Smith")

    for update in ask(dp_worker(tmp_path, fail), (0, 1)):
        assert update.report.reason == "training failed at the site; its own diagnostics.jsonl says why"
        assert update.tensors == {}
    assert "ValueError: row says: patient Smith" in noted(tmp_path, 1)
    assert [len(ledger(tmp_path, client).uses()) for client in (0, 1)] == [1, 1]


def test_a_client_under_dp_does_not_evaluate_itself_for_the_server(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path, **{"method.head": "personal"})
    (report,) = worker.report(instruction(worker, (0,), 2))
    assert "does not report how its model does" in report.reason
    assert (report.outcome, report.examples, report.metrics) == (Outcome.FAILED, 0, {})


def test_an_adapter_that_does_not_train_is_seen_on_rows_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is paid for."""
    from fedlora.engine import layers

    monkeypatch.setattr(layers.GroupedLayer, "forward", lambda self, x: self.base(x))
    assert "never had a gradient" in ask(dp_worker(tmp_path), (0,))[0].report.reason
    assert ledger(tmp_path, 0).uses() == []


def test_all_take_the_declared_steps_whatever_rows_they_have(tmp_path: Path) -> None:
    """Sample rate, denominator and steps come from the declared size, and depend on nothing of the real one."""
    changes = {"data.partition": "quantity", "data.alpha": 0.3, "train.local-steps": 0, "privacy.client-size": 20}
    worker = dp_worker(tmp_path, **changes)
    sizes = {len(worker.loaded.job.data.training_rows(client)) for client in range(4)}
    assert len(sizes) > 1
    assert {update.report.steps for update in ask(worker)} == {5}
    assert {use for client in range(4) for use in ledger(tmp_path, client).uses()} == {Use(1.0, 0.2, 5)}


def test_a_language_model_under_dp(tmp_path: Path) -> None:
    changes = {
        "task": "causal-lm",
        "model.name": save_tiny_language_model(tmp_path / "lm"),
        "data.answer-column": "label",
        "strategy.name": "fedavg",
    }
    config = resolve_privacy(
        resolve(
            {**tiny_flat(tmp_path), "privacy.mode": "dp", "privacy.noise-multiplier": 1.0, **EQUAL_PARTS, **changes}
        ),
        load_federated(resolve({**tiny_flat(tmp_path), **EQUAL_PARTS, **changes}), 4),
    )
    job = tiny_job(config, tmp_path)
    for update in ask(Worker(lambda: job, 1), (0, 1)):
        assert update.report.reason == ""
        assert len(ledger(tmp_path, update.client).uses()) == 1


def test_a_loss_that_couples_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.tasks import TASKS

    monkeypatch.setitem(TASKS._entries, "classification", BatchMean)
    for worker in (dp_worker(tmp_path), tiny_worker(tmp_path)):
        with pytest.raises(ValueError, match="a row's loss depends on the other rows of its batch"):
            worker.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch-size": 64}, r"train.batch-size = 64: is more than the \d+ training rows of a client"),
        ({"privacy.delta": 0.05}, r"privacy.delta = 0.05: must be below 1 / \d+"),
        (
            {"privacy.epsilon": 1e-9, "privacy.delta": 1e-15, "privacy.noise-multiplier": 0.0},
            r"privacy.epsilon = 1e-09: no noise multiplier",
        ),
    ],
)
def test_what_cannot_be_private_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        dp_config(tmp_path, **changes)


def test_noise_is_found_for_the_client_that_is_sampled_most(tmp_path: Path) -> None:
    changes = {"privacy.noise-multiplier": 0.0, "privacy.epsilon": 2.0, "federation.clients-per-round": 2, "rounds": 7}
    config = dp_config(tmp_path, **changes)
    counts = participations(config)[-1]
    assert int(counts.max()) < 7
    most = epsilon([Mechanism.of(config).use(int(counts.max()))], target_delta=config.privacy.delta)
    assert 1.98 < most <= 2.0


def test_weights_are_equal_under_dp(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"strategy.weights": "examples"})
    assert config.strategy.weights == "equal"
