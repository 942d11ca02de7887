"""What kernels compute, in plain torch, against the layers and transformers; on a GPU the kernels themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedlora.engine.kernels import attention, low_rank, row_sums
from fedlora.engine.layers import GroupedLayer, Layout
from fedlora.methods import LowRank
from fedlora.tasks.token_losses import token_losses
from fedlora.transfer import Spans

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
if torch.cuda.is_available():
    attention.register()
    low_rank.register()
GROUPS = np.array([0, 0, 1, 2, 2, 2, 2])


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> torch.Tensor:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return value.to(dtype).to(device).requires_grad_()


def off(one: torch.Tensor, two: torch.Tensor) -> float:
    one, two = one.detach().double(), two.detach().double()
    return float((one - two).norm() / two.norm())


def test_the_low_rank_update_is_a_grouped_layers() -> None:
    x, a, b = drawn(7, 5, 6), drawn(3, 2, 6, seed=1), drawn(3, 4, 2, seed=2)
    base = nn.Linear(6, 4).double()
    layer = GroupedLayer(base, "layer")
    layer.factor, layer.layout = LowRank(a, b, 1.0), Layout.of(GROUPS, 3, torch.device("cpu"))
    y = low_rank.plain(base(x), x, a, b, Spans.of(GROUPS, 3, torch.device("cpu")))
    assert off(y, layer(x)) < 1e-14
    layer.factor = LowRank(a[0], b[0], 1.0)
    assert off(low_rank.plain(base(x), x, a[0], b[0], Spans.of(GROUPS, 3, torch.device("cpu"))), layer(x)) < 1e-14


def test_a_rank_that_the_kernel_has_no_room_for_is_refused() -> None:
    spans = Spans.of(np.array([0]), 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="rank 300: the kernel has room for 256"):
        low_rank.added(drawn(1, 8), drawn(1, 8), drawn(1, 300, 8), drawn(1, 8, 300), spans)


def test_attention_of_rows_side_by_side_is_each_rows_own() -> None:
    lengths = [9, 4, 1]
    start = torch.tensor([0, 9, 13, 14], dtype=torch.int32)
    query, key, value = drawn(1, 4, 14, 8), drawn(1, 2, 14, 8, seed=1), drawn(1, 2, 14, 8, seed=2)
    for causal in (True, False):
        module: Any = nn.Module()
        module.num_key_value_groups, module.is_causal = 2, causal
        mine = attention.plain(query, key, value, start, 0.3, causal)
        with attention.rows_in_place(attention.Rows(start, 16)):
            assert torch.equal(attention.attend(module, query, key, value, None, scaling=0.3)[0], mine)
        for first, length in zip(start.tolist(), lengths, strict=False):
            here = slice(first, first + length)
            own = [one[:, :, here] for one in (query, key, value)]
            alone, _ = attention.attend(module, *own, None, scaling=0.3)  # outside of any batch: transformers' own
            assert off(mine[:, here], alone) < 1e-12


def test_attention_side_by_side_takes_no_more_than_rows() -> None:
    given, module = (drawn(1, 1, 3, 8), drawn(1, 1, 3, 8), drawn(1, 1, 3, 8)), nn.Module()
    rows = attention.Rows.of(np.array([0, 1, 3]), 2, torch.device("cpu"))
    with attention.rows_in_place(rows):
        for extra in ({"dropout": 0.1}, {"sliding_window": 4}, {"position_bias": given[0]}):
            with pytest.raises(ValueError, match="has no mask, dropout, bias"):
                attention.attend(module, *given, None, **extra)
        with pytest.raises(ValueError, match="has no mask, dropout, bias"):
            attention.attend(module, *given, torch.zeros(3, 3))


def test_sums_of_rows_drop_what_is_not_finite() -> None:
    spans = Spans.of(GROUPS, 4, torch.device("cpu"))
    rows, factor = drawn(7, 5).detach(), torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    rows[3, 2] = torch.nan
    sums = torch.ones(4, 5, dtype=torch.float64)
    row_sums.add(sums, rows, factor, spans)
    expected = torch.ones(4, 5, dtype=torch.float64)
    for row, group in enumerate(GROUPS):
        if row != 3:
            expected[group] += factor[row] * rows[row]
    assert off(sums, expected) < 1e-15


@pytest.mark.parametrize("bias", [False, True])
def test_losses_of_tokens(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks as at once, with gradients."""
    from fedlora.tasks import token_losses as module

    head = nn.Linear(6, 11, bias=bias).double().requires_grad_(requires_grad=False)
    hidden, answers = drawn(13, 6), torch.arange(13) % 11
    weights = torch.arange(1.0, 14.0, dtype=torch.float64)
    expected = functional.cross_entropy(head(hidden), answers, reduction="none")
    (slope,) = torch.autograd.grad((expected * weights).sum(), hidden)
    for numbers in (2**28, 44, 1):
        monkeypatch.setattr(module, "_NUMBERS", numbers)
        losses, right = token_losses(hidden, head, answers)
        assert off(losses, expected) < 1e-14
        assert right.tolist() == (head(hidden).argmax(-1) == answers).tolist()
        assert off(torch.autograd.grad((losses * weights).sum(), hidden)[0], slope) < 1e-14
    with torch.no_grad():
        assert off(token_losses(hidden, head, answers)[0], expected) < 1e-14


# -- on a GPU ---------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("shape", [(7, 13, 64, 64, 8), (7, 5, 384, 1536, 3), (7, 1, 48, 40, 16), (7, 130, 96, 32, 4)])
def test_the_low_rank_kernel(shape: tuple[int, int, int, int, int]) -> None:
    rows, width, d_in, d_out, rank = shape
    spans = Spans.of(GROUPS, 4, torch.device("cuda"))  # the last group has no rows
    sizes = ((rows, width, d_out), (rows, width, d_in), (4, rank, d_in), (4, d_out, rank))
    given = [drawn(*size, seed=n, dtype=torch.bfloat16, device="cuda") for n, size in enumerate(sizes)]
    exact = [value.detach().double().requires_grad_() for value in given]
    grad = torch.randn(sizes[0], device="cuda", dtype=torch.bfloat16)
    mine, reference = low_rank.added(*given, spans), low_rank.plain(*exact, spans)
    grads = torch.autograd.grad(mine, given, grad)
    assert off(mine, reference) < 5e-3
    for one, two in zip(grads, torch.autograd.grad(reference, exact, grad.double()), strict=True):
        assert off(one, two) < 5e-3
    again = torch.autograd.grad(low_rank.added(*given, spans), given, grad)
    assert all(torch.equal(one, two) for one, two in zip(grads, again, strict=True))


@GPU
@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_low_rank_kernel_where_groups_meet(side_by_side: bool) -> None:
    """Blocks of positions with several groups: rows of one token, or short ones, of groups of any size."""
    group = np.repeat(np.arange(9), [1, 40, 3, 0, 70, 64, 2, 1, 19])
    spans, given = Spans.of(group, 9, torch.device("cuda")), (1, 200) if side_by_side else (200,)
    sizes = ((*given, 72), (*given, 40), (9, 5, 40), (9, 72, 5))
    tensors = [drawn(*size, seed=n, dtype=torch.bfloat16, device="cuda") for n, size in enumerate(sizes)]
    exact = [value.detach().double().requires_grad_() for value in tensors]
    rows = [value.reshape(200, -1) for value in exact[:2]]
    mine, reference = low_rank.added(*tensors, spans), low_rank.plain(*rows, *exact[2:], spans)
    assert off(mine.reshape(200, -1), reference) < 5e-3
    grad = torch.randn(200, 72, device="cuda", dtype=torch.bfloat16)
    grads = torch.autograd.grad(mine, tensors, grad.view(mine.shape))
    for one, two in zip(grads, torch.autograd.grad(reference, exact, grad.double()), strict=True):
        assert off(one, two) < 5e-3


def test_a_kernel_that_is_wrong_in_a_few_rows_is_found() -> None:
    """Rows of garbage where groups meet, as a kernel of ours had them on an H200 in a pass of 80,000 tokens."""

    def exact(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, spans: Spans) -> torch.Tensor:
        u = torch.einsum("nd,nrd->nr", x[0], a[spans.group_n])
        return y + torch.einsum("nr,ndr->nd", u, b[spans.group_n])

    def garbage(*given: Any) -> torch.Tensor:
        return exact(*given) + torch.eye(len(given[4].group_n), given[3].shape[1])[None] * 9.0

    trial = (8, 4, 2, torch.device("cpu"), torch.float32)
    assert low_rank.error_at_scale(*trial, exact) < 1e-5
    assert low_rank.error_at_scale(*trial, garbage) > 0.1


@GPU
@pytest.mark.parametrize("shape", [(384, 384, 8), (384, 1536, 4), (1024, 1024, 16), (4096, 1024, 8), (384, 384, 64)])
def test_the_low_rank_kernel_at_scale(shape: tuple[int, int, int]) -> None:
    assert low_rank.error_at_scale(*shape, torch.device("cuda"), torch.bfloat16) < 0.05


@GPU
@pytest.mark.parametrize("rank", [4, 8, 16, 64])
@pytest.mark.parametrize("fixed", [False, True])
def test_the_low_rank_kernel_of_many_groups_that_meet(rank: int, fixed: bool) -> None:
    """Hundreds of groups of any size, more blocks than a GPU works on at once: the same numbers each time, and right.

    A is contiguous, as one that is put together of several, or a view of rows of numbers, as one that is trained.
    """
    sizes = np.random.default_rng(0).integers(200, 700, 192)
    group, d = np.repeat(np.arange(192), sizes), 384
    spans = Spans.of(group, 192, torch.device("cuda"))
    y, x, dy = (drawn(1, len(group), d, seed=n, dtype=torch.bfloat16, device="cuda") for n in (0, 1, 4))
    numbers = drawn(192, rank * d + 2, seed=2, dtype=torch.bfloat16, device="cuda").detach()
    views = numbers[:, : rank * d].unflatten(1, (rank, d))
    b = drawn(192, d, rank, seed=3, dtype=torch.bfloat16, device="cuda")
    for a in (views, views.contiguous()):
        a = a.detach() if fixed else a.detach().requires_grad_()
        given = [value for value in (y, x, a, b) if value.requires_grad]
        exact = [value.detach().double().requires_grad_(value.requires_grad) for value in (y, x, a, b)]
        spread = zip(*(one[0].split(sizes.tolist()) for one in exact[:2]), *exact[2:], strict=True)
        reference = torch.cat([y_g + x_g @ a_g.mT @ b_g.mT for y_g, x_g, a_g, b_g in spread])
        wanted = torch.autograd.grad(reference, [v for v in exact if v.requires_grad], dy.detach()[0].double())
        first = None
        for _ in range(100):
            mine = low_rank.added(y, x, a, b, spans)
            found = [mine, *torch.autograd.grad(mine, given, dy.detach())]
            first = first or found
            assert all(torch.equal(one, two) for one, two in zip(found, first, strict=True))
        for one, two in zip(first or [], [reference[None], *wanted], strict=True):
            assert off(one, two) < 5e-3


@GPU
def test_the_low_rank_kernel_with_shared_factors() -> None:
    """As FFA-LoRA has A, and every evaluation of the server's adapter both."""
    spans = Spans.of(GROUPS, 4, torch.device("cuda"))
    sizes = ((7, 9, 32), (7, 9, 48), (5, 48), (4, 32, 5), (32, 5))
    y, x, a, b, one = (drawn(*size, seed=n, dtype=torch.bfloat16, device="cuda") for n, size in enumerate(sizes))
    a = a.detach()
    exact = [value.detach().double().requires_grad_() for value in (y, x, a, b, one)]
    mine, reference = low_rank.added(y, x, a, b, spans), low_rank.plain(*exact[:4], spans)
    assert off(mine, reference) < 5e-3
    grads = torch.autograd.grad(mine.sum(), (y, x, b))
    for got, wanted in zip(grads, torch.autograd.grad(reference.sum(), [*exact[:2], exact[3]]), strict=True):
        assert off(got, wanted) < 5e-3
    with torch.inference_mode():
        assert off(low_rank.added(y, x, a, one, spans), low_rank.plain(*exact[:3], exact[4], spans)) < 5e-3


@GPU
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "heads", "keys", "dim"),
    [
        ([5, 13, 1, 2], 4, 4, 32),
        ([128, 3, 70, 33, 17], 6, 2, 64),
        ([70, 64, 65], 4, 4, 128),
        ([3] * 9, 2, 1, 16),
        ([300, 129, 5], 4, 2, 64),  # PyTorch's own
        ([20, 9], 2, 2, 80),
    ],
)
def test_the_attention_kernel(lengths: list[int], heads: int, keys: int, dim: int, causal: bool) -> None:
    total, starts = sum(lengths), np.cumsum([0, *lengths])
    given = [
        drawn(1, total, count, dim, seed=n, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        for n, count in enumerate((heads, keys, keys))
    ]
    exact = [value.detach().double().requires_grad_() for value in given]
    rows = attention.Rows.of(starts, max(lengths), torch.device("cuda"))
    grad = torch.randn(1, total, heads, dim, device="cuda", dtype=torch.bfloat16)
    module: Any = nn.Module()
    module.is_causal = causal
    with attention.rows_in_place(rows):
        mine, _ = attention.attend(module, *given, None)
    reference = attention.plain(*exact, rows.start, dim**-0.5, causal)
    assert off(mine, reference) < 5e-3
    pairs = zip(
        torch.autograd.grad(mine, given, grad), torch.autograd.grad(reference, exact, grad.double()), strict=True
    )
    assert all(off(one, two) < 1e-2 for one, two in pairs)


@GPU
def test_the_kernel_of_sums() -> None:
    spans = Spans.of(GROUPS, 4, torch.device("cuda"))
    rows, factor = drawn(7, 5000, dtype=torch.bfloat16, device="cuda").detach(), torch.rand(7, device="cuda") + 0.1
    rows[3, 2], factor[3] = torch.nan, 0.0
    sums = torch.ones(4, 5000, device="cuda")
    row_sums.add(sums, rows, factor, spans)
    expected = torch.ones(4, 5000, dtype=torch.float64, device="cuda")
    row_sums.add(expected, rows.double(), factor.double(), spans)  # in plain torch
    assert off(sums, expected) < 1e-6
