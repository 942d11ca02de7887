"""The low-rank kernels themselves, see :mod:`fedlora.engine.kernels.low_rank`.

A program works on a block of positions of one row, which all have one group; or, for the sums, on a block of features
of one group, over some of its positions. Products accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedlora.engine.kernels.common import A, B, X

_FEATURES = 128  # a block's features
_POSITIONS = 64  # and positions, at most
_PROGRAMS = 528  # four for each multiprocessor of an H100


@triton.jit
def _forward(
    y_ptr, x_ptr, a_ptr, b_ptr, out_ptr, u_ptr, group_ptr, width, d_in, d_out,
    a_g, a_r, a_d, b_g, b_d, b_r,
    R: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    group = tl.load(group_ptr + row).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    token = (row.to(tl.int64) * width + t)[:, None]
    inside, r, d = (t < width)[:, None], tl.arange(0, RB), tl.arange(0, BD)
    u = tl.zeros((BT, RB), dtype=tl.float32)
    for at in range(0, d_in, BD):
        x = tl.load(x_ptr + token * d_in + (at + d)[None, :], mask=inside & ((at + d) < d_in)[None, :], other=0.0)
        a = tl.load(
            a_ptr + group * a_g + (at + d)[:, None] * a_d + r[None, :] * a_r,
            mask=((at + d) < d_in)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        u += tl.dot(x, a)
    low = u.to(x_ptr.dtype.element_ty)
    tl.store(u_ptr + token * R + r[None, :], low, mask=inside & (r < R)[None, :])
    for at in range(0, d_out, BD):
        keep = inside & ((at + d) < d_out)[None, :]
        b = tl.load(
            b_ptr + group * b_g + (at + d)[None, :] * b_d + r[:, None] * b_r,
            mask=((at + d) < d_out)[None, :] & (r < R)[:, None],
            other=0.0,
        )
        y = tl.load(y_ptr + token * d_out + (at + d)[None, :], mask=keep, other=0.0)
        tl.store(out_ptr + token * d_out + (at + d)[None, :], (y + tl.dot(low, b)).to(y.dtype), mask=keep)


@triton.jit
def _backward(
    dy_ptr, a_ptr, b_ptr, du_ptr, dx_ptr, group_ptr, width, d_in, d_out,
    a_g, a_r, a_d, b_g, b_d, b_r,
    WANTED: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    group = tl.load(group_ptr + row).to(tl.int64)
    t = block * BT + tl.arange(0, BT)
    token = (row.to(tl.int64) * width + t)[:, None]
    inside, r, d = (t < width)[:, None], tl.arange(0, RB), tl.arange(0, BD)
    du = tl.zeros((BT, RB), dtype=tl.float32)
    for at in range(0, d_out, BD):
        dy = tl.load(dy_ptr + token * d_out + (at + d)[None, :], mask=inside & ((at + d) < d_out)[None, :], other=0.0)
        b = tl.load(
            b_ptr + group * b_g + (at + d)[:, None] * b_d + r[None, :] * b_r,
            mask=((at + d) < d_out)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        du += tl.dot(dy, b)
    low = du.to(dy_ptr.dtype.element_ty)
    tl.store(du_ptr + token * R + r[None, :], low, mask=inside & (r < R)[None, :])
    if WANTED:
        for at in range(0, d_in, BD):
            a = tl.load(
                a_ptr + group * a_g + (at + d)[None, :] * a_d + r[:, None] * a_r,
                mask=((at + d) < d_in)[None, :] & (r < R)[:, None],
                other=0.0,
            )
            tl.store(
                dx_ptr + token * d_in + (at + d)[None, :],
                tl.dot(low, a).to(low.dtype),
                mask=inside & ((at + d) < d_in)[None, :],
            )


@triton.jit
def _sums(
    u_ptr, x_ptr, out_ptr, first_ptr, width, size, split_stride, group_stride,
    SPLITS: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(first_ptr + group) * width
    last = tl.load(first_ptr + group + 1) * width
    share = tl.cdiv(tl.cdiv(last - first, SPLITS), BT) * BT
    start = first + part * share
    end = tl.minimum(start + share, last)
    d, r, t = block * BD + tl.arange(0, BD), tl.arange(0, RB), tl.arange(0, BT)
    total = tl.zeros((RB, BD), dtype=tl.float32)
    for at in range(start, end, BT):
        token = (at + t).to(tl.int64)
        u = tl.load(u_ptr + token[None, :] * R + r[:, None], mask=(token < end)[None, :] & (r < R)[:, None], other=0.0)
        x = tl.load(
            x_ptr + token[:, None] * size + d[None, :], mask=(token < end)[:, None] & (d < size)[None, :], other=0.0
        )
        total += tl.dot(u, x)
    tl.store(
        out_ptr + part * split_stride + group * group_stride + r[:, None] * size + d[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=(r < R)[:, None] & (d < size)[None, :],
    )


def _blocks(width: int, rank: int) -> tuple[int, int]:
    return max(16, min(_POSITIONS, triton.next_power_of_2(width))), max(16, triton.next_power_of_2(rank))


def forward(y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_n: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ``y + B A x`` [N T, d_out] and ``A x`` [N T, r]."""
    positions, ranks = _blocks(width, a.shape[1])
    out, u = torch.empty_like(y), x.new_empty((len(x), a.shape[1]))
    grid = (len(group_n), triton.cdiv(width, positions))
    _forward[grid](
        y, x, a, b, out, u, group_n, width, x.shape[1], y.shape[1], *a.stride(), *b.stride(),
        R=a.shape[1], RB=ranks, BT=positions, BD=_FEATURES,
    )  # fmt: skip
    return out, u


def backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    group_n: Tensor,
    first_g: Tensor,
    width: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N T, d_in], of A [G, r, d_in] and of B, transposed, [G, r, d_out]; as many as wanted.

    Args:
        dy: The gradient of the output, [N T, d_out].
        x: The input, [N T, d_in].
        u: ``A x``, [N T, r].
        a: A, [G, r, d_in].
        b: B, [G, d_out, r].
        group_n: Each row's group, [N].
        first_g: Each group's first row, and N after the last, [G + 1].
        width: T.
        wanted: Which gradients, see :data:`fedlora.engine.kernels.common.X`; the others come back without rows.
    """
    positions, ranks = _blocks(width, a.shape[1])
    dx = x.new_empty(x.shape if wanted & X else (0, x.shape[1]))
    da, db = a.new_empty((0, a.shape[1], a.shape[2])), b.new_empty((0, a.shape[1], b.shape[1]))
    if wanted & (X | A):
        du = torch.empty_like(u)
        _backward[(len(group_n), triton.cdiv(width, positions))](
            dy, a, b, du, dx, group_n, width, a.shape[2], dy.shape[1], *a.stride(), *b.stride(),
            WANTED=bool(wanted & X), R=a.shape[1], RB=ranks, BT=positions, BD=_FEATURES,
        )  # fmt: skip
        if wanted & A:
            da = sums(du, x, first_g, width)
    if wanted & B:
        db = sums(u, dy, first_g, width)
    return dx, da, db


def sums(u: Tensor, x: Tensor, first_g: Tensor, width: int) -> Tensor:
    """Return for each group the sum over its positions of ``u x^T``, [G, r, d]; always added in the same order."""
    groups, rank, size = len(first_g) - 1, u.shape[1], x.shape[1]
    positions, ranks = _blocks(len(x) // max(1, groups), rank)
    blocks = triton.cdiv(size, _FEATURES)
    splits = max(1, min(16, _PROGRAMS // (groups * blocks), len(x) // (groups * 4 * positions)))
    shape = (groups, rank, size)
    out = x.new_empty((splits, *shape), dtype=x.dtype if splits == 1 else torch.float32)
    _sums[(blocks, groups, splits)](
        u, x, out, first_g, width, size, out.stride(0), out.stride(1),
        SPLITS=splits, R=rank, RB=ranks, BT=positions, BD=_FEATURES,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)
