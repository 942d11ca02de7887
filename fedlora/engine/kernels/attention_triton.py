"""The kernels of :mod:`fedlora.engine.kernels.attention`: a program holds a row's queries and keys of one key head.

A program is compiled for the longest row that a batch may have, with a form for short ones inside: a row of ten tokens
among such of a hundred does not compute with a hundred. Tensors are [M, H, d], one token's heads after another's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

_WARPS = {32: 2, 64: 4, 128: 8}


@triton.jit
def _scores(q, k, t, length, SCALE: tl.constexpr, CAUSAL: tl.constexpr):
    s = tl.dot(q, tl.trans(k)) * SCALE
    seen = (t < length)[None, :]
    if CAUSAL:
        seen = seen & (t[None, :] <= t[:, None])
    s = tl.where(seen, s, -float("inf"))
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _forward_row(
    q_ptr, k_ptr, v_ptr, o_ptr, length,
    SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside = (t < length)[:, None]
    of_queries, of_keys = t[:, None] * (H * D) + d[None, :], t[:, None] * (K * D) + d[None, :]
    q = tl.load(q_ptr + of_queries, mask=inside, other=0.0)
    k = tl.load(k_ptr + of_keys, mask=inside, other=0.0)
    v = tl.load(v_ptr + of_keys, mask=inside, other=0.0)
    p = _scores(q, k, t, length, SCALE, CAUSAL)
    tl.store(o_ptr + of_queries, tl.dot(p.to(v.dtype), v).to(v.dtype), mask=inside)


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, start_ptr,
    SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_ptr + n).to(tl.int64), tl.load(start_ptr + n + 1).to(tl.int64)
    length = (end - start).to(tl.int32)
    of_queries, of_keys = start * (H * D) + head * D, start * (K * D) + head // (H // K) * D
    q_ptr += of_queries
    k_ptr += of_keys
    v_ptr += of_keys
    o_ptr += of_queries
    if T > 32:
        if length <= 32:
            _forward_row(q_ptr, k_ptr, v_ptr, o_ptr, length, SCALE, H, K, CAUSAL, 32, D)
        else:
            _forward_row(q_ptr, k_ptr, v_ptr, o_ptr, length, SCALE, H, K, CAUSAL, T, D)
    else:
        _forward_row(q_ptr, k_ptr, v_ptr, o_ptr, length, SCALE, H, K, CAUSAL, T, D)


@triton.jit
def _backward_row(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length,
    SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside = (t < length)[:, None]
    of_queries, of_keys = t[:, None] * (H * D) + d[None, :], t[:, None] * (K * D) + d[None, :]
    k = tl.load(k_ptr + of_keys, mask=inside, other=0.0)
    v = tl.load(v_ptr + of_keys, mask=inside, other=0.0)
    dk, dv = tl.zeros((T, D), dtype=tl.float32), tl.zeros((T, D), dtype=tl.float32)
    for head in tl.static_range(0, H // K):
        q = tl.load(q_ptr + head * D + of_queries, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + head * D + of_queries, mask=inside, other=0.0)
        p = _scores(q, k, t, length, SCALE, CAUSAL)
        dv += tl.dot(tl.trans(p.to(dy.dtype)), dy)
        dp = tl.dot(dy, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * SCALE).to(q.dtype)
        tl.store(dq_ptr + head * D + of_queries, tl.dot(ds, k).to(q.dtype), mask=inside)
        dk += tl.dot(tl.trans(ds), q)
    tl.store(dk_ptr + of_keys, dk.to(k.dtype), mask=inside)
    tl.store(dv_ptr + of_keys, dv.to(k.dtype), mask=inside)


@triton.jit
def _backward(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, start_ptr,
    SCALE: tl.constexpr, H: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, kept = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(start_ptr + n).to(tl.int64), tl.load(start_ptr + n + 1).to(tl.int64)
    length = (end - start).to(tl.int32)
    of_queries, of_keys = start * (H * D) + kept * (H // K * D), start * (K * D) + kept * D
    dy_ptr += of_queries
    q_ptr += of_queries
    dq_ptr += of_queries
    k_ptr += of_keys
    v_ptr += of_keys
    dk_ptr += of_keys
    dv_ptr += of_keys
    if T > 32:
        if length <= 32:
            _backward_row(dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, SCALE, H, K, CAUSAL, 32, D)
        else:
            _backward_row(dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, SCALE, H, K, CAUSAL, T, D)
    else:
        _backward_row(dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length, SCALE, H, K, CAUSAL, T, D)


@triton_op("fedlora::row_attention", mutates_args={})
def row_attention(
    query: Tensor, key: Tensor, value: Tensor, start: Tensor, longest: int, scale: float, causal: bool
) -> Tensor:
    """Return the attention of queries [M, H, d] over keys and values [M, K, d], like the queries.

    Args:
        query: The queries.
        key: The keys.
        value: The values.
        start: Each row's first token, and M after the last, int32 [N + 1].
        longest: A row's most tokens, one of :data:`fedlora.engine.kernels.attention.SIZES`.
        scale: Of the scores.
        causal: Whether a token sees only those before it, and itself.
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out, heads = torch.empty_like(query), query.shape[1]
    wrap_triton(_forward)[(start.shape[0] - 1, heads)](
        query, key, value, out, start,
        SCALE=float(scale), H=int(heads), K=int(key.shape[1]), CAUSAL=causal, T=longest, D=int(query.shape[2]),
        num_warps=_WARPS[longest], num_stages=1,
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
    dy, query, key, value = dy.contiguous(), query.contiguous(), key.contiguous(), value.contiguous()
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    wrap_triton(_backward)[(start.shape[0] - 1, key.shape[1])](
        dy, query, key, value, dq, dk, dv, start,
        SCALE=float(scale), H=int(query.shape[1]), K=int(key.shape[1]), CAUSAL=causal, T=longest, D=int(query.shape[2]),
        num_warps=_WARPS[longest], num_stages=1,
    )  # fmt: skip
    return dq, dk, dv


def _setup(ctx, inputs, output) -> None:
    query, key, value, start, longest, scale, causal = inputs
    ctx.save_for_backward(query, key, value, start)
    ctx.how = longest, scale, causal


def _gradients(ctx, dy):
    grads = torch.ops.fedlora.row_attention_backward(dy, *ctx.saved_tensors, *ctx.how)
    return (*grads, None, None, None, None)


row_attention.register_autograd(_gradients, setup_context=_setup)
