"""Attention of short rows: all of a row's keys at once, its padding known by its length, no mask.

Libraries' kernels are made for long rows: at 32 to 128 positions they take two to six times what the memory's speed
allows, and where rows are padded they read a mask of every query and key. Here one program holds all of a row's queries
and keys of a head, forward and backward.

transformers calls it by the name :data:`NAME`: :func:`mask` gives each layer the rows' lengths in place of a mask, and
:func:`attend` computes. What is not a plain causal or two-sided attention over short rows in 16 bits goes to
transformers' own ``sdpa``, mask and all.

Shapes: `N` rows, `H` query heads, `K` key heads, `T` positions, `d` features a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fedlora.engine.kernels.common import like_rows

NAME = "fedlora-short-rows"
LONGEST = 128
_FEATURES = (16, 32, 64, 128)
_SHORT = (torch.float16, torch.bfloat16)
_PLAIN = {"dropout", "scaling", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions"}


def register() -> None:
    """Tell transformers the name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the rows' lengths for :func:`attend`, [N, 1] for causal attention and [N] for two-sided.

    Where it is neither, or not of whole short rows: what ``sdpa`` needs.
    """
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if plain and attention_mask is not None and q_length == kv_length <= LONGEST and not q_offset and not kv_offset:
        length_n = attention_mask.sum(-1, dtype=torch.int32)
        return length_n[:, None] if mask_function is causal_mask_function else length_n
    seen: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return seen


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of queries [N, H, T, d] over keys and values [N, K, T, d], as [N, T, H, d]."""
    if attention_mask is None or attention_mask.dim() > 2:
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    dim, causal = query.shape[-1], attention_mask.dim() == 2
    plain = all(name in _PLAIN or given is None for name, given in kwargs.items()) and not kwargs.get("dropout")
    if not plain or dim not in _FEATURES or value.shape[-1] != dim or query.dtype not in _SHORT:
        seen = _seen(attention_mask.reshape(-1), query.shape[2], causal)
        return _sdpa(module, query, key, value, seen, **kwargs)
    scale = kwargs.get("scaling") or dim**-0.5
    out: Tensor = torch.ops.fedlora.short_attention(query, key, value, attention_mask.reshape(-1), scale, causal)
    return out, None


def _sdpa(module: nn.Module, *arguments: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, *arguments, **kwargs)
    return found


def plain(query: Tensor, key: Tensor, value: Tensor, length_n: Tensor, scale: float, causal: bool) -> Tensor:
    """Return the same in plain torch."""
    seen = _seen(length_n, query.shape[2], causal)
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    scores = (query @ key.mT).mul(scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _seen(length_n: Tensor, width: int, causal: bool) -> Tensor:
    """Return which keys each query sees, bool [N, 1, 1 or T, T]."""
    keys = torch.arange(width, device=length_n.device)
    seen = (keys < length_n[:, None])[:, None, None, :]
    return seen & (keys <= keys[:, None]) if causal else seen


@torch.library.custom_op("fedlora::short_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, length_n: Tensor, scale: float, causal: bool) -> Tensor:
    from fedlora.engine.kernels import attention_triton

    return attention_triton.forward(query, key, value, length_n, scale, causal)


@_forward.register_fake
def _(query: Tensor, *_: Any) -> Tensor:
    rows, heads, width, dim = query.shape
    return query.new_empty((rows, width, heads, dim))


@torch.library.custom_op("fedlora::short_attention_backward", mutates_args=())
def _backward(
    dy: Tensor, query: Tensor, key: Tensor, value: Tensor, length_n: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from fedlora.engine.kernels import attention_triton

    return attention_triton.backward(dy, query, key, value, length_n, scale, causal)


@_backward.register_fake
def _(dy: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(like_rows(one) for one in (query, key, value))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, length_n, scale, causal = inputs
    ctx.save_for_backward(query, key, value, length_n)
    ctx.scale, ctx.causal = scale, causal


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, length_n = ctx.saved_tensors
    grads = torch.ops.fedlora.short_attention_backward(dy, query, key, value, length_n, ctx.scale, ctx.causal)
    return (*grads, None, None, None)


_forward.register_autograd(_gradients, setup_context=_setup)
