"""Atomic file writes: a reader, or the next process after a crash, never finds half a file."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

_CURES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that this user may write to"),
    errno.ENOENT: "its folder is gone, or none can be made there",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class StorageError(OSError):
    """A file or folder cannot be written; the message is one line with its path, the system's reason and the cure.

    Args:
        path: What cannot be written.
        error: What the system says.
    """

    def __init__(self, path: Path | str, error: OSError) -> None:
        cure = _CURES.get(error.errno or 0)
        super().__init__(f"{path} cannot be written: {error.strerror or error}{'; ' + cure if cure else ''}")
        self.path, self.errno = str(path), error.errno

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, OSError]]:
        """Return how another process makes the same error: Ray brings it from a trainer."""
        return StorageError, (self.path, OSError(self.errno, os.strerror(self.errno or 0)))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder that is written in the block where the system refuses it.

    Raises:
        StorageError: It does: the disk is full, or this user may not write there.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(path, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole and to the disk, or leave what was there.

    Raises:
        StorageError: It cannot be written.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def append_whole(path: Path, data: bytes) -> None:
    """Append all of something to a file, or nothing.

    Raises:
        StorageError: It cannot be written.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        append_to(file, data)


def append_to(file: FileIO, data: bytes) -> None:
    """Append all of something to a file that is open for it, unbuffered, or nothing.

    Raises:
        OSError: It cannot be written.
    """
    before, left = file.seek(0, os.SEEK_END), memoryview(data)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError:
        with suppress(OSError):  # the first one says what is wrong
            file.truncate(before)
        raise


def check_can_write(folder: Path) -> None:
    """Refuse a folder that is not there and cannot be made, or in which nothing can be written; leave all as it is.

    It is tried: of /proc, or a file system without room for another folder, permissions say nothing.

    Raises:
        StorageError: It is one.
    """
    with writing(folder):
        place = folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            reason = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(reason, os.strerror(reason))
        if place == folder:
            tempfile.NamedTemporaryFile(dir=place, suffix=".partial").close()
        else:
            Path(tempfile.mkdtemp(dir=place)).rmdir()
