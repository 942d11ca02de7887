"""The kernel of :mod:`fedlora.engine.kernels.row_sums`: a program adds up a block of numbers over a group's rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 1024


@triton.jit
def _add(sums_ptr, rows_ptr, factor_ptr, first_ptr, size, sums_stride, rows_stride, BLOCK: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(sums_ptr + group * sums_stride + at, mask=inside, other=0.0)
    for row in range(tl.load(first_ptr + group), tl.load(first_ptr + group + 1)):  # int64, as places are
        factor = tl.load(factor_ptr + row).to(tl.float32)
        value = tl.load(rows_ptr + row * rows_stride + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(factor > 0, factor * value, 0.0)
    tl.store(sums_ptr + group * sums_stride + at, total, mask=inside)


def add(sums: Tensor, rows: Tensor, factor_n: Tensor, first_g: Tensor) -> None:
    """See :func:`fedlora.engine.kernels.row_sums.add`; ``sums`` is float32."""
    grid = (triton.cdiv(rows.shape[1], _NUMBERS), len(sums))
    _add[grid](sums, rows, factor_n, first_g, rows.shape[1], sums.stride(0), rows.stride(0), BLOCK=_NUMBERS)
