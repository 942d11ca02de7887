"""Tokenized rows that the trainers of one machine share: tokenized by the first that needs them, mapped by all.

The files are in a folder that only this user can enter, and each only this user can read. They are there in a
simulation alone: a deployed site's rows stay in memory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, final

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from fedlora.data import Table
from fedlora.ragged import Ragged
from fedlora.tasks import Examples, Rows

_logger = logging.getLogger(__name__)
_ARRAYS = ("tokens", "starts", "targets", "types")


@final
class SharedRows:
    """A folder of tokenized tables, by what was tokenized and how.

    Args:
        folder: The folder; it is made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, table: Table, how: tuple[Any, ...], make: Callable[[], Rows]) -> Rows:
        """Return a table's tokenized rows: those that are there, or else made, and kept for the others.

        One process makes them, and the others wait for it. Rows of a task's own type, and all where nothing can be
        written, are each process's own.

        Args:
            table: The table.
            how: What else the rows depend on, in values that print the same in every process.
            make: Tokenizes the table; what it raises is raised.
        """
        place = self.folder / _digest(table, how)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(f"{place}.lock", mode=0o600)
            lock.acquire()
        except OSError as error:
            _logger.warning("tokenized rows are not shared: %s", error)
            return make()
        try:
            if place.is_dir():
                return _opened(place)
            rows = make()
            if not isinstance(rows, Examples):
                return rows
            try:
                _write(rows, place)
                return _opened(place)
            except OSError as error:
                _logger.warning("tokenized rows are not shared: %s", error)
                return rows
        finally:
            lock.release()

    def remove(self) -> None:
        """Remove the folder; what is mapped stays readable."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _digest(table: Table, how: tuple[Any, ...]) -> str:
    digest = hashlib.blake2b(repr(how).encode(), digest_size=16)
    for item in fields(table):
        digest.update(repr(getattr(table, item.name)).encode())
    return digest.hexdigest()


def _write(rows: Examples, place: Path) -> None:
    """Write rows under a name of their own, and give them theirs when they are whole."""
    partial = Path(tempfile.mkdtemp(dir=place.parent, prefix=f"{place.name}."))  # mode 0700
    try:
        targets, types = rows.targets, rows.types
        arrays: dict[str, NDArray[Any]] = {"tokens": rows.flat, "starts": rows.starts}
        arrays["targets"] = targets.flat if isinstance(targets, Ragged) else np.asarray(targets)
        arrays |= {"types": types.flat} if isinstance(types, Ragged) else {}
        for name, value in arrays.items():
            handle = os.open(partial / f"{name}.npy", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as file:
                np.save(file, value)
        partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _opened(place: Path) -> Examples:
    """Return rows whose numbers are mapped, read-only, and in memory once for all processes."""
    arrays = {
        name: np.load(file, mmap_mode="r").view(np.ndarray)
        for name in _ARRAYS
        if (file := place / f"{name}.npy").is_file()
    }
    tokens, starts, targets = arrays["tokens"], arrays["starts"], arrays["targets"]
    learned = targets.dtype == np.bool_
    return Examples(
        Ragged(tokens, starts),
        Ragged(targets, starts) if learned else targets,
        Ragged(arrays["types"], starts) if "types" in arrays else (),
    )
