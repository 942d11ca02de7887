"""The kernels of :mod:`fedlora.engine.kernels.attention`: a program holds a row's queries and keys of one key head."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fedlora.engine.kernels.common import like_rows


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
def _forward(
    q_ptr, k_ptr, v_ptr, o_ptr, length_ptr, scale, width, shared,
    q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, o_n, o_h, o_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside, length = (t < width)[:, None], tl.load(length_ptr + n)
    kept = head // shared
    at = d[None, :]
    q = tl.load(q_ptr + n * q_n + head * q_h + t[:, None] * q_t + at, mask=inside, other=0.0)
    k = tl.load(k_ptr + n * k_n + kept * k_h + t[:, None] * k_t + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + n * v_n + kept * v_h + t[:, None] * v_t + at, mask=inside, other=0.0)
    p = _scores(q, k, t, length, scale, CAUSAL)
    o = tl.dot(p.to(v.dtype), v)
    tl.store(o_ptr + n * o_n + head * o_h + t[:, None] * o_t + at, o.to(v.dtype), mask=inside)


@triton.jit
def _backward(
    dy_ptr, q_ptr, k_ptr, v_ptr, dq_ptr, dk_ptr, dv_ptr, length_ptr, scale, width, shared,
    y_n, y_h, y_t, q_n, q_h, q_t, k_n, k_h, k_t, v_n, v_h, v_t, dq_n, dq_h, dq_t, dk_n, dk_h, dk_t,
    CAUSAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    n, kept = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, d = tl.arange(0, T), tl.arange(0, D)
    inside, length = (t < width)[:, None], tl.load(length_ptr + n)
    at = d[None, :]
    k = tl.load(k_ptr + n * k_n + kept * k_h + t[:, None] * k_t + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + n * v_n + kept * v_h + t[:, None] * v_t + at, mask=inside, other=0.0)
    dk, dv = tl.zeros((T, D), dtype=tl.float32), tl.zeros((T, D), dtype=tl.float32)
    for head in range(kept * shared, kept * shared + shared):
        q = tl.load(q_ptr + n * q_n + head * q_h + t[:, None] * q_t + at, mask=inside, other=0.0)
        dy = tl.load(dy_ptr + n * y_n + head * y_h + t[:, None] * y_t + at, mask=inside, other=0.0)
        p = _scores(q, k, t, length, scale, CAUSAL)
        dv += tl.dot(tl.trans(p.to(dy.dtype)), dy)
        dp = tl.dot(dy, tl.trans(v))
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
        dq = tl.dot(ds, k)
        tl.store(dq_ptr + n * dq_n + head * dq_h + t[:, None] * dq_t + at, dq.to(q.dtype), mask=inside)
        dk += tl.dot(tl.trans(ds), q)
    place = n * dk_n + kept * dk_h + t[:, None] * dk_t + at
    tl.store(dk_ptr + place, dk.to(k.dtype), mask=inside)
    tl.store(dv_ptr + place, dv.to(k.dtype), mask=inside)


def _block(width: int) -> tuple[int, int]:
    """Return the positions of a program, and its warps."""
    block = max(16, triton.next_power_of_2(width))
    return block, {16: 1, 32: 2, 64: 4}.get(block, 8)


def forward(query: Tensor, key: Tensor, value: Tensor, length_n: Tensor, scale: float, causal: bool) -> Tensor:
    """Return the attention, [N, T, H, d]."""
    query, key, value = (_dense(one) for one in (query, key, value))
    rows, heads, width, dim = query.shape
    out = query.new_empty((rows, width, heads, dim))
    block, warps = _block(width)
    _forward[(rows, heads)](
        query, key, value, out, length_n, scale, width, heads // key.shape[1],
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.transpose(1, 2).stride()[:3],
        CAUSAL=causal, T=block, D=dim, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, length_n: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    dy, query, key, value = (_dense(one) for one in (dy.transpose(1, 2), query, key, value))
    rows, heads, width, dim = query.shape
    dq, dk, dv = like_rows(query), like_rows(key), like_rows(value)
    block, warps = _block(width)
    _backward[(rows, key.shape[1])](
        dy, query, key, value, dq, dk, dv, length_n, scale, width, heads // key.shape[1],
        *dy.stride()[:3], *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *dq.stride()[:3], *dk.stride()[:3],
        CAUSAL=causal, T=block, D=dim, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return dq, dk, dv


def _dense(one: Tensor) -> Tensor:
    return one if one.stride(-1) == 1 else one.contiguous()
