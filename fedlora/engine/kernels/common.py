"""What kernels and their callers have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

X, A, B = 1, 2, 4
"""Which gradients of a low-rank update are wanted, added up: of the input, of A, of B."""


def at_least(number: int, sizes: Sequence[int]) -> int:
    """Return the first of ascending sizes that is not below a number, else the last.

    By comparisons alone, so that what is compiled for sizes left open holds for all numbers of one answer.
    """
    for size in sizes[:-1]:
        if number <= size:
            return size
    return sizes[-1]


def like_rows(one: Tensor) -> Tensor:
    """Return an empty tensor of the shape [H, M, d] whose memory is [M, H, d], as a linear layer gives it."""
    heads, tokens, dim = one.shape
    return one.new_empty((tokens, heads, dim)).transpose(0, 1)
