"""Attention of rows that lie side by side without padding: each token sees its own row.

transformers calls it by the name :data:`NAME`. Within :func:`rows_in_place` the batch is ``[1, M, d]``, and the rows'
beginnings tell who sees whom: rows of up to :data:`LONGEST` tokens have a kernel that holds all of a row's queries and
keys of a head, forward and backward, since libraries' kernels are made for long rows; longer ones take PyTorch's
attention of variable lengths. Elsewhere it is transformers' own ``sdpa``, mask and all.

Shapes: `N` rows, `M` tokens of all of them, `H` query heads, `K` key heads, `d` features a head.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from fedlora.engine.kernels.common import smallest_fitting
from fedlora.transfer import to_device

NAME = "fedlora-rows"
SIZES = (32, 64, 128)
LONGEST = SIZES[-1]
_FEATURES = (16, 32, 64, 128)
_PLAIN = {"dropout", "scaling", "is_causal", "position_ids", "cache_position"}
_PLAIN |= {"use_cache", "output_attentions", "output_router_logits"}


@final
@dataclass(frozen=True)
class Rows:
    """Where rows lie side by side.

    Attributes:
        start: Each row's first token, and M after the last, int32 [N + 1].
        longest: A bound on their lengths, a power of two, so that what is compiled holds for many.
    """

    start: Tensor
    longest: int

    @classmethod
    def of(cls, starts: NDArray[np.int64], longest: int, device: torch.device) -> Self:
        """Return the rows that begin at ``starts``, [N + 1], of at most ``longest`` tokens."""
        return cls(to_device(starts.astype(np.int32), device), max(SIZES[0], 1 << (longest - 1).bit_length()))


@final
class _Batch:
    """The batch that a model sees now."""

    rows: Rows | None = None


_batch = _Batch()


@contextmanager
def rows_in_place(rows: Rows) -> Iterator[None]:
    """Have attention take rows as they lie side by side, for the time of a block; backward passes run inside, too."""
    before, _batch.rows = _batch.rows, rows
    try:
        yield
    finally:
        _batch.rows = before


@final
class _Cudnn:
    """PyTorch's switch for cuDNN's attention, which all threads have in common: off while at least one wants it so."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._wanted_off = 0
        self._before = True

    @contextmanager
    def off(self) -> Iterator[None]:
        """Have it off, for the time of a block."""
        with self._lock:
            if self._wanted_off == 0:
                self._before = cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
                cuda.enable_cudnn_sdp(False)
            self._wanted_off += 1
        try:
            yield
        finally:
            with self._lock:
                self._wanted_off -= 1
                if self._wanted_off == 0:
                    cuda.enable_cudnn_sdp(self._before)


_cudnn = _Cudnn()


def without_cudnn() -> AbstractContextManager[None]:
    """Keep PyTorch from cuDNN's attention, for the time of a block; backward passes run inside, too.

    It makes a plan for each new shape, for which it takes the host 7 ms a layer. 1,024 rows of new lengths through
    RoBERTa-large, padded, took 0.8 s with it and 0.1 s without; of known ones 0.1 s either way (H100, torch 2.11).
    """
    return _cudnn.off()


def register() -> None:
    """Tell transformers the name."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    if torch.cuda.is_available():
        importlib.import_module("fedlora.engine.kernels.attention_triton")  # its operators


def mask(*, mask_function: Any = causal_mask_function, **kwargs: Any) -> Tensor | None:
    """Return the mask that ``sdpa`` needs; of rows side by side, none.

    Raises:
        ValueError: Tokens do not see just their row, all of it or what comes before.
    """
    if _batch.rows is None:
        seen: Tensor | None = sdpa_mask(mask_function=mask_function, **kwargs)
        return seen
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError("attention of another kind than causal or two-sided")
    return None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the attention of queries [1, H, M, d] over keys and values [1, K, M, d], as [1, M, H, d]."""
    rows = _batch.rows
    if rows is None:
        found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return found
    plain_only = all(name in _PLAIN or given is None for name, given in kwargs.items()) and not kwargs.get("dropout")
    if not plain_only or attention_mask is not None or query.shape[0] != 1:
        raise ValueError("attention of rows side by side has no mask, dropout, bias or the like")
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    dim = query.shape[-1]
    scale = kwargs.get("scaling") or dim**-0.5
    if not query.is_cuda:
        return plain(query, key, value, rows.start, scale, causal), None
    if rows.longest > LONGEST or dim not in _FEATURES or value.shape[-1] != dim:
        return _varlen(query, key, value, rows, scale, causal), None
    query, key, value = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    out: Tensor = torch.ops.fedlora.row_attention(
        query, key, value, rows.start, smallest_fitting(rows.longest, SIZES), scale, causal
    )
    return out.unsqueeze(0), None


def _varlen(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float, causal: bool) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (one.repeat_interleave(shared, 1) for one in (key, value))
    query, key, value = (one.squeeze(0).transpose(0, 1) for one in (query, key, value))
    window = (-1, 0) if causal else (-1, -1)
    found = varlen_attn(
        query, key, value, rows.start, rows.start, rows.longest, rows.longest, scale=scale, window_size=window
    )
    assert isinstance(found, Tensor), "nothing beside the output was asked for"
    return found.unsqueeze(0)


def plain(query: Tensor, key: Tensor, value: Tensor, start: Tensor, scale: float, causal: bool) -> Tensor:
    """Return the same in plain torch, with a score for any two tokens."""
    place = torch.arange(query.shape[2], device=query.device)
    row = torch.searchsorted(start, place.to(start.dtype), right=True)
    seen = row == row[:, None]
    if causal:
        seen = seen & (place <= place[:, None])
    key, value = (one.repeat_interleave(query.shape[1] // key.shape[1], 1) for one in (key, value))
    scores = (query @ key.mT).mul(scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)
