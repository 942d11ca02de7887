"""What kernels and their callers have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = 128
"""Features that one program of the low-rank kernels works on at a time."""

X, A, B = 1, 2, 4
"""Which gradients of a low-rank update are wanted, added up: of the input, of A, of B."""


def takes_kernel(rows: Tensor) -> bool:
    """Return whether a kernel computes with these numbers: on a GPU, but not in float64, where plain torch is exact."""
    return rows.is_cuda and rows.dtype != torch.float64


def smallest_fitting(number: int, sizes: Sequence[int]) -> int:
    """Return the first of ascending sizes that is not below a number, else the last.

    By comparisons alone, so that what is compiled for sizes left open holds for all numbers of one answer.
    """
    for size in sizes[:-1]:
        if number <= size:
            return size
    return sizes[-1]


def largest_within(number: int, sizes: Sequence[int]) -> int:
    """Return the last of ascending sizes that is not above a number, else the first; likewise."""
    for size in reversed(sizes[1:]):
        if number >= size:
            return size
    return sizes[0]
