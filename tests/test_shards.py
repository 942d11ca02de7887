"""Shards of machines, and how clients are dealt to them in packs."""

from __future__ import annotations

import mmap
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.pool_state import PoolState
from clients.ray_site import RaySite
from clients.shards import MOST_CLIENTS, Machine, Shard, deal, most_clients, plan_shards, spread_rows, weights
from clients.worker import Worker
from fedlora.config import ConfigError
from fedlora.engine import train_pack
from fedlora.exchange import Instruction, Outcome, Update
from fedlora.messages import first_line
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


GB = 10**9
H100, SMALL = Machine("h", "big", 32, 2, 85 * GB), Machine("s", "small", 16, 4, 24 * GB)


@pytest.mark.parametrize(
    ("weights", "gpus", "cards"),
    [
        (1 * GB, 0, [1, 1, 1, 1, 1, 1]),
        (19 * GB, 0, [1, 1, 1, 1, 1, 1]),  # 0.8 of 24
        (20 * GB, 0, [1, 1, 2, 2]),
        (65 * GB, 0, [1, 1, 4]),
        (70 * GB, 0, [2, 4]),
        (90 * GB, 0, [2, 4]),  # all of the small ones, where only that is enough
        (100 * GB, 0, [2]),
        (150 * GB, 0, [2]),
        (0, 0, [1] * 6),
        (1 * GB, 2, [2, 2, 2]),
        (1 * GB, 4, [4]),
        (150 * GB, 1, [1] * 6),
    ],
)
def test_a_base_model_takes_as_few_gpus_of_a_machine_as_hold_it(weights: int, gpus: int, cards: list[int]) -> None:
    """By predicted bytes, unless ``engine.gpus`` says how many; machines with too few are left out."""
    shards = plan_shards([H100, SMALL, Machine("c", "cpu", 8, 0)], 0, gpus=gpus, weights=weights)
    assert [shard.cards for shard in shards] == cards
    assert [shard.gpus for shard in shards] == [float(count) for count in cards]
    for machine in (H100, SMALL):
        own = [shard for shard in shards if shard.node == machine.node]
        assert sum(shard.cards for shard in own) <= machine.gpus
        assert {shard.gpu_bytes for shard in own} <= {machine.gpu_bytes}


@pytest.mark.parametrize(
    ("wanted", "gpus", "weights", "said"),
    [
        (0, 8, 0, r"engine.gpus = 8: no machine has more than 4 GPU\(s\); lower it"),
        (3, 4, 0, r"engine.trainers = 3: .* takes 4 GPUs of a trainer \(engine.gpus\), .* enough for 1 trainer\(s\)"),
        (2, 0, 100 * GB, r"engine.trainers = 2: .* enough for 1 trainer\(s\); lower it to that"),
        (0, 0, 200 * GB, r"weights take 200.00 GB, and no machine has GPUs for them \(the largest has 2 of 85.00 GB\)"),
    ],
)
def test_what_the_machines_cannot_hold_is_refused(wanted: int, gpus: int, weights: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_shards([H100, SMALL], wanted, gpus=gpus, weights=weights)


def test_several_gpus_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match=r"engine.gpus = 2: no machine has more than 0 GPU\(s\); lower it"):
        plan_shards([Machine("", "", 8, 0)], 0, gpus=2)


def test_trainers_of_several_gpus() -> None:
    shards = plan_shards([H100, SMALL], 2, gpus=2)
    assert [(shard.node, shard.threads, shard.gpus) for shard in shards] == [("h", 32, 2.0), ("s", 16, 2.0)]
    assert "2 GPUs, over which the base model is spread, and " in shards[0].words


def test_packs_on_a_gpu_are_as_large_as_the_memory_of_their_tensors_lets_them() -> None:
    gpu = plan_shards([H100], 0)
    assert most_clients(gpu, 1 * GB, 60 * 10**6) == 256, "RoBERTa-large at rank 8: beyond that nothing was gained"
    assert most_clients(gpu, 14 * GB, 134 * 10**6) == 158, "Llama-2-7B"
    assert most_clients(gpu, 14 * GB, 5 * GB) == 4
    assert most_clients(gpu, 84 * GB, 5 * GB) == 1
    assert most_clients(plan_shards([H100], 0, gpus=2), 14 * GB, 134 * 10**6) == 174, "half of the weights beside them"
    assert most_clients(plan_shards([H100], 4), 14 * GB, 134 * 10**6) == 63, "two trainers on each"
    for unknown in (plan_shards([Machine("", "", 32, 2)], 0), plan_shards([Machine("", "", 8, 0)], 0), []):
        assert most_clients(unknown, GB, 1) == MOST_CLIENTS
    for clients, sizes in ((64, [64]), (255, [255]), (256, [128] * 2), (600, [150] * 4), (2000, [250] * 8)):
        made = deal(range(clients), 0, [1.0], most=256)
        assert [len(one.clients) for one in made] == sizes
    assert len(deal(range(100), 0, [1.0], most=3)) == 34


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


def test_speed_is_that_of_the_last_round_but_not_of_the_first(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    state = PoolState(job, 2)
    state.arrived(1, "n", "here", 11)
    state.measured(1, 1, 5, 100.0, 10.0)
    assert state.standings()[1].speed == 0.0, "kernels were compiled in it"
    for server_round, work, seconds in ((2, 100.0, 10.0), (3, 100.0, 1.0), (3, 300.0, 1.0)):
        state.measured(1, server_round, 5, work, seconds)
    assert [one.speed for one in state.standings()] == [0.0, 200.0]
    last = {"round": 3, "trainer": 1, "clients": 5, "work": 300.0, "seconds": 1.0}
    assert state.trained(3) == [last], "what each pack took, beside the sums"
    state.arrived(1, "n", "here", 12)
    state.measured(1, 4, 5, 100.0, 10.0)
    assert state.standings()[1].speed == 200.0, "as before its process was lost"
    state.measured(1, 5, 5, 100.0, 10.0)
    assert state.standings()[1].speed == 10.0
    state.begin(job)
    for server_round, seconds in ((5, 0.1), (6, 5.0)):
        state.measured(1, server_round, 5, 100.0, seconds)
    assert state.standings()[1].speed == 20.0, "another job compiles anew, and its rounds are not those of the last"
    state.arrived(1, "m", "there", 13)
    assert state.standings()[1].speed == 0.0, "another machine"


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


def real_shortages() -> list[Exception]:
    """What says that memory is short, of the allocators of this machine themselves: a petabyte."""
    found: list[Exception] = []
    for ask in (
        lambda: bytearray(2**50),
        lambda: np.empty(2**50, dtype=np.uint8),
        lambda: torch.empty(2**50, dtype=torch.uint8),
        lambda: mmap.mmap(-1, 2**50),
    ):
        try:
            ask()
        except Exception as error:
            found.append(error)
    assert [type(error) for error in found[::2]] == [MemoryError, RuntimeError]
    assert isinstance(found[1], MemoryError)
    assert isinstance(found[3], OSError)
    return found


def test_whatever_allocator_says_it(tmp_path: Path) -> None:
    """Packs that do not fit by any of them are repeated in halves; what is not about memory is not."""
    cuda = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory\nCUDA kernel")]
    others = [RuntimeError("shapes cannot be multiplied"), OSError(2, "No such file"), ValueError("out of memory")]
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    for error, reasons in (
        *((one, {""}) for one in (*real_shortages(), *cuda)),
        *((one, {f"{type(one).__name__}: {first_line(one)}"}) for one in others),
    ):
        worker = Worker(lambda: job, 1, partial(failing_beyond_two, error))
        reports, reduced = RaySite(InProcess([worker])).reduce(instruction(worker))
        assert {report.reason for report in reports} == reasons
        assert reduced.count == (4 if reasons == {""} else 0)


def failing_beyond_two(error: Exception, engine: object, works: list[object], *args: object, **options: object) -> Any:
    if len(works) > 2:
        raise error
    return train_pack(engine, works, *args, **options)  # type: ignore[arg-type]


def test_updates_that_cannot_be_added_up_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pack is repeated in halves then, too: what its clients keep of the first time is theirs of the same round."""
    job = tiny_job(resolve(tiny_flat(tmp_path, **{"strategy.name": "fedsa-lora"})), tmp_path)
    worker = Worker(lambda: job, 1)
    expected = fold(instruction(worker), worker.train(instruction(worker)))

    def tight(told: Instruction, updates: list[Update]) -> object:
        if len(updates) > 2:
            np.empty(2**50, dtype=np.uint8)
        return fold(told, updates)

    monkeypatch.setattr("clients.worker.fold", tight)
    reports, reduced = RaySite(InProcess([worker])).reduce(instruction(worker))
    assert [(report.outcome, report.steps) for report in reports] == [(Outcome.OK, 3)] * 4
    for name, mean in expected[1].reduced().mean.items():
        np.testing.assert_allclose(reduced.reduced().mean[name], mean, rtol=0, atol=1e-10)


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
