"""Disks that are full and folders that may not be written: one line with the path, and nothing half written."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedlora.plugins import read_config
from fedlora.runs.folder import RunFolder, read_lines
from fedlora.storage import StorageError, append_whole, check_can_write, write_whole
from tests.support.runs import environment


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """A disk on which no file may be larger; Python ignores the signal that goes with it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def as_nobody(code: str, *arguments: Path) -> str:
    """Run a program as a user who owns nothing, where this one is root; return what it printed."""
    prefix = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "with space.json"
    write_whole(file, b"old")
    with (
        small_files(100),
        pytest.raises(StorageError, match=r"with space\.json cannot be written: .*; make room there"),
    ):
        write_whole(file, bytes(1000))
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [file.name], "nothing half written"


def test_lines_are_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    """A reader of a run on a full disk finds the rounds before."""
    with RunFolder.opened(read_config({"run.dir": str(tmp_path), "run.name": "run"})) as folder:
        folder.append("metrics.jsonl", {"round": 1})
        size = (folder.path / "metrics.jsonl").stat().st_size
        with small_files(size + 20), pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written"):
            folder.append("metrics.jsonl", {"round": 2, "text": "x" * 100})
        assert (folder.path / "metrics.jsonl").stat().st_size == size
        folder.append("metrics.jsonl", {"round": 2})
        assert [line["round"] for line in read_lines(folder.path / "metrics.jsonl")] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_full_disk_is_said_so() -> None:
    with pytest.raises(StorageError, match="/dev/full cannot be written: No space left on device; make room there"):
        append_whole(Path("/dev/full"), b"x")


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "runs" / "run"):
        with pytest.raises(StorageError, match=r"cannot be written: Not a directory; a part of its path is a file"):
            check_can_write(path)
    check_can_write(tmp_path / "new" / "runs")
    assert os.listdir(tmp_path) == ["file"], "nothing was made"
    with (
        pytest.raises(StorageError, match="Not a directory"),
        RunFolder.opened(read_config({"run.dir": str(tmp_path / "file"), "run.name": "run"})),
    ):
        pass


def test_a_place_where_no_folder_can_be_made(tmp_path: Path) -> None:
    """Nobody's permissions say so of /proc; and what is tried leaves nothing, in a run's folder neither."""
    for place in ("/proc/runs/run", "/sys/runs/run"):
        if Path(place).parents[1].is_dir():
            with pytest.raises(StorageError, match=rf"^{place} cannot be written: "):
                check_can_write(Path(place))
    (tmp_path / "run").mkdir()
    check_can_write(tmp_path / "run")
    check_can_write(tmp_path / "other" / "run")
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == tmp_path.owner() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    own = tmp_path / "own"
    own.mkdir(mode=0o555)
    code = """
        import sys
        from pathlib import Path
        from fedlora.storage import StorageError, check_can_write, write_whole
        for attempt in (lambda: check_can_write(Path(sys.argv[1])), lambda: write_whole(Path(sys.argv[1]) / "a", b"")):
            try:
                attempt()
            except StorageError as error:
                print(error)
    """
    said = as_nobody(code, own)
    cure = "cannot be written: Permission denied; choose a folder that this user may write to"
    assert said.splitlines() == [f"{own} {cure}", f"{own / 'a'} {cure}"]


def test_an_error_of_a_trainer_arrives_as_it_is() -> None:
    error = StorageError(Path("/a b/c"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.errno) == (str(error), errno.ENOSPC)
