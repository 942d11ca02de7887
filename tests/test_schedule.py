"""The order of a pack's work, planned before a round."""

from __future__ import annotations

from collections import Counter

import numpy as np

from fedlora.engine.schedule import passes, turns
from fedlora.engine.work import ClientWork
from tests.support.families import random_examples


def works_of(steps: list[int], rows: int = 3) -> list[ClientWork]:
    generator = np.random.default_rng(0)
    return [
        ClientWork(k, random_examples(12, k), 12, [generator.permutation(12)[:rows] for _ in range(count)], {})
        for k, count in enumerate(steps)
    ]


def test_every_step_is_taken_once_and_in_order() -> None:
    works = works_of([5, 0, 1, 3, 8, 1])
    planned = list(turns(works, 60))
    taken = [(int(g), int(step)) for turn in planned for g, step in zip(turn.groups, turn.steps, strict=True)]
    assert sorted(taken) == [(g, step) for g, work in enumerate(works) for step in range(len(work.batches))]
    assert all(taken.index((g, step)) < taken.index((g, step + 1)) for g, step in taken if (g, step + 1) in taken)
    for turn in planned:
        assert (np.diff(turn.groups) > 0).all(), "a client steps once in a turn"
        for slot, (g, step) in enumerate(zip(turn.groups, turn.steps, strict=True)):
            rows = turn.rows[turn.slot_n == slot]
            assert rows.tolist() == works[g].batches[step].tolist()
            assert turn.cost_n[turn.slot_n == slot].tolist() == works[g].examples.cost[rows].tolist()


def test_uneven_clients_keep_the_device_full_to_the_end() -> None:
    """Tenfold spread: those with most steps left go first, and finished ones are replaced by waiting ones."""
    steps = [1 + 9 * (k % 4 == 0) for k in range(32)]
    works = works_of(steps)
    fill = 8 * 3 * 12  # about eight clients' steps
    planned = list(turns(works, fill))
    costs = [int(turn.cost_n.sum()) for turn in planned]
    assert max(costs) <= fill
    assert np.mean(costs[:-1]) > 0.75 * fill
    together = max(Counter(int(g) for turn in planned for g in turn.groups).values())
    assert len(planned) < sum(steps) / 5, f"{together} turns at least: the largest client's"


def test_an_empty_batch_is_a_step_all_the_same() -> None:
    """Under DP no row may have been sampled."""
    work = ClientWork(0, random_examples(4, 0), 4, [np.zeros(0, dtype=np.int64)] * 2, {})
    planned = list(turns([work], 100))
    assert [len(turn.rows) for turn in planned] == [0, 0]
    assert [turn.sizes.tolist() for turn in planned] == [[0], [0]]
    assert passes(planned[0].cost_n, planned[0].cost_n, 100, 100) == []


def test_passes_hold_their_bounds_and_waste_little() -> None:
    generator = np.random.default_rng(1)
    cost_n = np.minimum(128, 5 + generator.exponential(20, 3000)).astype(np.int64)
    part_n = generator.integers(0, 2, 3000)
    found = passes(cost_n, part_n, 4096, 400)
    assert sorted(np.concatenate(found).tolist()) == list(range(3000))
    padded = [int(cost_n[rows].max()) * len(rows) for rows in found]
    assert max(padded) <= 4096
    assert max(len(rows) for rows in found) <= 400
    assert all(len(set(part_n[rows].tolist())) == 1 for rows in found)
    assert all((np.diff(rows) > 0).all() for rows in found)
    assert cost_n.sum() / sum(padded) > 0.9, "of the computed tokens at least 90 % are useful"
    unsorted = [np.arange(at, min(at + 32, 3000)) for at in range(0, 3000, 32)]
    control = sum(int(cost_n[rows].max()) * len(rows) for rows in unsorted)
    assert cost_n.sum() / control < 0.5, "control: as the rows come, most of them are padding"
    assert [len(rows) for rows in passes(np.array([900, 3]), np.zeros(2, dtype=np.int64), 10, 10)] == [1, 1]


def test_rows_that_fit_into_one_pass_are_one_at_once() -> None:
    """As the way for all rows has it, which a row of another part at the end takes."""
    generator, whole = np.random.default_rng(0), 0
    for _ in range(1000):
        n, most, rows = (int(generator.integers(*bounds)) for bounds in ((0, 12), (1, 400), (1, 14)))
        cost_n, part_n = generator.integers(1, 50, n), generator.integers(0, 2, n) * (generator.random() < 0.3)
        found = passes(cost_n, part_n, most, rows, padded=False)
        *expected, last = passes(np.append(cost_n, 1), np.append(part_n, 2), most, rows, padded=False)
        assert last.tolist() == [n]
        assert [chosen.tolist() for chosen in found] == [chosen.tolist() for chosen in expected]
        whole += len(found) == 1
    assert whole > 100


def test_a_turn_takes_as_much_as_fills_a_pass_and_no_more() -> None:
    works = works_of([1, 1, 1])
    costs = [int(work.examples.cost[work.batches[0]].sum()) for work in works]
    assert [len(turn.groups) for turn in turns(works, sum(costs))] == [3]
    assert [len(turn.groups) for turn in turns(works, sum(costs) - 1)] == [2, 1]
    assert [len(turn.groups) for turn in turns(works, 1)] == [1, 1, 1]
