"""Compares reductions of updates, bit by bit."""

from __future__ import annotations

import numpy as np

from fedlora.reduce import Reduction


def assert_same_bits(one: Reduction, other: Reduction) -> None:
    (ours, header), (theirs, expected) = one.encode(), other.encode()
    assert header == expected
    assert {name: own.keys() for name, own in ours.items()} == {name: own.keys() for name, own in theirs.items()}
    assert all(np.array_equal(ours[name][key], theirs[name][key]) for name in ours for key in ours[name])
