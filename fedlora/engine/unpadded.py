"""A model's blocks on tokens side by side: padding enters no block, whatever the rows' lengths.

Before the first of its blocks the tokens of a batch are gathered, [N, T, d] to [1, M, d], and after the last one they
go back; embeddings before, and pooling and heads behind, see rows as ever. Inside, each layer treats tokens alike, but
for attention, which is told where rows begin (:mod:`fedlora.engine.kernels.attention`), and for what the model gives to
each block by position, such as rotary embeddings: that is gathered likewise.

Nothing here knows a model's name. Whether a model's blocks bear it is tried (:mod:`fedlora.engine.fast`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fedlora.engine.layout import Unpadded

Forward = Callable[..., Any]


def blocks_without_padding(
    batch: Unpadded, blocks: Sequence[nn.Module], forwards: Mapping[nn.Module, Forward]
) -> dict[nn.Module, Forward]:
    """Return what runs in place of blocks, one after another in the model, for one batch.

    Args:
        batch: How the batch's tokens lie.
        blocks: The blocks, in the model's order.
        forwards: What runs in place of some of them anyway.
    """
    last = len(blocks) - 1
    return {
        block: _block(batch, forwards.get(block, block.forward), first=number == 0, last=number == last)
        for number, block in enumerate(blocks)
    }


def _block(batch: Unpadded, forward: Forward, *, first: bool, last: bool) -> Forward:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first and hidden_states.shape[:2] != batch.shape:
            raise ValueError(f"blocks are given {tuple(hidden_states.shape)} for rows {batch.shape}")
        hidden = batch.pack(hidden_states) if first else hidden_states
        out = forward(hidden, *(_given(batch, one) for one in args), **{k: _given(batch, v) for k, v in kwargs.items()})
        if not last:
            return out
        return (batch.unpack(out[0]), *out[1:]) if isinstance(out, tuple) else batch.unpack(out)

    return run


def _given(batch: Unpadded, value: Any) -> Any:
    """Return what a block is given beside its hidden states: by position, where it has positions."""
    if isinstance(value, tuple):
        return tuple(_given(batch, one) for one in value)
    rows, width = batch.shape
    by_position = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] in (1, rows)
    return batch.pack_once(value) if by_position and value.shape[1] == width else value
