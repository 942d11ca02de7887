"""Every family of docs/models.md: packed = alone = row by row, under DP too, and PEFT gives what the engine gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedlora.engine import Batching, Engine, evaluate, find_batching
from fedlora.engine.apart import random_tensors
from fedlora.engine.layers import NoRowsError
from fedlora.methods import initial_tensors
from fedlora.seeded import Seeded
from tools.families import ENCODERS, FAMILIES, FLOAT32
from tools.model_table import engine_of, find

_PARTLY_FLOAT32 = (*FLOAT32, "BLOOM", "GPT-J", "GPT-Neo", "Longformer")
"""Families with a softmax or a product in float32, which a processor may round otherwise in another batch."""
_OFTEN = ("ALBERT", "DeBERTa-v2", "FNet", "Gemma 3 (with vision)", "Mixtral", "ModernBERT", "T5", "XLNet")
"""Families that differ most from those that the other tests try; the rest are tried in the slow tests."""


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in _OFTEN else pytest.mark.slow) for one in FAMILIES]
)
def test_a_family(family: str) -> None:
    found = find(family)
    bound = 1e-5 if family in _PARTLY_FLOAT32 else 1e-9
    assert found.moved > 1e-2
    for name in ("alone", "by_row", "dp", "peft"):
        assert getattr(found, name) < bound, name
    assert bool(found.structure.head) == (family in ENCODERS)


def tensors_of(engine: Engine) -> dict[str, object]:
    return random_tensors(initial_tensors(engine.method.specs(), Seeded(0)))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("BERT", "auto", Batching()),
        ("FNet", "auto", Batching(equal_length=True)),
        ("DeBERTa-v2", "auto", Batching()),
        ("DeBERTa-v2", "query_proj,value_proj", Batching(one_group=True)),
        ("XLNet", "auto", Batching(equal_length=True, one_group=True)),
    ],
)
def test_how_rows_may_be_batched(family: str, targets: str, expected: Batching) -> None:
    """FNet's Fourier transform runs over the padding; DeBERTa's query projection also reads relative positions."""
    assert engine_of(family, targets)[0].batching == expected


def test_shared_projections_are_exact_client_by_client() -> None:
    """What cannot be told apart in a pack is trained one client at a time, and under DP row by row."""
    found = find("DeBERTa-v2", "query_proj,key_proj,value_proj")
    assert found.moved > 1e-2
    assert max(found.alone, found.by_row, found.dp, found.peft) < 1e-9


def test_a_pack_on_shared_inputs_is_never_guessed() -> None:
    """Planted: the engine believes that any rows may go together."""
    engine = replace(engine_of("DeBERTa-v2", "query_proj")[0], batching=Batching())
    start = tensors_of(engine)
    with pytest.raises(NoRowsError, match="query_proj"):
        evaluate(engine, {}, engine.task.made_up_rows(), [0, 1], own=[start, start], group=torch.tensor([0, 1]).numpy())  # type: ignore[list-item]


class Coupled(nn.Module):
    """A layer that moves every row a little towards the mean of its batch: what a norm over the batch does."""

    def __init__(self, base: nn.Module, share: float) -> None:
        super().__init__()
        self.base, self.share = base, share

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        y: Tensor = self.base(*args, **named)
        return y + self.share * y.mean(0, keepdim=True)


def test_coupled_rows_are_refused_by_name() -> None:
    engine, _ = engine_of("BERT")
    dense = engine.base.model.bert.encoder.layer[0].output  # type: ignore[union-attr, index]
    dense.LayerNorm = Coupled(dense.LayerNorm, 0.1)  # type: ignore[union-attr, arg-type]
    with pytest.raises(
        ValueError, match=r"a row's loss depends on the other rows of its batch .* together and .* alone"
    ):
        find_batching(engine, initial_tensors(engine.method.specs(), Seeded(0)))


class Leaky(nn.Module):
    """A dropout-like layer through which padding reaches the row only where adapters have changed the values."""

    def __init__(self, adapted: nn.Module) -> None:
        super().__init__()
        self.adapted = adapted

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.adapted(x)
        change = y - self.adapted.base(x)  # type: ignore[operator]
        return y + change.sum(1, keepdim=True)


def test_a_start_of_zeros_hides_nothing() -> None:
    """Planted: rows are coupled through the adapter's update alone, which is zero when a run begins."""
    engine, _ = engine_of("BERT")
    attention = engine.base.model.bert.encoder.layer[0].attention.self  # type: ignore[union-attr, index]
    attention.value = Leaky(attention.value)  # type: ignore[union-attr, arg-type]
    initial = initial_tensors(engine.method.specs(), Seeded(0))
    assert find_batching(engine, initial) == Batching(equal_length=True)
