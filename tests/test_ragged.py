"""Rows laid out one after another: batches are those that a loop over rows makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.ragged import Ragged, stacked
from fedlora.tasks import CausalLM, Classification, Examples

PAD = 7
CPU = torch.device("cpu")
Parts = dict[str, Any]


def drawn(seed: int, kind: str, rows: int = 20, *, typed: bool = False) -> tuple[Examples, Parts]:
    """Examples, and the rows that they were made of."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, size=rows)
    tokens = tuple(rng.integers(8, 99, size=n) for n in lengths)
    targets: Any = {
        "class": lambda: rng.integers(0, 3, size=rows),
        "numbers": lambda: rng.random((rows, 4)),
        "learned": lambda: tuple(rng.random(n) < 0.5 for n in lengths),
    }[kind]()
    types = tuple(rng.integers(0, 2, size=n) for n in lengths) if typed else ()
    return Examples(tokens, targets, types), {"tokens": tokens, "targets": targets, "types": types}


def loop_of(parts: list[tuple[Parts, int]]) -> dict[str, np.ndarray]:
    """The batch of rows, by a loop over them."""
    longest = max(len(source["tokens"][row]) for source, row in parts)
    ids = np.full((len(parts), longest), PAD)
    mask, types, labels = np.zeros_like(ids), np.zeros_like(ids), np.full_like(ids, -100)
    for place, (source, row) in enumerate(parts):
        tokens, target = source["tokens"][row], source["targets"][row]
        ids[place, : len(tokens)] = tokens
        mask[place, : len(tokens)] = 1
        if source["types"]:
            types[place, : len(tokens)] = source["types"][row]
        if isinstance(target, np.ndarray) and target.dtype == np.bool_:
            labels[place, : len(tokens)][target] = tokens[target]
    learned = isinstance(parts[0][0]["targets"], tuple)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels if learned else np.array([source["targets"][row] for source, row in parts]),
    }
    return batch | ({"token_type_ids": types} if any(source["types"] for source, _ in parts) else {})


@pytest.mark.parametrize("kind", ["class", "numbers", "learned"])
@pytest.mark.parametrize("typed", [(False, False), (True, True), (False, True)])
def test_batches_are_those_of_a_loop(kind: str, typed: tuple[bool, bool]) -> None:
    """Rows of one source and of several, in any order and more than once; padding is the task's own."""
    task = CausalLM(PAD) if kind == "learned" else Classification(PAD)
    sources = [drawn(seed, kind, typed=one) for seed, one in enumerate(typed)]
    rng = np.random.default_rng(9)
    for count in (1, 2, 40):
        chosen = [(int(rng.integers(0, 2)), int(rng.integers(0, 20))) for _ in range(count)]
        for picks in (chosen, [(0, row) for _, row in chosen]):
            joined = task.join([(sources[at][0], row) for at, row in picks])
            batch = task.collate(joined, range(count), CPU)
            expected = loop_of([(sources[at][1], row) for at, row in picks])
            if kind == "learned":
                learned = expected["labels"][:, 1:] != -100
                expected["answer_at"], expected["answers"] = np.flatnonzero(learned), expected["labels"][:, 1:][learned]
            assert batch.keys() == expected.keys()
            for name, value in expected.items():
                assert np.array_equal(batch[name].numpy(), value), name
                assert batch[name].dtype == torch.from_numpy(value).dtype, name
            assert joined.cost.tolist() == [len(sources[at][1]["tokens"][row]) for at, row in picks]
    direct = task.collate(sources[1][0], [3, 3, 0], CPU)
    assert np.array_equal(
        direct["input_ids"].numpy(), loop_of([(sources[1][1], row) for row in (3, 3, 0)])["input_ids"]
    )


def test_rows_are_what_was_given() -> None:
    examples, parts = drawn(1, "learned", typed=True)
    assert len(examples) == 20
    assert examples.flat.dtype == np.int32
    assert np.array_equal(examples.flat, np.concatenate(parts["tokens"]))
    assert examples.starts.tolist() == [0, *np.cumsum([len(row) for row in parts["tokens"]])]
    for row in (0, 7, -1):
        assert np.array_equal(examples.tokens[row], parts["tokens"][row])
        assert np.array_equal(examples.targets[row], parts["targets"][row])
        assert np.array_equal(examples.types_of(row), parts["types"][row])
    assert examples.tokens[0].dtype == np.int64
    assert [row.tolist() for row in examples.tokens[2:4]] == [row.tolist() for row in parts["tokens"][2:4]]
    with pytest.raises(IndexError):
        examples.tokens[20]
    assert drawn(2, "class")[0].types_of(3).sum() == 0


def test_no_rows_and_rows_of_nothing() -> None:
    assert len(Ragged.of([], np.int32)) == 0
    nothing = Ragged.of([[], [1, 2], []], np.int32)
    assert nothing.lengths.tolist() == [0, 2, 0]
    assert nothing.take(np.array([2, 1])).flat.tolist() == [1, 2]
    assert nothing.padded(np.array([0, 1]), 5)[0].tolist() == [[5, 5], [1, 2]]
    assert nothing.padded(np.array([0, 2]), 5)[0].shape == (2, 0)
    assert stacked([nothing, Ragged.of([[3]], np.int32)]).lengths.tolist() == [0, 2, 0, 1]
