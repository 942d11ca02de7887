"""The kernels of :mod:`fedlora.engine.kernels.attention`: a program holds a row's queries and keys of one key head.

A program is compiled for the longest row that a batch may have, with shorter forms of it inside: a row of ten tokens
among such of a hundred does not compute with a hundred.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from fedlora.engine.kernels.common import like_rows

_WARPS = {16: 1, 32: 2, 64: 4, 128: 8}


@triton.jit
def _scores(q, k, t, length, scale, CAUSAL: tl.constexpr):
    s = tl.dot(q, tl.trans(k)) * scale
    seen = (t < length)[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= t[:, None])
    s = tl.where(seen, s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _forward_row(
    q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside, at = (t < length)[:, None], d[None, :]
    q = tl.load(q_ptr + t[:, None] * q_t + at, mask=inside, other=0.0)
    k = tl.load(k_ptr + t[:, None] * k_t + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + t[:, None] * v_t + at, mask=inside, other=0.0)
    p = _scores(q, k, t, length, scale, CAUSAL)
    o = tl.dot(p.to(v.dtype), v)
    tl.store(o_ptr + t[:, None] * o_t + at, o.to(v.dtype), mask=inside)


@triton.jit
def _forward_sized(
    q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    if T > 32:
        if length <= T // 2:
            _forward_sized(q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t, CAUSAL, T // 2, D)
        else:
            _forward_row(q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t, CAUSAL, T, D)
    else:
        _forward_row(q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t, CAUSAL, T, D)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, start_ptr, scale, shared,
    q_h, q_t, k_h, k_t, v_h, v_t, o_h, o_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_ptr + n).to(tl.int64), tl.load(start_ptr + n + 1).to(tl.int64)
    length = (end - start).to(tl.int32)
    kept = head // shared
    q_ptr += start * q_t + head * q_h
    k_ptr += start * k_t + kept * k_h
    v_ptr += start * v_t + kept * v_h
    o_ptr += start * o_t + head * o_h
    _forward_sized(q_ptr, k_ptr, v_ptr, o_ptr, length, scale, q_t, k_t, v_t, o_t, CAUSAL, T, D)


@triton.jit
def _backward_row(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
    y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside, at = (t < length)[:, None], d[None, :]
    k = tl.load(k_ptr + t[:, None] * k_t + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + t[:, None] * v_t + at, mask=inside, other=0.0)
    dk, dv = tl.zeros((T, D), dtype=tl.float32), tl.zeros((T, D), dtype=tl.float32)
    for head in range(0, shared):
        q = tl.load(q_ptr + head * q_h + t[:, None] * q_t + at, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + head * y_h + t[:, None] * y_t + at, mask=inside, other=0.0)
        p = _scores(q, k, t, length, scale, CAUSAL)
        dv += tl.dot(tl.trans(p.to(dy.dtype)), dy)
        dp = tl.dot(dy, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
        dq = tl.dot(ds, k)
        tl.store(dq_ptr + head * dq_h + t[:, None] * dq_t + at, dq.to(q.dtype), mask=inside)
        dk += tl.dot(tl.trans(ds), q)
    place = t[:, None] * dk_t + at
    tl.store(dk_ptr + place, dk.to(k.dtype), mask=inside)
    tl.store(dv_ptr + place, dv.to(k.dtype), mask=inside)


@triton.jit
def _backward_sized(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
    y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    if T > 32:
        if length <= T // 2:
            _backward_sized(
                dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
                y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t, CAUSAL, T // 2, D,
            )  # fmt: skip
        else:
            _backward_row(
                dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
                y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t, CAUSAL, T, D,
            )  # fmt: skip
    else:
        _backward_row(
            dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
            y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t, CAUSAL, T, D,
        )  # fmt: skip


@triton.jit
def _backward(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, start_ptr, scale, shared,
    y_h, y_t, q_h, q_t, k_h, k_t, v_h, v_t, dq_h, dq_t, dk_h, dk_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, kept = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_ptr + n).to(tl.int64), tl.load(start_ptr + n + 1).to(tl.int64)
    length = (end - start).to(tl.int32)
    first = kept * shared
    dy_ptr += start * y_t + first * y_h
    q_ptr += start * q_t + first * q_h
    k_ptr += start * k_t + kept * k_h
    v_ptr += start * v_t + kept * v_h
    dq_ptr += start * dq_t + first * dq_h
    dk_ptr += start * dk_t + kept * dk_h
    dv_ptr += start * dk_t + kept * dk_h
    _backward_sized(
        dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, scale, shared,
        y_h, y_t, q_h, q_t, k_t, v_t, dq_h, dq_t, dk_t, CAUSAL, T, D,
    )  # fmt: skip


@triton_op("fedlora::row_attention", mutates_args={})
def row_attention(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, longest: int, scale: float, causal: bool
) -> Tensor:
    """Return the attention [M, H, d] of queries [H, M, d] over keys and values [K, M, d].

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        start: Each row's first token, and M after the last, int32 [N + 1].
        longest: A row's most tokens, one of :data:`fedlora.engine.kernels.attention.SIZES`.
        scale: Of the scores.
        causal: Whether a token sees only those before it, and itself.
    """
    query, key, value = _dense(query), _dense(key), _dense(value)
    heads, tokens, dim = query.shape
    out = query.new_empty((tokens, heads, dim))
    wrap_triton(_forward)[(start.shape[0] - 1, heads)](
        query, key, value, out, start, scale, heads // key.shape[0],
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        out.stride(1), out.stride(0),
        CAUSAL=causal, T=longest, D=int(dim), num_warps=_WARPS[longest], num_stages=1,
    )  # fmt: skip
    return out


@triton_op("fedlora::row_attention_backward", mutates_args={})
def row_attention_backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, start: Tensor, longest: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; see :func:`row_attention`.

    Args:
        dy: The gradient of the output, [M, H, d].
        query: The queries.
        key: The keys.
        value: The values.
        start: See there.
        longest: See there.
        scale: See there.
        causal: See there.
    """
    dy, query, key, value = _dense(dy), _dense(query), _dense(key), _dense(value)
    dq, dk, dv = like_rows(query), like_rows(key), like_rows(value)
    wrap_triton(_backward)[(start.shape[0] - 1, key.shape[0])](
        dy, query, key, value, dq, dk, dv, start, scale, query.shape[0] // key.shape[0],
        dy.stride(1), dy.stride(0), query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1),
        CAUSAL=causal, T=longest, D=int(query.shape[2]), num_warps=_WARPS[longest], num_stages=1,
    )  # fmt: skip
    return dq, dk, dv


def _dense(one: Tensor) -> Tensor:
    return one if one.stride(-1) == 1 else one.contiguous()


def _setup(ctx, inputs, output) -> None:
    query, key, value, start, longest, scale, causal = inputs
    ctx.save_for_backward(query, key, value, start)
    ctx.how = longest, scale, causal


def _gradients(ctx, dy):
    grads = torch.ops.fedlora.row_attention_backward(dy, *ctx.saved_tensors, *ctx.how)
    return (*grads, None, None, None, None)


row_attention.register_autograd(_gradients, setup_context=_setup)
