"""Keyed draws: equal everywhere, different for different keys."""

from __future__ import annotations

import numpy as np

from fedlora.methods import Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.seeded import Seeded


def test_golden_bits() -> None:
    """These numbers are part of the wire protocol: clients and server draw frozen tensors for themselves."""
    assert [hex(word) for word in Seeded(0).bits("golden", 1, size=2)] == GOLDEN_BITS
    assert Seeded(3).uniform("golden", shape=(2,), bound=0.5).tolist() == GOLDEN_UNIFORM
    assert Seeded(3).permutation("golden", size=6).tolist() == GOLDEN_ORDER


def test_keys_matter() -> None:
    draws = [
        Seeded(seed).bits(*key, size=4).tolist()
        for seed in (0, 1)
        for key in (("a",), ("b",), ("a", 1), ("a", "1"), ("a", 1, 1), ("a", 11))
    ]
    assert len({tuple(draw) for draw in draws}) == len(draws)


def test_a_prefix_of_a_longer_draw() -> None:
    """A draw depends on its key alone, not on how much is drawn."""
    assert np.array_equal(Seeded(0).bits("x", size=3), Seeded(0).bits("x", size=9)[:3])


def test_uniform_fills_its_range() -> None:
    draw = Seeded(0).uniform("u", shape=(50_000,), bound=2.0)
    assert -2.0 <= draw.min() < -1.99
    assert 1.99 < draw.max() < 2.0
    assert abs(draw.mean()) < 0.02
    assert abs(draw.var() - 4 / 3) < 0.02


def test_layers_of_one_shape_start_differently_and_alike_on_every_machine() -> None:
    """Fed-SB's released FFA baseline gave all layers the same A; FFA-LoRA needs the same A at all clients."""
    layers = [Layer(f"layer.{n}", 8, 8, bias=True, fan_in_fan_out=False) for n in range(4)]
    specs = Lora(layers, rank=2, alpha=4.0, rslora=False).specs()
    one, two = initial_tensors(specs, Seeded(5)), initial_tensors(specs, Seeded(5))
    matrices = [one[f"layer.{n}.lora_A"] for n in range(4)]
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert all(not np.array_equal(matrices[a], matrices[b]) for a in range(4) for b in range(a))
    assert all((one[f"layer.{n}.lora_B"] == 0).all() for n in range(4))
    assert max(np.abs(m).max() for m in matrices) <= 8**-0.5


GOLDEN_BITS = ["0x65417d81776d51ba", "0x7bdc1619a01aee20"]
GOLDEN_UNIFORM = [0.009718921964535943, -0.36684094585209204]
GOLDEN_ORDER = [5, 1, 3, 4, 0, 2]
