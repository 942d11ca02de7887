"""The engine's kernels against what PyTorch has for the same: milliseconds forward and backward, on an NVIDIA GPU.

    python -m benchmarks.kernels

Attention of short rows against each of PyTorch's kernels for it, without padding and, where they take a mask, with; the
low-rank update against batched products, at equal rows a group. Beside them the time of moving the numbers once at the
speed of a large copy, measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fedlora.engine.kernels import attention as short_rows
from fedlora.engine.kernels import low_rank
from fedlora.transfer import Spans

CUDA = torch.device("cuda")
ATTENTION = (
    (256, 16, 16, 128, 64),
    (512, 16, 16, 64, 64),
    (1024, 16, 16, 32, 64),
    (512, 12, 12, 64, 32),
    (64, 32, 8, 128, 64),
)
LOW_RANK = ((32, 8, 128, 1024), (256, 2, 32, 1024), (64, 16, 64, 384), (64, 1, 128, 2048))
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def time_ms(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a piece of work on the device."""
    times = []
    for number in range(repeats + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end)] * (number >= 5)
    return statistics.median(times)


def drawn(*shape: int) -> Tensor:
    """Return random numbers that a gradient is taken of."""
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_()


def both(function: Callable[..., Tensor], given: list[Tensor]) -> float:
    """Return the time of a function and of its gradients."""
    grad = torch.randn_like(function(*given))
    return time_ms(lambda: torch.autograd.grad(function(*given), given, grad))


def attention(rows: int, heads: int, keys: int, width: int, dim: int, speed: float) -> dict[str, float]:
    """Return what attention over rows takes, by kernel."""
    given = [drawn(rows, width, count, dim).detach().transpose(1, 2).requires_grad_() for count in (heads, keys, keys)]
    length_n = torch.full((rows,), width, dtype=torch.int32, device=CUDA)
    seen = (torch.arange(width, device=CUDA) < length_n[:, None] - 1)[:, None, None].expand(-1, 1, width, -1)
    moved = 2 * (2 * given[0].numel() + 2 * given[1].numel()) * given[0].element_size()
    found = {"fedlora": both(lambda *qkv: torch.ops.fedlora.short_attention(*qkv, length_n, dim**-0.5, False), given)}
    for backend in BACKENDS:
        for name, mask in (("", None), (", mask", seen)):
            try:
                with sdpa_kernel(backend):
                    found[backend.name.split("_")[0].lower() + name] = both(
                        lambda *qkv, mask=mask: scaled_dot_product_attention(
                            *qkv, attn_mask=mask, enable_gqa=heads != keys
                        ),
                        given,
                    )
            except RuntimeError:
                continue  # it does not take a mask, or these heads
    return {**found, "moved once": moved / speed / 1e6}


def update(groups: int, count: int, width: int, size: int, speed: float) -> dict[str, float]:
    """Return what the update of rows by their groups' factors takes."""
    y, x = drawn(groups * count, width, size), drawn(groups * count, width, size)
    a, b = drawn(groups, 8, size), drawn(groups, size, 8)
    spans = Spans.of(np.repeat(np.arange(groups), count), groups, CUDA)

    def batched(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x_g, y_g = x.view(groups, -1, size), y.view(groups, -1, size)
        return torch.baddbmm(y_g, x_g @ a.mT, b.mT).view(y.shape)

    moved = 6 * x.numel() * x.element_size()
    return {
        "fedlora": both(lambda *given: low_rank.added(*given, spans), [y, x, a, b]),
        "batched products": both(batched, [y, x, a, b]),
        "moved once": moved / speed / 1e6,
    }


def main() -> None:
    """Measure and print."""
    assert max(shape[3] for shape in ATTENTION) <= short_rows.LONGEST, "rows that are not short"
    source = drawn(2**30).detach()
    target = torch.empty_like(source)
    speed = 2 * source.numel() * source.element_size() / time_ms(lambda: target.copy_(source)) / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {speed / 1e3:.2f} TB/s")
    found = {f"attention {shape}": attention(*shape, speed) for shape in ATTENTION}
    found |= {f"low-rank update {shape}": update(*shape, speed) for shape in LOW_RANK}
    for name, times in found.items():
        print(f"{name}:", ", ".join(f"{way} {ms:.3f} ms" for way, ms in times.items()))


if __name__ == "__main__":
    main()
