"""The low-rank kernels themselves, see :mod:`fedlora.engine.kernels.low_rank`.

A program works on a block of positions, of one group as a rule; where groups meet in a block, it is computed with each
one's factors, and each one's part is kept. Or, for the sums, it works on a block of features of one group, over some of
its positions. Products accumulate in float32, and are always added in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fedlora.engine.kernels.common import FEATURES, A, B, X


@triton.jit
def _projected(
    x_ptr, w_ptr, token, inside, w_d, w_r,
    SIZE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Return x W [BT, RB] for W [size, rank] of one group."""
    r, d = tl.arange(0, RB), tl.arange(0, BD)
    u = tl.zeros((BT, RB), dtype=tl.float32)
    for at in range(0, SIZE, BD):
        x = tl.load(x_ptr + token * SIZE + (at + d)[None, :], mask=inside & ((at + d) < SIZE)[None, :], other=0.0)
        w = tl.load(
            w_ptr + (at + d)[:, None] * w_d + r[None, :] * w_r,
            mask=((at + d) < SIZE)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        u += tl.dot(x, w)
    return u


@triton.jit
def _factor(w_ptr, at, w_d, w_r, SIZE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BD: tl.constexpr):
    """Return a block of columns of one group's W [rank, size]."""
    r, d = tl.arange(0, RB), tl.arange(0, BD)
    return tl.load(
        w_ptr + (at + d)[None, :] * w_d + r[:, None] * w_r,
        mask=((at + d) < SIZE)[None, :] & (r < R)[:, None],
        other=0.0,
    )


@triton.jit
def _two_products(
    x_ptr, down_ptr, up_ptr, add_ptr, out_ptr, u_ptr, group_ptr, tokens, width,
    down_g, down_r, down_d, up_g, up_d, up_r,
    ADD: tl.constexpr, SECOND: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write u = x down [.., r], and out = u up, plus what is added to."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    token = t.to(tl.int64)[:, None]
    inside, r, d = (t < tokens)[:, None], tl.arange(0, RB), tl.arange(0, BD)
    group_t = tl.load(group_ptr + t // width, mask=t < tokens, other=0)
    first = tl.load(group_ptr + (tl.program_id(0) * BT) // width)
    last = tl.load(group_ptr + (tl.minimum(tl.program_id(0) * BT + BT, tokens) - 1) // width)
    for group in range(first, last + 1):
        # Each product is complete by itself. One that is added up over groups runs into the next one, whose rows then
        # overwrite registers that the tensor cores still read (seen with Triton 3.6: garbage at some of these rows).
        own = inside & (group_t == group)[:, None]
        u = _projected(x_ptr, down_ptr + group * down_g, token, inside, down_d, down_r, IN, R, RB, BT, BD)
        low = u.to(x_ptr.dtype.element_ty)
        tl.store(u_ptr + token * R + r[None, :], low, mask=own & (r < R)[None, :])
        if SECOND:
            for at in range(0, OUT, BD):
                keep, place = own & ((at + d) < OUT)[None, :], token * OUT + (at + d)[None, :]
                y = tl.dot(low, _factor(up_ptr + group * up_g, at, up_d, up_r, OUT, R, RB, BD))
                if ADD:
                    y += tl.load(add_ptr + place, mask=keep, other=0.0)
                tl.store(out_ptr + place, y.to(low.dtype), mask=keep)


@triton.jit
def _sums(
    u_ptr, x_ptr, out_ptr, first_ptr, width, splits, split_stride, group_stride,
    BY_RANK: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    block, group, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first = tl.load(first_ptr + group) * width
    last = tl.load(first_ptr + group + 1) * width
    share = tl.cdiv(tl.cdiv(last - first, splits), BT) * BT
    start = first + part * share
    end = tl.minimum(start + share, last)
    d, r, t = block * BD + tl.arange(0, BD), tl.arange(0, RB), tl.arange(0, BT)
    total = tl.zeros((RB, BD), dtype=tl.float32)
    for at in range(start, end, BT):
        token = (at + t).to(tl.int64)
        u = tl.load(u_ptr + token[None, :] * R + r[:, None], mask=(token < end)[None, :] & (r < R)[:, None], other=0.0)
        x = tl.load(
            x_ptr + token[:, None] * SIZE + d[None, :], mask=(token < end)[:, None] & (d < SIZE)[None, :], other=0.0
        )
        total += tl.dot(u, x)
    place = r[:, None] * SIZE + d[None, :] if BY_RANK else d[None, :] * R + r[:, None]
    tl.store(
        out_ptr + part * split_stride + group * group_stride + place,
        total.to(out_ptr.dtype.element_ty),
        mask=(r < R)[:, None] & (d < SIZE)[None, :],
    )


@triton_op("fedlora::low_rank", mutates_args={})
def low_rank(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    group_n: Tensor,
    first_g: Tensor,
    width: int,
    positions: int,
    ranks: int,
    splits_a: int,
    splits_b: int,
) -> tuple[Tensor, Tensor]:
    """Return ``y + B A x`` [N T, d_out] and ``A x`` [N T, r].

    Args:
        y: What is added to, [N T, d_out].
        x: The input, [N T, d_in].
        a: A, [G, r, d_in].
        b: B, [G, d_out, r].
        group_n: Each row's group, [N].
        first_g: Each group's first row, and N after the last, [G + 1].
        width: T.
        positions: Of a block.
        ranks: Of a block, at least r.
        splits_a: Parts in which each group's gradient of A is summed.
        splits_b: Of B's.
    """
    y, x = y.contiguous(), x.contiguous()
    tokens, rank = x.shape[0], a.shape[1]
    out, u = torch.empty_like(y), x.new_empty((tokens, rank))
    wrap_triton(_two_products)[(triton.cdiv(tokens, positions),)](
        x, a, b, y, out, u, group_n, tokens, width,
        a.stride(0), a.stride(1), a.stride(2), b.stride(0), b.stride(1), b.stride(2),
        ADD=True, SECOND=True, IN=int(x.shape[1]), OUT=int(y.shape[1]), R=int(rank),
        RB=ranks, BT=positions, BD=FEATURES,
    )  # fmt: skip
    return out, u


@triton_op("fedlora::low_rank_backward", mutates_args={})
def low_rank_backward(
    dy: Tensor,
    x: Tensor,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    group_n: Tensor,
    first_g: Tensor,
    width: int,
    positions: int,
    ranks: int,
    splits_a: int,
    splits_b: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x [N T, d_in], of A [G, r, d_in] and of B [G, d_out, r]; as many as wanted.

    Args:
        dy: The gradient of the output, [N T, d_out].
        x: The input, [N T, d_in].
        u: ``A x``, [N T, r].
        a: A, [G, r, d_in].
        b: B, [G, d_out, r].
        group_n: Each row's group, [N].
        first_g: Each group's first row, and N after the last, [G + 1].
        width: T.
        positions: Of a block.
        ranks: Of a block, at least r.
        splits_a: Parts in which each group's gradient of A is summed.
        splits_b: Of B's.
        wanted: Which gradients, see :data:`fedlora.engine.kernels.common.X`; the others come back without rows.
    """
    dy, x = dy.contiguous(), x.contiguous()
    tokens, rank = x.shape[0], a.shape[1]
    dx = x.new_empty((tokens if wanted & X else 0, x.shape[1]))
    da, db = a.new_empty((0, *a.shape[1:])), b.new_empty((0, *b.shape[1:]))
    if wanted & (X | A):
        du = torch.empty_like(u)
        wrap_triton(_two_products)[(triton.cdiv(tokens, positions),)](
            dy, b, a, dy, dx, du, group_n, tokens, width,
            b.stride(0), b.stride(2), b.stride(1), a.stride(0), a.stride(2), a.stride(1),
            ADD=False, SECOND=bool(wanted & X), IN=int(dy.shape[1]), OUT=int(x.shape[1]), R=int(rank),
            RB=ranks, BT=positions, BD=FEATURES,
        )  # fmt: skip
        if wanted & A:
            da = _sum(du, x, first_g, width, positions, ranks, splits_a, by_rank=True)
    if wanted & B:
        db = _sum(u, dy, first_g, width, positions, ranks, splits_b, by_rank=False)
    return dx, da, db


def _sum(
    u: Tensor, x: Tensor, first_g: Tensor, width: int, positions: int, ranks: int, splits: int, *, by_rank: bool
) -> Tensor:
    """Return for each group the sum over its positions of ``u x^T``, [G, r, d], or if not by rank ``x u^T``, [G, d, r].

    The order is that of the factor, so that nothing has to be transposed behind it.
    """
    groups, rank, size = first_g.shape[0] - 1, u.shape[1], x.shape[1]
    shape = (rank, size) if by_rank else (size, rank)
    out = x.new_empty((splits, groups, *shape), dtype=torch.float32 if splits > 1 else x.dtype)
    wrap_triton(_sums)[(triton.cdiv(size, FEATURES), groups, splits)](
        u, x, out, first_g, width, splits, out.stride(0), out.stride(1),
        BY_RANK=by_rank, SIZE=int(size), R=int(rank), RB=ranks, BT=positions, BD=FEATURES,
    )  # fmt: skip
    return out[0] if splits == 1 else out.sum(0).to(x.dtype)


def _setup(ctx, inputs, output) -> None:
    _, x, a, b, group_n, first_g, *ctx.how = inputs
    ctx.save_for_backward(x, output[1], a, b, group_n, first_g)


def _gradients(ctx, dy, _):
    needs = ctx.needs_input_grad
    wanted = X * needs[1] | A * needs[2] | B * needs[3]
    dx = da = db = None
    if wanted:
        dx, da, db = torch.ops.fedlora.low_rank_backward(dy, *ctx.saved_tensors, *ctx.how, wanted)
    return (
        (dy if needs[0] else None),
        (dx if needs[1] else None),
        (da if needs[2] else None),
        (db if needs[3] else None),
        *[None] * 7,
    )


low_rank.register_autograd(_gradients, setup_context=_setup)
