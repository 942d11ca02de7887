"""The engine's kernels against what PyTorch has for the same, on an NVIDIA GPU: time on the device and on the host.

    python -m benchmarks.kernels

Attention of rows side by side against each of PyTorch's kernels for it, without padding and, where they take a mask,
with; the low-rank update against batched products, at equal rows a group. The device's time is that of a CUDA graph of
many calls, which no launch delays; beside it what one eager call costs the host, forward and backward, and the time of
moving the numbers once at the speed of a large copy, measured in the same run. Inputs are larger than the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.engine.report import write
from benchmarks.engine.timing import ceiling, machine
from fedlora.engine.kernels import attention as row_attention
from fedlora.engine.kernels import low_rank
from fedlora.engine.kernels.common import smallest_fitting
from fedlora.transfer import Spans

RESULTS = Path(__file__).parent / "results" / "engine" / "kernels.json"
CUDA = torch.device("cuda")
ATTENTION = (  # rows, heads, key heads, positions, features a head
    (256, 16, 16, 128, 64),
    (512, 16, 16, 64, 64),
    (1024, 16, 16, 32, 64),
    (512, 12, 12, 64, 32),
    (64, 32, 8, 128, 64),
)
LOW_RANK = ((32, 8, 128, 1024), (256, 2, 32, 1024), (64, 16, 64, 384), (64, 1, 128, 2048))  # groups, rows, positions, d
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
_CALLS = 10  # in a graph
_REPEATS = 15
_WARM = 3

Line = dict[str, Any]


def device_us(work: Callable[[], object]) -> float:
    """Return the median time of a piece of work on the device, in a CUDA graph of several."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            work()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / _CALLS)
    return statistics.median(times)


def host_us(work: Callable[[], object]) -> float:
    """Return the median time until a call comes back, with all that it launches on its way."""
    times = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(_CALLS):
            work()
        times.append(1e6 * (time.perf_counter() - started) / _CALLS)
    return statistics.median(times)


def measured(function: Callable[..., Tensor], given: list[Tensor]) -> Line:
    """Return the times of a function and of its gradients."""
    grad = torch.randn_like(function(*given))

    def both() -> object:
        return torch.autograd.grad(function(*given), given, grad)

    forward, whole = device_us(lambda: function(*given)), device_us(both)
    return {"forward_us": forward, "backward_us": whole - forward, "device_us": whole, "host_us": host_us(both)}


def drawn(*shape: int) -> Tensor:
    """Return random numbers that a gradient is taken of."""
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16).requires_grad_()


def attention(rows: int, heads: int, keys: int, width: int, dim: int) -> dict[str, Line]:
    """Return what attention over rows takes, by kernel."""
    given = [drawn(rows, width, count, dim).detach().transpose(1, 2).requires_grad_() for count in (heads, keys, keys)]
    side = [drawn(rows * width, count, dim) for count in (heads, keys, keys)]
    longest = smallest_fitting(width, row_attention.SIZES)
    start = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=CUDA)
    seen = (torch.arange(width, device=CUDA) < width - 1)[None, None, None].expand(rows, 1, width, -1)

    def ours(*qkv: Tensor) -> Tensor:
        found: Tensor = torch.ops.fedlora.row_attention(*qkv, start, longest, dim**-0.5, False)
        return found

    found = {"fedlora": measured(ours, side)}
    for backend in BACKENDS:
        for name, mask in (("", None), (", mask", seen)):

            def theirs(*qkv: Tensor, mask: Tensor | None = mask) -> Tensor:
                return scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=heads != keys)

            try:
                with sdpa_kernel(backend):
                    found[backend.name.split("_")[0].lower() + name] = measured(theirs, given)
            except RuntimeError:
                continue  # it does not take a mask, or these heads
    moved = 2 * (2 * given[0].numel() + 2 * given[1].numel()) * given[0].element_size()
    return {**found, "moved once": {"bytes": moved}}


def update(groups: int, count: int, width: int, size: int) -> dict[str, Line]:
    """Return what the update of rows by their groups' factors takes."""
    y, x = drawn(1, groups * count * width, size), drawn(1, groups * count * width, size)
    a, b = drawn(groups, 8, size), drawn(groups, size, 8)
    spans = Spans.of(np.repeat(np.arange(groups), count * width), groups, CUDA)

    def batched(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x_g, y_g = x.view(groups, -1, size), y.view(groups, -1, size)
        return torch.baddbmm(y_g, x_g @ a.mT, b.mT).view(y.shape)

    return {
        "fedlora": measured(lambda *given: low_rank.added(*given, spans), [y, x, a, b]),
        "batched products": measured(batched, [y, x, a, b]),
        "moved once": {"bytes": 6 * x.numel() * x.element_size()},
    }


def copy_speed() -> float:
    """Return how many TB a second a large copy moves, read and written."""
    source = drawn(2**29).detach()
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / device_us(lambda: target.copy_(source)) / 1e6


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", default=str(RESULTS), help="JSON file to write")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no CUDA device, which the kernels are for")
    warnings.filterwarnings("ignore")
    assert max(shape[3] for shape in ATTENTION) <= row_attention.LONGEST, "rows that are not short"
    row_attention.register()
    low_rank.register()
    speed = copy_speed()
    about, top = machine(CUDA, "benchmarks.kernels"), ceiling(CUDA) / 1e12
    lines: list[Line] = []
    for kernel, shapes, taken in (("attention", ATTENTION, attention), ("low-rank update", LOW_RANK, update)):
        for shape in shapes:
            found: dict[str, Line] = taken(*shape)  # type: ignore[operator]
            moved = found.pop("moved once")["bytes"] / speed / 1e6
            common = {"kernel": kernel, "sizes": list(shape), "moved_us": moved}
            lines += [{**common, "way": way, **times} for way, times in found.items()]
            shown = "; ".join(
                f"{way} {one['forward_us']:.0f} + {one['backward_us']:.0f} us (host {one['host_us']:.0f})"
                for way, one in found.items()
            )
            print(f"{kernel} {shape}: {shown}; moved once {moved:.0f} us", flush=True)
            write("kernels", options, about, {"ceiling_tflops": [top], "copy_tb_s": speed}, lines)


if __name__ == "__main__":
    sys.exit(main())
