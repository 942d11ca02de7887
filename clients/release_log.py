"""The append-only log of what left a site: every update, with the names, shapes, bytes and hash of its tensors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, final

from fedlora.exchange import Update
from fedlora.methods import tensors_digest

_DAY_S = 86400.0


@final
class ReleaseLog:
    """What left a site, a line an update; on the disk before the update leaves.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, run: str, round_number: int, update: Update, *, again: bool = False) -> None:
        """Note an update that is about to leave.

        Args:
            run: The run.
            round_number: The round, from 1.
            update: The update.
            again: Whether it has left before.

        Raises:
            OSError: The line cannot be written; the update must not leave.
        """
        tensors = {**update.tensors, **update.extra}
        report = update.report
        line = {
            "time": time.time(),
            "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "run": run,
            "round": round_number,
            "again": again,
            "outcome": str(report.outcome),
            "reason": report.reason,
            "ledger": report.ledger_head,
            "examples": report.examples,
            "metrics": dict(report.metrics),
            "tensors": {name: list(value.shape) for name, value in tensors.items()},
            "bytes": sum(value.nbytes for value in tensors.values()),
            "sha256": tensors_digest(tensors),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # by a process that was killed while it wrote
            file.write((b"\n" if torn else b"") + json.dumps(line).encode() + b"\n")
            os.fsync(handle)

    def lines(self) -> list[dict[str, Any]]:
        """Return what left, oldest first; a line that was never finished is of an update that did not leave."""
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        found = []
        for line in text.split("\n"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def rounds_today(self) -> int:
        """Return how many updates left in the last 24 hours; one that is sent again counts once."""
        since = time.time() - _DAY_S
        lines = (line for line in self.lines() if line["tensors"] and not line["again"])
        return sum(line["time"] > since for line in lines)
