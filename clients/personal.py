"""What a client keeps between rounds, in a folder of its own: personal tensors and control variates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from fedlora.storage import write_whole


@final
class PersonalStore:
    """Tensors by client and round, which never leave the site.

    What a client holds after round r is written for round r + 1, beside what it started round r with, so a
    round that is repeated after a crash starts from the same tensors. Personal tensors and control variates are in one
    file, so that they are always of one round.

    Args:
        folder: Parent of the clients' folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, client: int, round_number: int) -> dict[str, NDArray[np.floating]] | None:
        """Return the tensors with which a client starts a round; None if it never trained before.

        Tensors written for later rounds are dropped: the server has gone back to this one.
        """
        rounds = self._rounds(client)
        for later in [number for number in rounds if number > round_number]:
            self._path(client, later).unlink()
        earlier = [number for number in rounds if number <= round_number]
        return load_file(self._path(client, max(earlier))) if earlier else None

    def save(self, client: int, round_number: int, tensors: Mapping[str, NDArray[np.floating]]) -> None:
        """Keep what a client holds after ``round_number``."""
        path = self._path(client, round_number + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({name: np.ascontiguousarray(value) for name, value in tensors.items()}))
        older = sorted(number for number in self._rounds(client) if number <= round_number)
        for number in older[:-1]:  # the newest of them is what this round started with
            self._path(client, number).unlink()

    def _path(self, client: int, round_number: int) -> Path:
        return self.folder / f"client-{client}" / f"round-{round_number}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        return [int(path.stem.split("-")[1]) for path in (self.folder / f"client-{client}").glob("round-*.safetensors")]
