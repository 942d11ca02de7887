"""New files and folders with exact permissions, whatever the process's mask.

What is private is never readable by anybody else, not even for the moment in which it is written, and nothing here
overwrites a file.
"""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Make a folder with exactly these permissions, whatever the process's mask.

    Raises:
        FileExistsError: It is there.
    """
    path.mkdir(mode=mode, parents=True)
    path.chmod(mode)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that is not there yet, to the disk; it never has wider permissions than ``mode``.

    Raises:
        ValueError: It is there already.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ValueError(f"{path}: is there already, and is not overwritten; move it away first.") from None
    with os.fdopen(handle, "wb") as file:
        os.fchmod(handle, mode)
        file.write(data)
        file.flush()
        os.fsync(handle)


def write_secret(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read.

    Raises:
        ValueError: It is there already.
    """
    write_new(path, data, 0o600)


def refuse_existing(*paths: Path) -> None:
    """Refuse paths that are there, before anything is written, so that no half of a pair is left.

    Raises:
        ValueError: One is there, if only as a link.
    """
    for path in paths:
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path}: is there already, and is not overwritten; move it away first.")
