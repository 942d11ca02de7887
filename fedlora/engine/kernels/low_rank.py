"""The low-rank update of rows, each with its group's factors: ``y + B_g A_g x``, read and written once.

A library's batched products read a row's numbers six times and write them three times a layer, forward and backward
(update, sum, and their gradients); these kernels read them four times and write them twice. Rows of a group need not be
equally many: each row brings its group's number.

Shapes: `N` rows of `T` positions, `G` groups, `d` features, `r` rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedlora.engine.kernels.common import A, B, X
from fedlora.transfer import Spans


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return ``y + B_g A_g x`` for each row's group g.

    Args:
        y: What is added to, [N, ..., d_out].
        x: The input, [N, ..., d_in].
        a: A of each group, [G, r, d_in].
        b: B of each group, scaled, [G, d_out, r].
        spans: Which rows are whose.
    """
    width = x[0].numel() // x.shape[-1]
    flat: Tensor = torch.ops.fedlora.low_rank(
        y.reshape(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), a, b, spans.group_n, spans.first_g, width
    )[0]
    return flat.view(y.shape)


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return the same in plain torch: a factor for each row."""
    a_n, b_n = a[spans.group_n], b[spans.group_n]
    flat = (x.flatten(1, -2) if x.dim() > 2 else x[:, None]) @ a_n.mT @ b_n.mT
    return y + flat.view(y.shape)


@torch.library.custom_op("fedlora::low_rank", mutates_args=())
def _forward(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, group_n: Tensor, first_g: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    from fedlora.engine.kernels import low_rank_triton

    return low_rank_triton.forward(y.contiguous(), x.contiguous(), a, b, group_n, width)


@_forward.register_fake
def _(y: Tensor, x: Tensor, a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), x.new_empty((x.shape[0], a.shape[1]))


@torch.library.custom_op("fedlora::low_rank_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, group_n: Tensor, first_g: Tensor, width: int, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    from fedlora.engine.kernels import low_rank_triton

    return low_rank_triton.backward(dy.contiguous(), x.contiguous(), u, a, b, group_n, first_g, width, wanted)


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, u: Tensor, a: Tensor, b: Tensor, group_n: Tensor, first_g: Tensor, width: int, wanted: int
) -> tuple[Tensor, Tensor, Tensor]:
    rank, groups = a.shape[1], first_g.shape[0] - 1
    return (
        x.new_empty(x.shape if wanted & X else (0, x.shape[1])),
        a.new_empty((groups if wanted & A else 0, rank, x.shape[1])),
        b.new_empty((groups if wanted & B else 0, rank, dy.shape[1])),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, x, a, b, group_n, first_g, width = inputs
    ctx.save_for_backward(x, a, b, output[1], group_n, first_g)
    ctx.width = width


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, a, b, u, group_n, first_g = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = X * needs[1] | A * needs[2] | B * needs[3]
    dx = da = db = None
    if wanted:
        dx, da, db = torch.ops.fedlora.low_rank_backward(dy, x, u, a, b, group_n, first_g, ctx.width, wanted)
    return (
        (dy if needs[0] else None),
        (dx if needs[1] else None),
        (da if needs[2] else None),
        (db.mT if needs[3] else None),  # type: ignore[union-attr]
        None,
        None,
        None,
    )


_forward.register_autograd(_gradients, setup_context=_setup)
