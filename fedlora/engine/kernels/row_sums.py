"""Weighted sums of rows by group, always added in the same order: DP-SGD's sums of clipped gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora.engine.kernels.common import takes_kernel
from fedlora.fused import WithFallback
from fedlora.transfer import Spans


def add(sums: Tensor, rows: Tensor, factor_n: Tensor, spans: Spans) -> None:
    """Add to each group's sum [G, p], in place, its rows [N, p] times their factors; a factor of 0 drops NaN, too."""
    (_fast if takes_kernel(rows) else _row_sums)(sums, rows, factor_n, spans)


def _row_sums(sums: Tensor, rows: Tensor, factor_n: Tensor, spans: Spans) -> None:
    wide = rows.to(sums.dtype) * factor_n[:, None].to(sums.dtype)
    sums.index_add_(0, spans.group_n, torch.where(factor_n[:, None] > 0, wide, 0.0))


def _by_kernel(sums: Tensor, rows: Tensor, factor_n: Tensor, spans: Spans) -> None:
    from fedlora.engine.kernels import row_sums_triton

    row_sums_triton.add(sums, rows, factor_n, spans.first_g)


_fast = WithFallback(_by_kernel, _row_sums)
