"""A ledger that never forgets: what was spent is on the disk first, and nothing of it can be taken back."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedlora.privacy import Ledger, LedgerError, Use

USE = Use(0.9, 0.05, 7)


def charged(folder: Path, client: int = 3, rounds: int = 4) -> Ledger:
    ledger = Ledger(folder / f"client-{client}" / "ledger.jsonl", client)
    for number in range(1, rounds + 1):
        ledger.charge(number, USE)
    return ledger


def test_a_ledger_remembers(tmp_path: Path) -> None:
    assert charged(tmp_path, rounds=0).head() == ""
    head = charged(tmp_path).head()
    again = Ledger(charged(tmp_path, rounds=0).path, 3)
    assert again.uses() == [USE] * 4
    assert [entry.round for entry in again.entries()] == [1, 2, 3, 4]
    assert again.head() == head == again.entries()[-1].hash


def test_a_repeated_round_is_charged_again(tmp_path: Path) -> None:
    ledger = charged(tmp_path)
    ledger.charge(4, USE)
    assert [entry.round for entry in ledger.entries()] == [1, 2, 3, 4, 4]


def test_two_ledgers_never_share_a_hash(tmp_path: Path) -> None:
    one, two = charged(tmp_path / "a"), charged(tmp_path / "b")
    assert not {entry.hash for entry in one.entries()} & {entry.hash for entry in two.entries()}


def edit(change: Callable[[list[dict[str, object]]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        change(records)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return apply


EDITS: dict[str, Callable[[Path], None]] = {
    "fewer steps": edit(lambda records: records[2].update(steps=1)),
    "more noise": edit(lambda records: records[4].update(noise_multiplier=9.0)),
    "an entry dropped": edit(lambda records: records.pop(2)),
    "entries exchanged": edit(lambda records: records.insert(1, records.pop(2))),
    "the first entry dropped": edit(lambda records: records.pop(1)),
    "an entry twice": edit(lambda records: records.insert(2, records[2])),
    "the opening dropped": edit(lambda records: records.pop(0)),
    "a list": lambda path: path.write_text(path.read_text() + "[1]\n"),
    "no JSON": lambda path: path.write_text(path.read_text().replace("{", "[", 1)),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\n" + path.read_bytes()),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_ledger_is_refused(name: str, tmp_path: Path) -> None:
    ledger = charged(tmp_path)
    EDITS[name](ledger.path)
    with pytest.raises(LedgerError, match=r"changed|not a privacy ledger"):
        ledger.uses()
    before = ledger.path.read_bytes()
    with pytest.raises(LedgerError):
        ledger.charge(5, USE)
    assert ledger.path.read_bytes() == before


@pytest.mark.parametrize("change", [{"steps": -5}, {"sample_rate": 0.0}, {"noise_multiplier": None}, {"round": "1"}])
def test_a_last_entry_that_is_none_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    """With a hash that fits: whoever can write the file can make one."""
    from fedlora.privacy.ledger import _hash

    def apply(records: list[dict[str, object]]) -> None:
        record = {key: value for key, value in records[-1].items() if key != "hash"} | change
        records[-1] = {**record, "hash": _hash(record)}

    ledger = charged(tmp_path)
    edit(apply)(ledger.path)
    with pytest.raises(LedgerError, match=r"line 5 .* is not an entry"):
        ledger.uses()


def test_an_edit_with_its_hash_made_anew_breaks_the_chain(tmp_path: Path) -> None:
    from fedlora.privacy.ledger import _hash

    def change(records: list[dict[str, object]]) -> None:
        record = {key: value for key, value in records[2].items() if key != "hash"} | {"steps": 1}
        records[2] = {**record, "hash": _hash(record)}

    ledger = charged(tmp_path)
    edit(change)(ledger.path)
    with pytest.raises(LedgerError, match=r"line 4 .* does not follow the line before it"):
        ledger.uses()


def test_a_ledger_of_another_client_is_refused(tmp_path: Path) -> None:
    rich, poor = charged(tmp_path, client=1, rounds=1), charged(tmp_path, client=2, rounds=9)
    shutil.copy(rich.path, poor.path)
    with pytest.raises(LedgerError, match=r"is client 1's, not client 2's: it was copied or moved"):
        poor.uses()


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_ledger_cut_short_is_refused(lines: int, tmp_path: Path) -> None:
    """Cut at a line's end the chain is valid; what the server last saw is missing."""
    ledger = charged(tmp_path)
    seen = ledger.head()
    ledger.path.write_text("".join(line + "\n" for line in ledger.path.read_text().splitlines()[:lines]))
    with pytest.raises(LedgerError, match="deleted, cut short or replaced by an older copy"):
        ledger.check_holds(seen)


def test_a_deleted_ledger_is_refused(tmp_path: Path) -> None:
    ledger = charged(tmp_path)
    seen = ledger.head()
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="has 0 entries"):
        ledger.check_holds(seen)
    ledger.check_holds("")  # the server never saw one: a new client


def test_a_ledger_that_is_newer_than_the_server_is_fine(tmp_path: Path) -> None:
    """The client was killed after it wrote, or the server went back to a checkpoint."""
    ledger = charged(tmp_path)
    seen = ledger.head()
    ledger.charge(5, USE)
    ledger.check_holds(seen)


def test_half_a_line_is_what_a_killed_process_leaves(tmp_path: Path) -> None:
    """Nothing that it would have paid for has left; the next charge takes its place."""
    ledger = charged(tmp_path)
    whole = ledger.path.read_bytes()
    for cut in (1, 20, 150):
        ledger.path.write_bytes(whole + whole.splitlines(keepends=True)[-1][:cut])
        assert len(ledger.uses()) == 4
        ledger.charge(5, USE)
        assert len(Ledger(ledger.path, 3).uses()) == 5


def test_the_charge_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    """What was put on the disk holds the whole entry at that moment."""
    assert inspect.signature(Ledger).parameters["sync"].default is os.fsync
    seen: list[bytes] = []
    folders: list[str] = []

    def sync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            folders.append(Path(f"/proc/self/fd/{handle}").resolve().name)
        else:
            seen.append(ledger.path.read_bytes())

    ledger = Ledger(tmp_path / "sites" / "client-0" / "ledger.jsonl", 0, sync)
    entry = ledger.charge(1, USE)
    assert entry.hash.encode() in seen[-1]
    assert seen[-1].endswith(b"\n")
    assert folders == ["sites", tmp_path.name, "client-0"], "the names of new files and folders, too"


def test_a_ledger_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="blocked"):
        Ledger(blocked / "ledger.jsonl", 0).charge(1, USE)
