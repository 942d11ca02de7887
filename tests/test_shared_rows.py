"""Tokenized rows on disk: made once, mapped by all, nobody else's to read, and another's where anything differs."""

from __future__ import annotations

import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.limits import SiteLimits
from clients.shared_rows import SharedRows
from clients.site import Job
from clients.worker import Worker
from fedlora.data import Table
from fedlora.tasks import Classification, Examples
from simulations.setup import resolve
from tests.support.trainers import tiny_flat, tiny_job
from tests.test_ragged import drawn

TABLE = Table(("a b", "c"), (0, 1))


def counted(made: list[int], rows: Any) -> Any:
    def make() -> Any:
        made.append(1)
        time.sleep(0.05)
        return rows

    return make


@pytest.mark.parametrize("kind", ["class", "numbers", "learned"])
@pytest.mark.parametrize("typed", [False, True])
def test_rows_come_back_as_they_were(kind: str, typed: bool, tmp_path: Path) -> None:
    examples, _ = drawn(0, kind, typed=typed)
    made: list[int] = []
    found = [SharedRows(tmp_path / "rows").get(TABLE, (1,), counted(made, examples)) for _ in range(2)]
    assert made == [1]
    for one in found:
        assert isinstance(one, Examples)
        for name in ("tokens", "targets", "types"):
            ours, theirs = getattr(one, name), getattr(examples, name)
            assert len(ours) == len(theirs)
            assert all(np.array_equal(row, other) for row, other in zip(ours, theirs, strict=True)), name
        assert isinstance(one.flat.base, np.memmap)
        assert not one.flat.flags.writeable


def test_others_wait_for_the_one_that_makes_them(tmp_path: Path) -> None:
    examples, _ = drawn(0, "class")
    made: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(SharedRows(tmp_path / "rows").get, TABLE, (), counted(made, examples)) for _ in range(4)]
        assert all(len(call.result()) == len(examples) for call in calls)
    assert made == [1]


def test_what_differs_is_made_anew(tmp_path: Path) -> None:
    examples, _ = drawn(0, "class")
    shared, made = SharedRows(tmp_path / "rows"), list[int]()
    for table, how in (
        (TABLE, ("x", 1)),
        (TABLE, ("x", 2)),
        (Table(("a", "b c"), (0, 1)), ("x", 1)),
        (Table(("a b", "c"), (1, 1)), ("x", 1)),
        (Table(("a b", "c"), (0, 1), seconds=("d", "e")), ("x", 1)),
    ):
        shared.get(table, how, counted(made, examples))
    assert len(made) == 5


def test_nobody_else_reads_them_and_nothing_stays(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        shared = SharedRows(tmp_path / "rows")
        found = shared.get(TABLE, (), lambda: drawn(0, "class")[0])
    finally:
        os.umask(old)
    for path in (shared.folder, *shared.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    shared.remove()
    assert not shared.folder.exists()
    assert isinstance(found, Examples)
    assert int(found.flat.sum()) == int(drawn(0, "class")[0].flat.sum()), "what is mapped stays readable"


def test_what_cannot_be_shared_is_each_process_s_own(tmp_path: Path) -> None:
    """Rows of a task's own type; a folder that cannot be made; an error, which leaves nothing behind."""
    assert SharedRows(tmp_path / "rows").get(TABLE, (), lambda: "own rows") == "own rows"  # type: ignore[arg-type,return-value]
    (tmp_path / "file").touch()
    examples, _ = drawn(0, "class")
    assert SharedRows(tmp_path / "file" / "rows").get(TABLE, (), lambda: examples) is examples

    def refuse() -> Examples:
        raise ValueError("the text 'a b' has no tokens")

    for _ in range(2):
        with pytest.raises(ValueError, match="has no tokens"):
            SharedRows(tmp_path / "rows").get(TABLE, (2,), refuse)
    assert not [path for path in (tmp_path / "rows").iterdir() if path.is_dir()]


def test_two_trainers_tokenize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of two processes' lifetimes train on the same files, and to the same bits as one that shares nothing."""
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    encode, calls = Classification.encode, list[int]()

    def watched(*args: Any) -> Examples:
        calls.append(1)
        return encode(*args)

    monkeypatch.setattr(Classification, "encode", watched)
    workers = [Worker(lambda: job, 1, shared=SharedRows(tmp_path / "rows")) for _ in range(2)]
    models = [worker.loaded.model for worker in workers]
    assert len(calls) == len(job.data.corpus.splits)
    alone = Worker(lambda: job, 1).loaded.model
    assert len(calls) == 2 * len(job.data.corpus.splits)
    for model in models:
        assert np.array_equal(model.examples["train"].flat, alone.examples["train"].flat)  # type: ignore[attr-defined]
    longer = Job({**job.flat, "train.max-length": 5}, job.data, SiteLimits(str(tmp_path / "sites")))
    other = Worker(lambda: longer, 1, shared=SharedRows(tmp_path / "rows"))
    assert int(other.loaded.model.examples["train"].cost.max()) == 5
