"""The privacy ledger: an append-only, hash-chained file for each client that records its DP-SGD steps.

A line is one round's use. Each carries the hash of the line before it, so that no line can be changed, dropped or moved
without breaking the chain; the first names the client and a random number, so that no other client's ledger can stand
in. A line is on the disk before the update that it pays for leaves (:meth:`Ledger.charge` returns after ``fsync``).
Cutting lines off the end leaves a valid chain: that shows when the last hash that the server has seen is missing, which
is why clients send it. Server and client both rolled back together cannot be detected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from filelock import FileLock

from fedlora.privacy.accounting import Use
from fedlora.storage import append_to, writing

_FORMAT = 1


class LedgerError(ValueError):
    """A ledger cannot be trusted; the message says why, and what to do."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    Attributes:
        round: The round, from 1. A round that was repeated is there twice.
        use: What the client's rows were used for.
        hash: Of this line and, through it, of all before.
        run: The run, at a deployed site, whose ledger is one for all runs.
    """

    round: int
    use: Use
    hash: str
    run: str = ""


@final
class Ledger:
    """A client's ledger.

    Args:
        path: Its file; made by the first charge.
        client: Whose it is: a client's number, or the name of a deployed site.
        sync: Puts an open file on the disk, given its descriptor.
    """

    def __init__(self, path: Path, client: int | str, sync: Callable[[int], None] = os.fsync) -> None:
        self.path = path
        self.client = client
        self._sync = sync

    def entries(self) -> list[Entry]:
        """Return all entries, with the chain checked.

        A last line without its end is what a process leaves that is killed while it writes. Nothing that it would have
        paid for has left, so it does not count.

        Raises:
            LedgerError: The file is not a ledger, belongs to another client, or was changed.
        """
        return self._read()[0]

    def head(self) -> str:
        """Return the hash of the last entry; empty where there is none.

        Raises:
            LedgerError: As for :meth:`entries`.
        """
        entries = self.entries()
        return entries[-1].hash if entries else ""

    def uses(self) -> list[Use]:
        """Return what the client's rows were used for, entry by entry.

        Raises:
            LedgerError: As for :meth:`entries`.
        """
        return [entry.use for entry in self.entries()]

    def check_holds(self, head: str) -> list[Entry]:
        """Return all entries, and refuse a ledger that lacks what the server last saw of it.

        Args:
            head: The last hash that the server has seen; empty: it has seen none.

        Raises:
            LedgerError: It does, or as for :meth:`entries`.
        """
        entries = self.entries()
        self._check_holds(head, entries)
        return entries

    def charge(
        self,
        round_number: int,
        use: Use,
        *,
        head: str = "",
        budget: Callable[[Sequence[Entry]], None] | None = None,
        remark: str = "",
        run: str = "",
    ) -> Entry:
        """Add an entry, and return it when it is on the disk; no other process can charge in between.

        Args:
            round_number: The round, from 1.
            use: What the client's rows are used for.
            head: The last hash that the server has seen; empty: it has seen none.
            budget: Raises where all entries together, this one included, are too many.
            remark: What a reader must know of the entry.
            run: The run, where the ledger is one for several.

        Raises:
            LedgerError: As for :meth:`check_holds`.
            StorageError: It cannot be written.
        """
        with writing(self.path):
            made = [folder for folder in (self.path.parent, *self.path.parent.parents) if not folder.exists()]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for folder in made:
                self._sync_folder(folder.parent)
            with FileLock(self.path.with_suffix(".lock")):
                entries, opening, whole = self._read()
                self._check_holds(head, entries)
                if budget is not None:
                    budget([*entries, Entry(round_number, use, "", run)])
                said = {key: value for key, value in (("remark", remark), ("run", run)) if value}
                facts = {"round": round_number, **use._asdict(), **said}
                return Entry(round_number, use, self._append(facts, entries, opening, whole), run)

    def _check_holds(self, head: str, entries: Sequence[Entry]) -> None:
        if head and head not in {entry.hash for entry in entries}:
            raise LedgerError(
                f"the privacy ledger {self.path} has {len(entries)} entries, not the one that the server last saw: "
                "it was deleted, cut short or replaced by an older copy. Restore the newest copy; without it what was "
                "spent is not known, and this client must not train."
            )

    def _append(self, facts: Mapping[str, Any], entries: Sequence[Entry], opening: dict[str, Any], whole: int) -> str:
        """Write an entry and return its hash when it is on the disk."""
        lines = b""
        if not opening:
            opening = self._opening()
            lines += _line(opening)
        record = {
            **facts,
            "time": _now(),
            "previous": entries[-1].hash if entries else opening["hash"],
        }
        digest = _hash(record)
        lines += _line({**record, "hash": digest})
        with self.path.open("ab", buffering=0) as file:
            file.truncate(whole)  # of what a killed process left
            append_to(file, lines)
            self._sync(file.fileno())
        if not entries:
            self._sync_folder(self.path.parent)
        return digest

    def _sync_folder(self, path: Path) -> None:
        """Put a folder's entries on the disk: a new file's name is part of its folder."""
        handle = os.open(path, os.O_RDONLY)
        try:
            self._sync(handle)
        finally:
            os.close(handle)

    def _opening(self) -> dict[str, Any]:
        record = {"ledger": _FORMAT, "client": self.client, "nonce": secrets.token_hex(16), "time": _now()}
        return {**record, "hash": _hash(record)}

    def _read(self) -> tuple[list[Entry], dict[str, Any], int]:
        """Return the entries, the first line, and the bytes that whole lines take up."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        records = [self._record(line, number) for number, line in enumerate(data[:whole].splitlines(), start=1)]
        if not records:
            return [], {}, whole
        opening, *rest = records
        if opening.get("ledger") != _FORMAT:
            raise LedgerError(f"{self.path} is not a privacy ledger of this version.")
        if opening.get("client") != self.client:
            raise LedgerError(
                f"the privacy ledger {self.path} is client {opening.get('client')}'s, not client {self.client}'s: "
                "it was copied or moved. Restore this client's own."
            )
        entries: list[Entry] = []
        previous = opening["hash"]
        for number, record in enumerate(rest, start=2):
            if record.get("previous") != previous:
                raise self._changed(number, "does not follow the line before it")
            previous = record["hash"]
            entries.append(self._entry(record, number))
        return entries, opening, whole

    def _entry(self, record: Mapping[str, Any], number: int) -> Entry:
        match record:
            case {
                "round": int(round_number),
                "noise_multiplier": float(noise_multiplier),
                "sample_rate": float(sample_rate),
                "steps": int(steps),
            } if math.isfinite(noise_multiplier) and noise_multiplier >= 0 and 0 < sample_rate <= 1 and steps > 0:
                run = str(record.get("run", ""))
                return Entry(round_number, Use(noise_multiplier, sample_rate, steps), record["hash"], run)
        raise self._changed(number, "is not an entry")

    def _record(self, line: bytes, number: int) -> dict[str, Any]:
        """Return a line's record, if it has the hash that it says it has."""
        try:
            record = json.loads(line)
            digest = record.pop("hash")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise self._changed(number, f"cannot be read ({error})") from error
        if _hash(record) != digest:
            raise self._changed(number, "does not have the hash that it says it has")
        return {**record, "hash": digest}

    def _changed(self, number: int, what: str) -> LedgerError:
        return LedgerError(
            f"line {number} of the privacy ledger {self.path} {what}: the file was changed. Restore an unchanged copy; "
            "without it what was spent is not known, and this client must not train."
        )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
