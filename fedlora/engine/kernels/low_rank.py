"""The low-rank update of rows, each with its group's factors: ``y + B_g A_g x``, read and written once.

A library's batched products read a row's numbers six times and write them three times a layer, forward and backward
(update, sum, and their gradients); these kernels read them four times and write them twice. Rows of a group need not be
equally many: each row brings its group's number.

Shapes: `N` rows of `T` positions, `G` groups, `d` features, `r` rank. Tokens side by side are rows of one position.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fedlora.engine.kernels.common import FEATURES, largest_within, smallest_fitting
from fedlora.transfer import Spans

_POSITIONS = (32, 64)
_RANKS = (16, 32, 64, 128, 256)
MOST_RANKS = _RANKS[-1]
_SPLITS = (1, 8)
_PROGRAMS = 528  # four for each multiprocessor of an H100
_TRIED_GROUPS = 300
_TRIED_NUMBERS = 2**25  # of the input of a trial, at most: of 384 features that is 1,300 blocks, of 4,096 a hundred


def register() -> None:
    """Make the operators known to torch."""
    importlib.import_module("fedlora.engine.kernels.low_rank_triton")


def added(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return ``y + B_g A_g x`` for each row's group g.

    Args:
        y: What is added to, [N, ..., d_out], or of tokens side by side [1, N, d_out].
        x: The input, [N, ..., d_in] or [1, N, d_in].
        a: A of each group, [G, r, d_in], or [r, d_in] of all of them.
        b: B of each group, scaled, [G, d_out, r], or [d_out, r].
        spans: Which rows are whose.
    """
    if a.shape[-2] > MOST_RANKS:
        raise ValueError(f"rank {a.shape[-2]}: the kernel has room for {MOST_RANKS}")
    groups = spans.first_g.shape[0] - 1
    a, b = (one if one.dim() == 3 else one.expand(groups, -1, -1) for one in (a, b))
    flat = x.reshape(-1, x.shape[-1])
    width = flat.shape[0] // spans.group_n.shape[0]
    positions = smallest_fitting(flat.shape[0] // a.shape[0], _POSITIONS)
    added_to: Tensor = torch.ops.fedlora.low_rank(
        y.reshape(-1, y.shape[-1]),
        flat,
        a,
        b,
        spans.group_n,
        spans.first_g,
        width,
        positions,
        smallest_fitting(a.shape[1], _RANKS),
        _splits(flat, a, positions),
        _splits(flat, b.mT, positions),
    )[0]
    return added_to.view(y.shape)


def _splits(x: Tensor, factor: Tensor, positions: int) -> int:
    """Return in how many parts the sum of a group's tokens is computed, so that few groups have programs enough."""
    blocks = factor.shape[0] * ((factor.shape[2] + FEATURES - 1) // FEATURES)
    return largest_within(min(_PROGRAMS // blocks, x.shape[0] // (factor.shape[0] * 4 * positions)), _SPLITS)


def plain(y: Tensor, x: Tensor, a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return the same in plain torch: a factor for each row."""
    a_n, b_n = (one[spans.group_n] if one.dim() == 3 else one for one in (a, b))
    flat = (x.flatten(1, -2) if x.dim() > 2 else x[:, None]) @ a_n.mT @ b_n.mT
    return y + flat.view(y.shape)


def error_at_scale(
    d_in: int,
    d_out: int,
    rank: int,
    device: torch.device,
    dtype: torch.dtype,
    update: Callable[[Tensor, Tensor, Tensor, Tensor, Spans], Tensor] = added,
) -> float:
    """Return how far an update and its gradients are off where groups meet in most blocks, and blocks are many.

    What a compiler gets wrong may show only where a GPU has more blocks than it works on at once: a few rows of
    thousands. So the worst row counts, against the root mean square of all of them; NaN where one is not finite.

    Args:
        d_in: Features of the input.
        d_out: Features of the output.
        rank: r.
        device: Where it is computed.
        dtype: In which numbers.
        update: The update.
    """
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    longest = max(2, min(600, 2 * _TRIED_NUMBERS // (_TRIED_GROUPS * max(d_in, d_out))))
    sizes = np.random.default_rng(0).integers(1, longest, _TRIED_GROUPS)
    group_n = np.repeat(np.arange(_TRIED_GROUPS), sizes)
    y, x, dy = drawn(1, len(group_n), d_out), drawn(1, len(group_n), d_in), drawn(1, len(group_n), d_out)
    a, b = drawn(_TRIED_GROUPS, rank, d_in) / d_in**0.5, drawn(_TRIED_GROUPS, d_out, rank)
    given = [value.requires_grad_() for value in (x, a, b)]
    out = update(y, x, a, b, Spans.of(group_n, _TRIED_GROUPS, device))
    found = [out.detach(), *torch.autograd.grad(out, given, dy)]
    exact = [value.detach().float().requires_grad_() for value in given]
    y_g, x_g = (torch.split(one[0], sizes.tolist()) for one in (y.float(), exact[0]))
    groups = zip(y_g, x_g, *exact[1:], strict=True)
    wanted = torch.cat([y + x @ a.mT @ b.mT for y, x, a, b in groups])[None]
    expected = [wanted.detach(), *torch.autograd.grad(wanted, exact, dy.float())]
    errors = [
        (one.float() - two).square().mean(-1).max() / two.square().mean()
        for one, two in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max().sqrt())
