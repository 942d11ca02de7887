"""Evaluation does not depend on how rows are batched, nor on whose rows are beside whose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlora.engine import evaluate
from fedlora.methods import initial_tensors
from fedlora.seeded import Seeded
from tests.support.families import PAD, random_examples, small_task
from tests.test_packing import make_engine


def test_evaluation_does_not_depend_on_batching() -> None:
    engine = make_engine("roberta")
    examples = random_examples(30, seed=5)
    tensors = initial_tensors(engine.method.specs(), Seeded(3))
    whole = evaluate(engine, tensors, examples, range(30))
    cut = [evaluate(replace(engine, max_cost=20), tensors, examples, rows) for rows in (range(11), range(11, 30))]
    assert np.array_equal(whole["accuracy"], np.concatenate([part["accuracy"] for part in cut]))
    assert np.abs(whole["loss"] - np.concatenate([part["loss"] for part in cut])).max() < 1e-10


@pytest.mark.parametrize("family", ["bert", "llama-lm"])
def test_clients_are_evaluated_together_as_apart(family: str) -> None:
    """Rows of several clients in one batch, each under its own tensors, in any order."""
    engine = make_engine(family)
    examples = random_examples(30, seed=5, family=family)
    common = initial_tensors(engine.method.specs(), Seeded(3))
    generator = np.random.default_rng(0)
    names = [name for name, spec in engine.method.specs().items() if spec.kind == "B"]
    own = [{name: generator.standard_normal(common[name].shape) for name in names} for _ in range(4)]
    group = generator.integers(0, 4, size=30)
    shared = {name: value for name, value in common.items() if name not in names}
    together = evaluate(replace(engine, max_cost=60), shared, examples, range(30), own=own, group=group)
    for g in range(4):
        rows = np.flatnonzero(group == g)
        alone = evaluate(engine, {**common, **own[g]}, examples, rows.tolist())
        for name, values in alone.items():
            assert np.abs(values - together[name][rows]).max() < 1e-10
    other = evaluate(engine, {**common, **own[0]}, examples, range(30))
    assert np.abs(other["loss"] - together["loss"]).max() > 1e-3, "control: whose tensors they are matters"


def test_padding_to_the_right_only() -> None:
    task = small_task()
    batch = task.collate(random_examples(4, seed=1), range(4), torch.device("cpu"))
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
