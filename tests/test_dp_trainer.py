"""Clients under DP, in this process: what leaves, what it costs, and who may not train."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.accounts import Accounts, RefusedError
from clients.app import request_of
from clients.trainer import Job, Request, Trainer, Update
from fedlora.config import Config
from fedlora.data import load_federated
from fedlora.privacy import Ledger, Mechanism, Use, epsilon
from fedlora.tasks import Classification
from fedlora.wire import BUDGET_SPENT, Instruction
from simulations.audit import _seen_batches
from simulations.privacy import participations, resolve_privacy
from simulations.setup import build_strategy, resolve
from tests.support.tiny import save_tiny_language_model
from tests.test_trainer import tiny_flat

EQUAL_PARTS = {"data.partition": "iid"}


def dp_config(folder: Path, **changes: Any) -> Config:
    keys = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, **EQUAL_PARTS, **changes}
    config = resolve(tiny_flat(folder, **keys))
    return resolve_privacy(config, load_federated(config, 4))


def dp_trainer(folder: Path, **changes: Any) -> Trainer:
    config = dp_config(folder, **changes)
    job = Job(config.to_flat(), load_federated(config, 4), str(folder / "sites"))
    return Trainer(lambda: job, 1)


def ask(
    trainer: Trainer, clients: tuple[int, ...] = (0, 1, 2, 3), number: int = 1, ledger_heads: Any = None, **changes: Any
) -> list[Update]:
    strategy = build_strategy(trainer.loaded.config, trainer.loaded.specs)
    sent = {**strategy.initial(trainer.initial), **changes}
    ledger_heads = ("",) * len(clients) if ledger_heads is None else ledger_heads
    return trainer.train(Request(number, clients, strategy.all_roles(number), sent, ledger_heads))


def ledger(folder: Path, client: int) -> Ledger:
    return Ledger(folder / "sites" / f"client-{client}" / "ledger.jsonl", client)


UNTRUSTED = "its privacy ledger cannot be trusted; its own diagnostics.jsonl says why"


def noted(folder: Path, client: int) -> str:
    return (folder / "sites" / f"client-{client}" / "diagnostics.jsonl").read_text()


def test_nothing_but_noisy_tensors_leaves(tmp_path: Path) -> None:
    """No number of rows, no loss: what is left of a reply is the update, a public number and a hash."""
    for update in ask(dp_trainer(tmp_path)):
        assert (update.examples, update.loss, update.error, update.steps) == (0, None, "", 3)
        assert update.ledger_head == ledger(tmp_path, update.client).head() != ""


def test_the_ledger_holds_the_steps_really_taken(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path)
    for number, clients in ((1, (0, 1)), (2, (0, 2, 3)), (3, (0, 1))):
        ask(trainer, clients, number)
    mechanism = Mechanism.of(trainer.loaded.config)
    rounds = [[entry.round for entry in ledger(tmp_path, client).entries()] for client in range(4)]
    assert rounds == [[1, 2, 3], [1, 3], [2], [2]]
    assert set(ledger(tmp_path, 0).uses()) == {Use(1.0, mechanism.sample_rate, 3)}


def test_private_tensors_are_under_the_noise_and_stay(tmp_path: Path) -> None:
    """A step on an empty batch is noise alone, and of the size that is claimed."""
    keys = {"train.optimizer": "sgd", "train.learning-rate": 1.0, "train.local-steps": 1}
    trainer = dp_trainer(tmp_path, **{"method.head": "personal", "privacy.noise-multiplier": 50.0, **keys})
    mechanism, moves = Mechanism.of(trainer.loaded.config), []
    for number in range(1, 11):
        before = [trainer.personal.load(client, number) or trainer.initial for client in range(4)]
        with _seen_batches():
            updates = ask(trainer, number=number)
        assert all("classifier" not in name for update in updates for name in update.tensors)
        for client in range(4):
            kept = trainer.personal.load(client, number + 1)
            assert kept is not None
            moves += [(kept[name] - before[client][name]).ravel() for name in kept]
    moved = np.concatenate(moves) / (50.0 * mechanism.max_grad_norm / mechanism.expected_batch_size)
    assert (moved**2).mean() == pytest.approx(1.0, abs=6 * (2 / moved.size) ** 0.5)


def test_the_run_seed_does_not_decide_noise_or_samples(tmp_path: Path) -> None:
    """The server knows the seed; two runs with the same one must have nothing in common."""
    with _seen_batches() as seen:  # trains on empty batches: what moves is noise
        one, two = ask(dp_trainer(tmp_path / "a"), (0,)), ask(dp_trainer(tmp_path / "b"), (0,))
    assert all((one[0].tensors[name] != two[0].tensors[name]).all() for name in one[0].tensors)
    assert not all(map(np.array_equal, seen[0][0], seen[1][0]))


def test_a_repeated_round_draws_fresh_noise_and_is_charged_again(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path)
    one, two = ask(trainer, (0,)), ask(trainer, (0,))
    assert all((one[0].tensors[name] != two[0].tensors[name]).any() for name in one[0].tensors)
    assert [entry.round for entry in ledger(tmp_path, 0).entries()] == [1, 1]


def test_a_privacy_seed_reproduces(tmp_path: Path) -> None:
    one, two, other = (
        ask(dp_trainer(tmp_path / name, **{"privacy.seed": seed}), (0, 1))
        for name, seed in zip("abc", (5, 5, 6), strict=True)
    )
    assert all(np.array_equal(one[k].tensors[name], two[k].tensors[name]) for k in (0, 1) for name in one[k].tensors)
    assert not any(np.array_equal(one[0].tensors[name], other[0].tensors[name]) for name in one[0].tensors)
    assert not np.array_equal(one[0].tensors["classifier.weight"], one[1].tensors["classifier.weight"])
    assert "NOT PRIVATE" in ledger(tmp_path / "a", 0).path.read_text(), "in every artefact"


def test_a_client_refuses_the_round_that_would_pass_its_budget(tmp_path: Path) -> None:
    """The client that has taken part less often goes on."""
    trainer = dp_trainer(tmp_path, **{"privacy.epsilon": 1.0, "privacy.delta": 1e-3, "privacy.noise-multiplier": 2.0})
    config = trainer.loaded.config
    use = Mechanism.of(config).use()
    able = 0
    while epsilon([use] * (able + 1), target_delta=1e-3) <= 1.0:
        able += 1
    assert 0 < able < 60
    for number in range(1, able + 1):
        assert [update.error for update in ask(trainer, (0,), number)] == [""]
    refused, fine = ask(trainer, (0, 1), able + 1)
    assert refused.error.startswith(BUDGET_SPENT)
    assert "would pass privacy.epsilon = 1" in refused.error
    assert refused.tensors == {}
    assert fine.error == ""
    assert len(ledger(tmp_path, 0).uses()) == able
    spent = epsilon(ledger(tmp_path, 0).uses(), target_delta=1e-3)
    assert spent <= 1.0


def test_an_older_ledger_refuses_to_train(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path)
    ask(trainer, (0, 1))
    old = ledger(tmp_path, 0).path.read_bytes()
    heads = tuple(update.ledger_head for update in ask(trainer, (0, 1), 2))
    ledger(tmp_path, 0).path.write_bytes(old)
    refused, fine = ask(trainer, (0, 1), 3, heads)
    assert refused.error == UNTRUSTED
    assert "older copy" in noted(tmp_path, 0)
    assert refused.tensors == {}
    assert fine.error == ""


def test_an_edited_ledger_refuses_to_train(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path)
    ask(trainer, (0,))
    path = ledger(tmp_path, 0).path
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 1'))
    assert ask(trainer, (0,), 2)[0].error == UNTRUSTED
    assert "the file was changed" in noted(tmp_path, 0)


def test_where_the_ledger_cannot_be_written_nothing_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = dp_trainer(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Ledger, "charge", full)
    with pytest.raises(OSError, match="No space left"):
        ask(trainer, (0,))


def test_a_client_under_dp_does_not_evaluate_itself_for_the_server(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path, **{"method.head": "personal"})
    strategy = build_strategy(trainer.loaded.config, trainer.loaded.specs)
    request = Request(2, (0,), strategy.all_roles(2), {})
    with pytest.raises(ValueError, match="does not tell how its model does"):
        trainer.answer_evaluation(request)


def test_diagnostics_stay_at_the_site(tmp_path: Path) -> None:
    trainer = dp_trainer(tmp_path)
    ask(trainer, (2,))
    lines = (tmp_path / "sites" / "client-2" / "diagnostics.jsonl").read_text().splitlines()
    facts = json.loads(lines[0])
    assert facts["round"] == 1
    assert {"loss", "rows", "empty_steps", "clipped_fraction", "signal_to_noise", "error"} <= facts.keys()


def test_what_the_watch_sees_in_rows_stays_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a row gave a gradient is not covered by the noise: the update leaves as any other."""
    from fedlora.engine import training

    trainer = dp_trainer(tmp_path)
    monkeypatch.setattr(Trainer, "_check_trains", lambda *_: None)
    monkeypatch.setattr(training.Watch, "faults", lambda *_: ["lora_B never had a gradient in 3 steps"])
    update = ask(trainer, (0,))[0]
    assert update.error == ""
    assert update.tensors
    assert "never had a gradient" in noted(tmp_path, 0)


def test_a_server_that_saturates_the_head_learns_nothing(tmp_path: Path) -> None:
    """With logits so far apart only a row of the other class has a gradient: no reply may tell whether one is there."""
    trainer = dp_trainer(tmp_path, **{"train.batch-size": 20, "privacy.client-size": 20})
    labels = np.asarray(trainer.data.corpus.train.labels)
    for number in range(2):
        alike = np.flatnonzero(labels == 0)[:20]
        rows = np.append(alike[:-number], np.flatnonzero(labels == 1)[:number]) if number else alike
        job = replace(trainer.loaded.job, data=replace(trainer.data, clients=(rows,) * 4))
        held = Trainer(lambda job=job: job, 1)  # type: ignore[misc]
        held.loaded.seen_to_train.update([frozenset(held.loaded.specs) - {n for n in held.initial if "lora_A" in n}])
        update = ask(held, (0,), number + 1, **{"classifier.bias": np.array([1e4, 0.0])})[0]
        assert (update.error, bool(update.tensors)) == ("", True)


def test_what_an_exception_says_stays_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may quote a row; and the round is paid for, because that it failed is seen."""
    from fedlora import engine

    def fail(*_: Any) -> None:
        raise MemoryError("row says: patient Smith")

    trainer = dp_trainer(tmp_path)
    monkeypatch.setattr(Trainer, "_check_trains", lambda *_: None)
    monkeypatch.setattr(engine, "train_pack", fail)
    with pytest.raises(
        RuntimeError, match=r"^training failed at the site; its own diagnostics.jsonl says why$"
    ) as caught:
        ask(trainer, (0, 1))
    assert caught.value.__cause__ is None
    assert "MemoryError: row says: patient Smith" in noted(tmp_path, 1)
    assert [len(ledger(tmp_path, client).uses()) for client in (0, 1)] == [1, 1]


def test_what_loading_anew_says_stays_at_the_site_too(tmp_path: Path) -> None:
    """A trainer that was restarted within a round, and that now meets a row which it cannot read."""

    def job() -> Job:
        raise ValueError("the text 'patient Smith' has no tokens")

    request = Request(2, (0, 1), {}, {}, ("", ""))
    with pytest.raises(RuntimeError, match=r"^loading failed at the site; its own log says why$") as caught:
        Trainer(job, 1).train(request)
    assert caught.value.__cause__ is None
    with pytest.raises(ValueError, match="patient Smith"):  # without DP the reason is told
        Trainer(job, 1).train(replace(request, ledger_heads=()))


def test_a_server_must_say_what_it_last_saw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only for a server that says what it last saw of its ledger"):
        ask(dp_trainer(tmp_path), (0, 1), ledger_heads=())


def test_what_the_server_does_not_say_is_not_made_up() -> None:
    """The app deals an instruction to packs: without hashes of ledgers the trainer must see that there are none."""
    said = Instruction(1, (0, 3, 5), {}, "equal", {}, "", ledger_heads=("a", "", "c"))
    assert request_of(said, (3, 5)).ledger_heads == ("", "c")
    assert request_of(replace(said, ledger_heads=()), (3, 5)).ledger_heads == ()


def test_an_adapter_that_does_not_train_is_seen_on_rows_of_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is paid for."""
    from fedlora.engine import layers

    monkeypatch.setattr(layers.GroupedLayer, "forward", lambda self, x: self.base(x))
    with pytest.raises(ValueError, match="never had a gradient"):
        ask(dp_trainer(tmp_path), (0,))
    assert ledger(tmp_path, 0).uses() == []


def test_side_by_side_no_more_is_spent_than_the_budget(tmp_path: Path) -> None:
    """A round whose client is still at work elsewhere: look and charge are one."""
    keys = {"privacy.epsilon": 2.0, "privacy.delta": 1e-3, "privacy.noise-multiplier": 2.0}
    accounts = Accounts(tmp_path / "sites", dp_config(tmp_path, **keys))
    use = accounts.mechanism.use()
    able = next(n for n in range(1, 999) if epsilon([use] * (n + 1), target_delta=1e-3) > 2.0)

    def charge(number: int) -> int:
        try:
            accounts.charge(0, number, "")
        except RefusedError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(charge, range(able + 20))) == able
    assert len(ledger(tmp_path, 0).uses()) == able


def test_all_take_the_declared_steps_whatever_rows_they_have(tmp_path: Path) -> None:
    """Sample rate, denominator and steps come from the declared size, and tell nothing of the real one."""
    changes = {"data.partition": "quantity", "data.alpha": 0.3, "train.local-steps": 0, "privacy.client-size": 20}
    trainer = dp_trainer(tmp_path, **changes)
    sizes = {len(trainer.data.training_rows(client)) for client in range(4)}
    assert len(sizes) > 1
    assert {update.steps for update in ask(trainer)} == {5}
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
    job = Job(config.to_flat(), load_federated(config, 4), str(tmp_path / "sites"))
    for update in ask(Trainer(lambda: job, 1), (0, 1)):
        assert update.error == ""
        assert len(ledger(tmp_path, update.client).uses()) == 1


class TokenMean(Classification):  # type: ignore[misc]
    """The planted bug: one mean over the batch, as the losses of many models are."""

    def row_losses(self, model: Any, batch: Any) -> torch.Tensor:
        losses = super().row_losses(model, batch)
        share = batch["attention_mask"].sum(1) / batch["attention_mask"].sum()
        return losses * share * len(losses)


def test_a_loss_that_couples_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.tasks import TASKS

    monkeypatch.setitem(TASKS._entries, "classification", TokenMean)
    with pytest.raises(ValueError, match="a row's loss depends on the other rows of its batch"):
        ask(dp_trainer(tmp_path))
    plain = resolve(tiny_flat(tmp_path))
    job = Job(plain.to_flat(), load_federated(plain, 4), str(tmp_path / "sites"))
    assert ask(Trainer(lambda: job, 1))[0].error == "", "without DP it may be"


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
