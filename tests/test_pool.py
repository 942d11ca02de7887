"""Trainers on a real Ray: restarted with their data, replaced where they are lost, compared before a run."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import psutil
import pytest
import ray
import torch

from clients.errors import TrainerDiffersError, TrainerLostError
from clients.limits import SiteLimits
from clients.pool import TrainerPool
from clients.ray_site import RaySite
from clients.shards import Pack, Shard
from clients.site import Description, Job
from clients.worker import Worker
from fedlora.data import load_federated
from fedlora.engine import train_pack
from fedlora.exchange import Instruction, Outcome, Update
from fedlora.reduce import fold
from simulations.privacy import resolve_privacy
from simulations.session import check_disk, check_trainers
from simulations.setup import resolve
from tests.support.tiny import save_texts, save_tiny_model
from tests.support.trainers import InProcess, instruction, ledger, tiny_flat, tiny_worker

ROOT = Path(__file__).parents[1]
_CLIENT_BYTES = 2**29


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[TrainerPool]:
    """Two trainers over more data than Ray passes inline, whose loss would keep a trainer from restarting."""
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    try:
        dp = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "data.partition": "iid", "rounds": 2}
        flat = tiny_flat(tmp_path, **dp, **{"data.path": save_texts(tmp_path / "many.csv", rows=4000)})
        data = load_federated(resolve(flat), 4)
        config = resolve_privacy(resolve(flat), data)
        shards = [Shard(threads=1, gpus=0.0)] * 2
        job = Job(config.to_flat(), data, SiteLimits(str(tmp_path / "sites")))
        yield TrainerPool.start(7, shards, job, share=True, train=partial(train_in_little_memory, tmp_path))
    finally:
        ray.shutdown()


def describe(worker: Any, _: None) -> Any:
    return worker.describe()


def mapped(worker: Any, _: None) -> str:
    """The file that a trainer's tokenized rows are mapped from."""
    return str(worker.loaded.model.examples["train"].flat.base.filename)


def train_and_die(worker: Worker, item: tuple[Instruction, int]) -> list[Update]:
    """Train a pack; one process is killed when all of it is paid for and done, and nothing of it has left."""
    updates = worker.train(item[0])
    if os.getpid() == item[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    return updates


def train_in_little_memory(folder: Path, engine: Any, works: list[Any], *args: Any, **options: Any) -> Any:
    """Train a pack, as :func:`train_pack` does, in two processes, whose numbers are in files, with too little memory.

    In one a library's own code meets the end of memory when all is trained, and takes the process down. The other may
    have no more address space than one client takes, for the time of a pack.
    """
    if _is_told(folder / "dies"):
        train_pack(engine, works, *args, **options)
        ctypes.CDLL("libstdc++.so.6")._Znwm(ctypes.c_size_t(2**50))  # operator new: an exception that nothing catches
    if not _is_told(folder / "short"):
        return train_pack(engine, works, *args, **options)
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = psutil.Process().memory_info().vms + _CLIENT_BYTES * 3 // 2
    resource.setrlimit(resource.RLIMIT_AS, (room, before[1]))
    try:
        held = torch.empty(len(works) * _CLIENT_BYTES, dtype=torch.uint8)
        results = train_pack(engine, works, *args, **options)
        assert len(held) == len(works) * _CLIENT_BYTES
        return results
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _is_told(file: Path) -> bool:
    return file.exists() and int(file.read_text()) == os.getpid()


def start(worker: Worker, clients: tuple[int, ...]) -> Instruction:
    return instruction(worker, clients)


def until_gone(pid: int) -> None:
    """Wait for the end of a process."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} did not end")


def until_back(pool: TrainerPool, trainer: int) -> None:
    """Wait until a lost trainer has started again."""
    end = time.monotonic() + 60
    while pool.standings()[trainer].lost:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_trainers_packs_are_repeated_and_paid_for_and_it_comes_back(pool: TrainerPool, tmp_path: Path) -> None:
    before = [described.pid for described in list(pool.outcomes(describe, [None, None]))]
    (rows,) = set(pool.everywhere(mapped))
    assert (Path(rows).stat().st_mode & 0o777, Path(rows).parent.stat().st_mode & 0o777) == (0o600, 0o700)
    packs = [Pack(0, (0, 3), 10.0), Pack(1, (1,), 5.0), Pack(1, (2,), 5.0)]
    parts = pool.results(start, [pack.clients for pack in packs])
    items = [(part, before[0]) for part in parts]
    updates: list[Any] = list(pool.outcomes(train_and_die, items, packs=packs, server_round=1))
    assert [[update.client for update in own] for own in updates] == [[0, 3], [1], [2]]
    for update in (update for own in updates for update in own):
        entries = ledger(tmp_path, update.client).entries()
        assert [entry.round for entry in entries] == [1, 1] if update.client in (0, 3) else [1]
        assert update.report.ledger_head == entries[-1].hash
    (loss,) = pool.losses()
    assert (loss.round, loss.trainer, loss.pid) == (1, 0, before[0])
    assert (loss.packs, loss.repeated_on) == ([[0, 3]], [1]), "nobody waits for the lost one"
    assert sorted(pack["trainer"] for pack in pool.trained()) == [1, 1, 1], "each was measured where it was done"
    until_back(pool, 0)
    after = list(pool.outcomes(describe, [None, None]))
    assert [described.base_loads for described in after] == [1, 1]
    assert after[0].pid not in before
    assert after[1].pid == before[1]
    unfit = TrainerPool.start(9, [Shard(threads=-1, gpus=0.0)], ray.get(pool.state.job.remote()))
    with pytest.raises(TrainerLostError, match="trainer 0 could not start; this process's log says why"):
        unfit.everywhere(describe)
    unfit.stop()
    assert pool.everywhere(mapped) == [rows] * 2, "a trainer that was restarted finds what the others have"
    pool.everywhere(lambda worker, _: worker.leave())
    assert not Path(rows).parents[1].exists()
    job = ray.get(pool.state.job.remote())
    pool.assign(replace(job, flat={key: value for key, value in job.flat.items() if not key.startswith("privacy.")}))
    pool.deal([Pack(0, (0, 1)), Pack(1, (2, 3))])
    (told,) = pool.results(start, [(0, 1, 2, 3)])
    told = replace(told, pack=2)
    reports, whole = fold(told, RaySite(pool).train(told))
    (tmp_path / "dies").write_text(str(after[0].pid))
    (tmp_path / "short").write_text(str(before[1]))
    found, reduced = RaySite(pool).reduce(told)
    assert [(report.client, report.outcome, report.steps) for report in found] == [(n, Outcome.OK, 3) for n in range(4)]
    assert [report.outcome for report in reports] == [Outcome.OK] * 4
    for name, mean in whole.reduced().mean.items():
        np.testing.assert_allclose(reduced.reduced().mean[name], mean, rtol=0, atol=1e-10)
    losses = {loss.pid: loss for loss in pool.losses()[1:]}
    died, short = losses.pop(after[0].pid), losses.pop(before[1])
    assert not losses
    assert (died.cause, died.packs, died.repeated_on) == ("its process or its machine died", [[0, 1]], [1])
    assert (short.cause, short.repeated_on) == ("too little memory for the pack", [1] * 4)
    assert sorted(short.packs) == [[0], [1], [2], [3]], "of the pack of the one that died, too"
    (tmp_path / "short").unlink()
    until_back(pool, 0)
    last = pool.standings()[0].pid
    ray.kill(pool.actors[0], no_restart=True)
    until_gone(last)  # Ray kills in its own time; until then the trainer answers
    assert [described.pid for described in list(pool.outcomes(describe, [None, None, None]))] == [before[1]] * 3
    assert pool.shares() == [0.0, 1.0], "it is dealt nothing any more"
    assert len(TrainerPool.connect(7)) == 2
    with pytest.raises(RuntimeError, match="run 8 has no trainers"):
        TrainerPool.connect(8)
    ray.kill(pool.actors[1], no_restart=True)
    until_gone(before[1])
    assert all(isinstance(outcome, TrainerLostError) for outcome in list(pool.outcomes(describe, [None])))


def test_trainers_that_differ_are_refused(tmp_path: Path) -> None:
    """Another base model, or other seeded tensors, on one of the machines."""
    one = tiny_worker(tmp_path / "one")
    assert check_trainers(InProcess([one, one]), one.loaded.model.config).specs
    other_model = tiny_worker(tmp_path / "two", **{"model.name": save_tiny_model(tmp_path / "other", seed=1)})
    job = one.loaded.job
    other_seed = Worker(lambda: replace(job, flat={**job.flat, "seed": 1}), 1)
    for other, what in (
        (other_model, "hold the same base model, quantised alike, and"),
        (other_seed, "draw the same seeded tensors"),
    ):
        with pytest.raises(ValueError, match=f"the trainers do not {what}"):
            check_trainers(InProcess([one, other]), one.loaded.model.config)


@final
@dataclass
class Elsewhere:
    """A trainer on a machine where other code is installed."""

    worker: Worker

    def load(self) -> None:
        self.worker.load()

    def describe(self) -> Description:
        return replace(self.worker.describe(), host="node7", fingerprint=("0" * 64, "/opt/older/fedlora"))


def test_a_machine_with_other_code_is_named(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path)
    with pytest.raises(ValueError, match=r"but a trainer on node7 imported /opt/older/fedlora: .* must be installed"):
        check_trainers(InProcess([worker, Elsewhere(worker)]), worker.loaded.model.config)


class OtherDisk(InProcess):
    """Two machines, of which the second has the folder at another place, if at all."""

    folder: Path
    shared: bool

    def everywhere(self, work: Any, *, timeout: float | None = None) -> list[Any]:
        own = self.folder if self.shared else self.folder.rename(self.folder.with_name("elsewhere"))
        try:
            return super().everywhere(work)
        finally:
            own.rename(self.folder)


def test_machines_that_do_not_share_the_ledgers_disk_are_refused(tmp_path: Path) -> None:
    """A ledger that began anew on another machine's disk would be a new budget, and personal tensors would be lost."""
    worker = tiny_worker(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run"})
    config = worker.loaded.model.config
    pool = OtherDisk([worker, worker])
    pool.folder, pool.shared = tmp_path / "runs" / "run" / "sites", False
    with pytest.raises(ValueError, match=r"run.dir = .*: not every machine of the Ray cluster sees .*/runs/run/sites"):
        check_disk(pool, config)
    pool.shared = True
    assert check_disk(pool, config) == (pool.folder / "site-id").read_text()


def test_a_trainer_that_comes_back_elsewhere_is_compared(tmp_path: Path) -> None:
    """Ray may start it on a machine that had no trainer before: other code there, another base model, another disk."""
    worker = tiny_worker(tmp_path)
    agreed = worker.describe().agreed
    for changes, said in (
        ({}, ""),
        ({"agreed": "0" + agreed}, "runs other code"),
        ({"folder_id": "x"}, "does not see"),
    ):
        job = replace(worker.loaded.job, **{"agreed": agreed, **changes})
        back = Worker(lambda job=job: job, 1)  # type: ignore[misc]
        told = instruction(worker)
        if not said:
            assert [update.report.reason for update in back.train(told)] == [""] * 4
            continue
        for ask in (back.train, back.report):
            with pytest.raises(TrainerDiffersError, match=said):
                ask(told)
