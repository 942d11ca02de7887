"""What each pack of a run took, and on which trainer: in ``packs.jsonl``."""

from __future__ import annotations

from typing import Final, final

from clients.pool import TrainerPool
from fedlora.runs.folder import RunFolder
from fedlora.server.observers import Observer, RoundEnd

FILE: Final = "packs.jsonl"


@final
class PackTimes(Observer):
    """Writes a line for each pack that was trained: what a round waits for shows where trainers have unequal sums.

    Args:
        pool: The trainers.
        folder: The run folder.
    """

    def __init__(self, pool: TrainerPool, folder: RunFolder) -> None:
        self._pool, self._folder = pool, folder
        self._known = len(pool.trained())  # of the runs before on the same trainers

    def on_round(self, end: RoundEnd) -> None:
        """Write the packs of the round."""
        records = self._pool.trained(self._known)
        if records:
            self._folder.append(FILE, *records)
        self._known += len(records)
