"""What kernels and their callers have in common."""

from __future__ import annotations

from torch import Tensor

X, A, B = 1, 2, 4
"""Which gradients of a low-rank update are wanted, added up: of the input, of A, of B."""


def like_rows(one: Tensor) -> Tensor:
    """Return an empty tensor of the shape [N, H, T, d] whose memory is [N, T, H, d], as a linear layer gives it."""
    rows, heads, width, dim = one.shape
    return one.new_empty((rows, width, heads, dim)).transpose(1, 2)
