"""The kernel of :mod:`fedlora.engine.kernels.row_peaks`: a program works on one tensor of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 4096
_WARPS = 8


@triton.jit
def _peaks(
    rows_ptr, others_ptr, row_ptr, bounds_ptr, out_ptr, rows_stride, others_stride,
    COMPARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, last = tl.load(bounds_ptr + part), tl.load(bounds_ptr + part + 1)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    other = row
    if COMPARED:
        other = tl.load(row_ptr + row)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(rows_ptr + row * rows_stride + at, mask=at < last, other=0.0).to(tl.float32)
        if COMPARED:
            before = tl.load(others_ptr + other * others_stride + at, mask=at < last, other=0.0).to(tl.float32)
            value = tl.where(value == before, 0.0, 1.0)
        else:
            value = tl.where(value == value, tl.abs(value), float("inf"))
        peak = tl.maximum(peak, value)
    tl.store(out_ptr + row * tl.num_programs(0) + part, tl.max(peak, 0))


def peaks(rows: Tensor, bounds: Tensor) -> Tensor:
    """See :func:`fedlora.engine.kernels.row_peaks.peaks`; float32."""
    return _launched(rows, rows, bounds, bounds, compared=False)


def differ(rows: Tensor, others: Tensor, row_n: Tensor, bounds: Tensor) -> Tensor:
    """See :func:`fedlora.engine.kernels.row_peaks.differ`."""
    return _launched(rows, others, row_n, bounds, compared=True) > 0


def _launched(rows: Tensor, others: Tensor, row_n: Tensor, bounds: Tensor, *, compared: bool) -> Tensor:
    assert rows.stride(1) == others.stride(1) == 1, "rows whose numbers are not side by side"
    out = torch.empty((len(rows), len(bounds) - 1), dtype=torch.float32, device=rows.device)
    _peaks[len(bounds) - 1, len(rows)](
        rows, others, row_n, bounds, out, rows.stride(0), others.stride(0),
        COMPARED=compared, BLOCK=_NUMBERS, num_warps=_WARPS,
    )  # fmt: skip
    return out
