"""The low-rank update of rows, each with its group's factors: ``y + B_g A_g x``, read and written once.

A library's batched products read a row's numbers six times and write them three times a layer, forward and backward
(update, sum, and their gradients); these kernels read them four times and write them twice. Rows of a group need not be
equally many: each row brings its group's number.

Shapes: `N` rows of `T` positions, `G` groups, `d` features, `r` rank. Tokens side by side are rows of one position.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from fedlora.engine.kernels.common import FEATURES, largest_within, smallest_fitting
from fedlora.transfer import Spans

_POSITIONS = (32, 64)
_RANKS = (16, 32, 64, 128, 256)
_SPLITS = (1, 8)
_PROGRAMS = 528  # four for each multiprocessor of an H100


def register() -> None:
    """Make the operators known to torch."""
    importlib.import_module("fedlora.engine.kernels.low_rank_triton")


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return ``y + B_g A_g x`` for each row's group g.

    Args:
        y: What is added to, [N, ..., d_out], or of tokens side by side [1, N, d_out].
        x: The input, [N, ..., d_in] or [1, N, d_in].
        a: A of each group, [G, r, d_in], or [r, d_in] of all of them.
        b: B of each group, scaled, [G, d_out, r], or [d_out, r].
        spans: Which rows are whose.
    """
    if a.shape[-2] > _RANKS[-1]:
        raise ValueError(f"rank {a.shape[-2]}: the kernel has room for {_RANKS[-1]}")
    groups = spans.first_g.shape[0] - 1
    a, b = (one if one.dim() == 3 else one.expand(groups, -1, -1) for one in (a, b))
    flat = x.reshape(-1, x.shape[-1])
    width = flat.shape[0] // spans.group_n.shape[0]
    positions = smallest_fitting(flat.shape[0] // a.shape[0], _POSITIONS)
    added_to: Tensor = torch.ops.fedlora.low_rank(
        y.reshape(-1, y.shape[-1]),
        flat,
        a,
        b,
        spans.group_n,
        spans.first_g,
        width,
        positions,
        smallest_fitting(a.shape[1], _RANKS),
        _splits(flat, a, positions),
        _splits(flat, b.mT, positions),
    )[0]
    return added_to.view(y.shape)


def _splits(x: Tensor, factor: Tensor, positions: int) -> int:
    """Return in how many parts the sum of a group's tokens is computed, so that few groups have programs enough."""
    blocks = factor.shape[0] * ((factor.shape[2] + FEATURES - 1) // FEATURES)
    return largest_within(min(_PROGRAMS // blocks, x.shape[0] // (factor.shape[0] * 4 * positions)), _SPLITS)


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return the same in plain torch: a factor for each row."""
    a_n, b_n = (one[spans.group_n] if one.dim() == 3 else one for one in (a, b))
    flat = (x.flatten(1, -2) if x.dim() > 2 else x[:, None]) @ a_n.mT @ b_n.mT
    return y + flat.view(y.shape)
