"""Keyed draws: equal everywhere, different for different keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedlora import seeded
from fedlora.methods import Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.seeded import Seeded


def test_golden_bits() -> None:
    """These numbers are part of the wire protocol: clients and server draw frozen tensors for themselves."""
    assert [hex(word) for word in Seeded(0).bits("golden", 1, size=2)] == GOLDEN_BITS
    assert Seeded(3).uniform("golden", shape=(2,), bound=0.5).tolist() == GOLDEN_UNIFORM
    assert Seeded(3).orthonormal("golden", shape=(2, 3)).tolist() == GOLDEN_ORTHONORMAL
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


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 3), (8, 50), (50, 8), (40, 40)])
def test_orthonormal_is_q_of_a_draw(shape: tuple[int, int]) -> None:
    """Rows, or columns where these are fewer; against LAPACK, whose rounding is another one."""
    found, drawn = Seeded(0).orthonormal("q", shape=shape), Seeded(0).uniform("q", shape=shape, bound=1.0)
    found, drawn = (value if shape[0] <= shape[1] else value.T for value in (found, drawn))
    q, r = np.linalg.qr(drawn.T)
    assert np.abs(found @ found.T - np.eye(len(found))).max() < 1e-14
    assert np.abs(found - (q * np.sign(np.diag(r))).T).max() < 1e-11
    once = drawn / np.linalg.norm(drawn, axis=1)[:, None]  # planted: rows of length one are not orthogonal yet
    assert len(found) == 1 or np.abs(once @ once.T - np.eye(len(once))).max() > 1e-2


def test_an_orthonormal_matrix_does_not_depend_on_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other processors and versions of numpy may do: add up in another order; floats would show it."""
    in_order = seeded._sum

    def drawn(summed: Callable[..., Any]) -> Any:
        monkeypatch.setattr(seeded, "_sum", summed)
        return Seeded(0).orthonormal("q", shape=(6, 300))

    expected = drawn(in_order)
    assert np.array_equal(drawn(lambda terms, axis: in_order(np.flip(terms, axis), axis)), expected)
    planted = [drawn(lambda terms, axis, step=step: sum(np.moveaxis(terms, axis, 0)[::step], 0.0)) for step in (1, -1)]
    assert not np.array_equal(*planted), "planted: sums of floats"
    assert np.abs(planted[0] - expected).max() < 1e-14


GOLDEN_BITS = ["0x65417d81776d51ba", "0x7bdc1619a01aee20"]
GOLDEN_UNIFORM = [0.009718921964535943, -0.36684094585209204]
GOLDEN_ORDER = [5, 1, 3, 4, 0, 2]
GOLDEN_ORTHONORMAL = [
    [0.018756008737225396, -0.7079460058101613, 0.7060174679097453],
    [-0.16900481032844294, -0.6982252721516773, -0.6956427555969825],
]
