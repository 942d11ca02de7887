"""Shards of machines, and how clients are dealt to them in packs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.pool_state import PoolState
from clients.ray_site import RaySite
from clients.shards import MOST_CLIENTS, Machine, Shard, deal, plan_shards, spread_rows, weights
from clients.worker import Worker
from fedlora.engine import train_pack
from fedlora.exchange import Outcome
from fedlora.reduce import fold
from simulations.dealing import DealtNodes
from simulations.setup import resolve
from tests.support.loop import LoopGrid
from tests.support.reduced import assert_same_bits
from tests.support.trainers import InProcess, dp_config, instruction, ledger, tiny_flat, tiny_job

SIZES = {client: float(1 + 37 * client % 101) for client in range(40)}


@pytest.mark.parametrize(
    ("cpus", "gpus", "wanted", "trainers", "threads", "share"),
    [
        (2, 0, 0, 1, 2, 0.0),
        (1, 0, 0, 1, 1, 0.0),
        (16, 0, 0, 4, 4, 0.0),
        (16, 0, 2, 2, 8, 0.0),
        (16, 1, 0, 1, 16, 1.0),
        (32, 2, 4, 4, 8, 0.5),
        (32, 2, 3, 3, 10, 0.5),
        (32, 1, 7, 7, 4, 0.1428),
        (2, 0, 3, 3, 1, 0.0),
    ],
)
def test_shards_of_a_machine(cpus: int, gpus: int, wanted: int, trainers: int, threads: int, share: float) -> None:
    shards = plan_shards([Machine("", "", cpus, gpus)], wanted)
    assert len(shards) == trainers
    assert {(shard.threads, shard.gpus) for shard in shards} == {(threads, share)}


def test_shards_of_a_cluster() -> None:
    """One a GPU, one for every four cores and one a machine at least; machines without a GPU where others have some."""
    cpu = [Machine("a", "one", 8, 0), Machine("b", "two", 2, 0), Machine("head", "head", 0, 0)]
    assert plan_shards(cpu, 0) == [Shard(4, 0.0, "a", "one")] * 2 + [Shard(2, 0.0, "b", "two")]
    assert [shard.node for shard in plan_shards(cpu, 5)] == ["a"] * 4 + ["b"], "in proportion to their cores"
    gpu = [*cpu, Machine("c", "three", 32, 4), Machine("d", "four", 16, 2)]
    shards = plan_shards(gpu, 0)
    assert [shard.node for shard in shards] == ["c"] * 4 + ["d"] * 2
    assert {(shard.threads, shard.gpus) for shard in shards} == {(8, 1.0)}
    assert [shard.node for shard in plan_shards(gpu, 3)] == ["c", "c", "d"]
    assert [(shard.node, shard.gpus) for shard in plan_shards(gpu[3:], 12)] == [("c", 0.5)] * 8 + [("d", 0.5)] * 4


@pytest.mark.parametrize("pack", [0, 1, 3])
@pytest.mark.parametrize("shares", [[1.0], [1.0, 1.0], [1.0, 0.5, 0.0, 1.0]])
def test_every_client_is_dealt_once_and_loads_are_even(shares: list[float], pack: int) -> None:
    packs = deal(list(SIZES), pack, shares, SIZES)
    assert sorted(client for one in packs for client in one.clients) == list(SIZES)
    assert all(one.work == sum(SIZES[client] for client in one.clients) for one in packs)
    load = [sum(one.work for one in packs if one.trainer == trainer) for trainer in range(len(shares))]
    assert [bool(one) for one in load] == [bool(share) for share in shares]
    times = [one / share for one, share in zip(load, shares, strict=True) if share]
    largest = max(one.work for one in packs) if pack else max(SIZES.values())
    assert max(times) - min(times) <= largest / min(share for share in shares if share), "one unit more at most"
    if not pack:
        assert len(packs) == sum(map(bool, shares)), "as few as may be"


def test_packs_of_a_set_size_are_the_same_whoever_trains_them() -> None:
    """The rule on which equal bits rest: engine.pack fixes them, on any cluster, at any speed, after any loss."""
    cases = ([1.0], [1.0] * 5, [0.3, 1.0], [0.0, 1.0, 1.0])
    made = [sorted(one.clients for one in deal(list(SIZES), 3, shares, SIZES)) for shares in cases]
    assert made.count(made[0]) == len(made)
    assert deal([3, 1, 2, 0, 4], 2, [1.0])[0].clients == (0, 1), "of clients that are alike, in their order"


def test_packs_of_an_automatic_size() -> None:
    assert [one.clients for one in deal([5, 3, 4], 0, [1.0])] == [(3, 4, 5)]
    many = deal(range(1000), 0, [1.0, 1.0])
    assert max(len(one.clients) for one in many) <= MOST_CLIENTS
    assert len(many) == 16
    assert [one.trainer for one in many[:4]] == [0, 1, 0, 1], "every trainer's first pack before any second"


def test_a_slow_trainer_gets_less_and_noise_changes_nothing() -> None:
    assert weights([900.0, 1000.0, 0.0]) == [1.0, 1.0, 1.0], "within a clock's noise; not measured yet"
    assert weights([500.0, 1000.0, -1.0]) == [0.5, 1.0, 0.0]
    assert weights([1.0, 1000.0]) == [0.1, 1.0]
    assert weights([-1.0, -1.0]) == [1.0, 1.0], "all are lost: one that comes back does it"
    slow, fast = (sum(one.work for one in deal(list(SIZES), 0, [0.5, 1.0], SIZES) if one.trainer == t) for t in (0, 1))
    assert 0.45 < slow / fast < 0.55
    rows = spread_rows(1000, [0.5, 1.0])
    assert 320 < len(rows[0]) < 345
    assert sorted(row for one in rows for row in one) == list(range(1000))
    assert spread_rows(5, [1.0, 1.0]) == [[0, 2, 4], [1, 3]]


def test_speed_is_that_of_the_last_round(tmp_path: Path) -> None:
    state = PoolState(tiny_job(resolve(tiny_flat(tmp_path)), tmp_path), 2)
    for server_round, work, seconds in ((1, 100.0, 10.0), (2, 100.0, 1.0), (2, 300.0, 1.0)):
        state.measured(1, server_round, 5, work, seconds)
    assert [one.speed for one in state.standings()] == [0.0, 200.0]
    last = {"round": 2, "trainer": 1, "clients": 5, "work": 300.0, "seconds": 1.0}
    assert state.trained(2) == [last], "what each pack took, beside the sums"


def test_a_loss_is_noted_once_and_not_held_against_a_trainer_that_came_back(tmp_path: Path) -> None:
    state = PoolState(tiny_job(resolve(tiny_flat(tmp_path)), tmp_path), 1)
    assert not state.standings()[0].lost, "it has not come yet, and is waited for"
    state.arrived(0, "n", "here", 11)
    state.lost(0, 1, 4, "died")
    assert state.standings()[0].lost
    state.repeated(0, 1, 4, "died", (2, 3), 1)
    state.arrived(0, "n", "there", 12)
    assert state.standings()[0].lost, "until it answers"
    assert not state.back(0).lost
    state.lost(0, 1, 4, "died")  # another node's ClientApp finds out later
    state.repeated(0, 1, 4, "died", (5,), 1)
    assert not state.standings()[0].lost
    (loss,) = state.losses()
    assert (loss.host, loss.pid, loss.packs, loss.repeated_on) == ("here", 11, [[2, 3], [5]], [1, 1])


@pytest.mark.parametrize("nodes", [1, 2, 7])
def test_clients_are_dealt_to_trainers_together_however_many_supernodes_there_are(nodes: int) -> None:
    work = dict.fromkeys(range(300), 1.0)
    assigned = DealtNodes(InProcess([None, None]), 0, work).assign(
        LoopGrid({node: lambda _: None for node in range(nodes)}), range(300), 1
    )
    assert sorted(client for own in assigned.values() for client in own) == list(range(300))
    assert len(assigned) == min(nodes, 3), "three packs a trainer"
    packs = deal(range(300), 0, [1.0, 1.0], work)
    for own in assigned.values():
        whole = [one for one in packs if set(one.clients) <= set(own)]
        assert sum(len(one.clients) for one in whole) == len(own), "no pack is torn"
        assert {one.trainer for one in whole} == {0, 1}, "every trainer has work with each"


def test_the_same_packs_give_the_same_bits_on_any_number_of_trainers(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path, **{"engine.pack": 2})), tmp_path)
    workers = [Worker(lambda: job, 1) for _ in range(2)]
    told = replace(instruction(workers[0]), pack=2)
    one = {update.client: update.tensors for update in RaySite(InProcess(workers[:1])).train(told)}
    two = {update.client: update.tensors for update in RaySite(InProcess(workers)).train(told)}
    assert one.keys() == two.keys() == {0, 1, 2, 3}
    assert all(np.array_equal(one[client][name], two[client][name]) for client in one for name in one[client])


def short_of_memory(engine: object, works: list[object], *args: object, **options: object) -> object:
    """A GPU on which two clients fit."""
    if len(works) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    return train_pack(engine, works, *args, **options)  # type: ignore[arg-type]


def test_a_pack_that_does_not_fit_is_repeated_in_halves(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    roomy, tight = Worker(lambda: job, 1), Worker(lambda: job, 1, short_of_memory)  # type: ignore[arg-type]
    told = instruction(roomy)
    expected = {update.client: update for update in RaySite(InProcess([roomy])).train(told)}
    found = {update.client: update for update in RaySite(InProcess([tight])).train(told)}
    assert found.keys() == expected.keys()
    for client, update in found.items():
        assert update.report.outcome is Outcome.OK
        for name, value in update.tensors.items():
            np.testing.assert_allclose(value, expected[client].tensors[name], rtol=0, atol=1e-10)
    reports, reduced = RaySite(InProcess([tight])).reduce(told)
    assert reports == [found[client].report for client in range(4)]
    assert_same_bits(reduced, fold(told, found.values())[1])


def no_memory(*_: object, **__: object) -> object:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_a_client_that_does_not_fit_alone(tmp_path: Path) -> None:
    """Without privacy it says why; under DP the rows that were drawn decide it, so it does not."""
    for config, said in (
        (resolve(tiny_flat(tmp_path)), "there is too little memory to train 1 client(s) together"),
        (dp_config(tmp_path), "training failed at the site; its own diagnostics.jsonl says why"),
    ):
        job = tiny_job(config, tmp_path)
        none = Worker(lambda job=job: job, 1, no_memory)  # type: ignore[misc,arg-type]
        none.loaded.trainer.trainable.add(frozenset(none.loaded.trainer.start.trained(instruction(none))))
        updates = list(RaySite(InProcess([none])).train(instruction(none)))
        assert [update.client for update in updates] == [0, 1, 2, 3]
        assert {update.report.reason for update in updates} == {said}


def test_a_repetition_is_paid_for_once_more(tmp_path: Path) -> None:
    """Under DP it draws other rows and other noise: the ledger must not show less than what may have left."""
    job = tiny_job(dp_config(tmp_path), tmp_path)
    tight = Worker(lambda: job, 1, short_of_memory)  # type: ignore[arg-type]
    updates = list(RaySite(InProcess([tight])).train(instruction(tight)))
    assert {update.report.outcome for update in updates} == {Outcome.OK}
    for update in updates:
        entries = ledger(tmp_path, update.client).entries()
        assert [entry.round for entry in entries] == [1, 1]
        assert update.report.ledger_head == entries[-1].hash
