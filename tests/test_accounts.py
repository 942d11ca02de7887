"""Clients' privacy accounts: what a round costs, and who may not train."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from clients.accounts import Accounts
from clients.errors import RefusedError
from clients.limits import SiteLimits
from clients.worker import Worker
from fedlora.exchange import Instruction, Outcome
from fedlora.privacy import Mechanism, Use, epsilon
from tests.support.runs import small_disk
from tests.support.trainers import ask, dp_config, dp_worker, ledger, noted, tiny_job

UNTRUSTED = "its privacy ledger cannot be trusted; its own diagnostics.jsonl says why"


def test_the_ledger_holds_the_steps_really_taken(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path)
    for number, clients in ((1, (0, 1)), (2, (0, 2, 3)), (3, (0, 1))):
        ask(worker, clients, number)
    mechanism = Mechanism.of(worker.loaded.model.config)
    rounds = [[entry.round for entry in ledger(tmp_path, client).entries()] for client in range(4)]
    assert rounds == [[1, 2, 3], [1, 3], [2], [2]]
    assert set(ledger(tmp_path, 0).uses()) == {Use(1.0, mechanism.sample_rate, 3)}


def test_a_repeated_round_draws_fresh_noise_and_is_charged_again(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path)
    one, two = ask(worker, (0,)), ask(worker, (0,))
    assert all((one[0].tensors[name] != two[0].tensors[name]).any() for name in one[0].tensors)
    assert [entry.round for entry in ledger(tmp_path, 0).entries()] == [1, 1]


def test_a_client_refuses_the_round_that_would_pass_its_budget(tmp_path: Path) -> None:
    """The client that has taken part less often goes on."""
    worker = dp_worker(tmp_path, **{"privacy.epsilon": 1.0, "privacy.delta": 1e-3, "privacy.noise-multiplier": 2.0})
    config = worker.loaded.model.config
    use = Mechanism.of(config).use()
    able = 0
    while epsilon([use] * (able + 1), target_delta=1e-3) <= 1.0:
        able += 1
    assert 0 < able < 60
    for number in range(1, able + 1):
        assert [update.report.reason for update in ask(worker, (0,), number)] == [""]
    refused, fine = ask(worker, (0, 1), able + 1)
    assert refused.report.outcome is Outcome.BUDGET_SPENT
    assert "would pass privacy.epsilon = 1" in refused.report.reason
    assert refused.tensors == {}
    assert fine.report.reason == ""
    assert len(ledger(tmp_path, 0).uses()) == able
    spent = epsilon(ledger(tmp_path, 0).uses(), target_delta=1e-3)
    assert spent <= 1.0


def test_an_older_ledger_refuses_to_train(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path)
    ask(worker, (0, 1))
    old = ledger(tmp_path, 0).path.read_bytes()
    heads = tuple(update.report.ledger_head for update in ask(worker, (0, 1), 2))
    ledger(tmp_path, 0).path.write_bytes(old)
    refused, fine = ask(worker, (0, 1), 3, heads)
    assert refused.report.reason == UNTRUSTED
    assert "older copy" in noted(tmp_path, 0)
    assert refused.tensors == {}
    assert fine.report.reason == ""


def test_an_edited_ledger_refuses_to_train(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path)
    ask(worker, (0,))
    path = ledger(tmp_path, 0).path
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 1'))
    assert ask(worker, (0,), 2)[0].report.reason == UNTRUSTED
    assert "the file was changed" in noted(tmp_path, 0)


@pytest.mark.parametrize("name", ["", "site-a"])
def test_where_the_ledger_cannot_be_written_nothing_leaves_but_why(name: str, tmp_path: Path) -> None:
    """A researcher's own disk is named; of a site's own, the path stays there."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    own = {"name": name} if name else {}
    job = tiny_job(dp_config(tmp_path), tmp_path, **own)
    (update,) = ask(Worker(lambda: job, 1, sync=full), (0,))
    path = tmp_path / "sites" / "client-0" / "ledger.jsonl"
    why = "its privacy ledger cannot be written: No space left on device"
    assert update.report.reason == (
        why if name else f"{path} cannot be written: No space left on device; make room there"
    )
    assert update.tensors == {}


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="only root mounts")
def test_a_full_disk_leaves_the_ledger_whole(tmp_path: Path) -> None:
    """A disk filled for real, in the middle of an entry: the ledger ends with the entry before, and goes on from it."""
    folder = tmp_path / "disk"
    with small_disk(folder, "64k"):
        accounts = Accounts(SiteLimits(str(folder)), dp_config(tmp_path))
        head, number = accounts.charge(0, 1, ""), 1
        with (folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        refused = ""
        while not refused:
            number += 1
            try:
                head = accounts.charge(0, number, head)
            except RefusedError as error:
                refused = str(error)
        assert refused.endswith("ledger.jsonl cannot be written: No space left on device; make room there")
        accounts.note(0, number, {"error": "x" * 5000})  # is lost, and ends nothing
        own = accounts.ledger(0)
        assert own.path.read_bytes().endswith(b"}\n")
        assert [entry.round for entry in own.entries()] == list(range(1, number))
        (folder / "filler").unlink()
        accounts.charge(0, number, head)
        assert len(own.entries()) == number


def test_side_by_side_no_more_is_spent_than_the_budget(tmp_path: Path) -> None:
    """A round whose client is still at work elsewhere: check and charge are one."""
    keys = {"privacy.epsilon": 2.0, "privacy.delta": 1e-3, "privacy.noise-multiplier": 2.0}
    accounts = Accounts(SiteLimits(str(tmp_path / "sites")), dp_config(tmp_path, **keys))
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


def test_a_server_must_say_what_it_last_saw(tmp_path: Path) -> None:
    for update in ask(dp_worker(tmp_path), (0, 1), ledger_heads=()):
        assert "only for a server that says what it last saw of its ledger" in update.report.reason
        assert update.tensors == {}


def test_what_the_server_does_not_say_is_not_made_up() -> None:
    """An instruction is cut into packs: without hashes of ledgers the trainer must see that there are none."""
    whole = Instruction(1, (0, 3, 5), {}, {}, ledger_heads=("a", "", "c"))
    assert whole.part((3, 5)).ledger_heads == ("", "c")
    assert replace(whole, ledger_heads=()).part((3, 5)).ledger_heads == ()
