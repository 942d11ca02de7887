"""The memory of a pack of a large model over many rounds, with a plain or a quantised base."""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import torch

from benchmarks.engine.report import show_memory, write
from benchmarks.engine.timing import GIB, Budget, attempt, ceiling, machine, synchronize
from benchmarks.engine.ways import Bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.set_defaults(shape="llama-2-7b")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--clients", type=int, default=32, help="clients of the pack")
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument("--rounds", type=int, default=50, help="rounds, one after another")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Train rounds; return the exit code: 1 where one failed."""
    budget, about, tops = Budget(options.budget_s), machine(device), [ceiling(device) / 1e12]
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)
    job = bench.job(options.clients, options.steps, options.rows, options.tokens)
    packed = bench.packed()
    lines: list[dict[str, Any]] = []
    error = ""
    while len(lines) < options.rounds and not error and not budget.over:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        synchronize(device)
        started = time.perf_counter()
        error = attempt(lambda: packed.round(job))
        synchronize(device)
        seconds = time.perf_counter() - started
        lines.append({"round": len(lines) + 1, "wall_s": seconds, "error": error, **held(device)})
    ms = 1e3 * statistics.median(line["wall_s"] for line in lines) / (job.clients * job.steps)
    found = {
        "ceiling_tflops": [*tops, ceiling(device) / 1e12],
        "base_gib": bench.base_bytes / GIB,
        "ms": ms,
        "tflops": bench.step_flops(job) / ms / 1e9,
        "peak_gib": max(line["peak_gib"] for line in lines),
        # Against the second: the first makes what stays.
        "growth_gib": lines[-1]["held_gib"] - lines[min(1, len(lines) - 1)]["held_gib"],
        "error": error,
    }
    show_memory(write("memory", options, about, found, lines))
    return int(bool(error))


def held(device: torch.device) -> dict[str, float]:
    """Return the memory that is held after a round, its peak, and what the allocator keeps; on a CPU the process's."""
    if device.type == "cuda":
        peak, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return {"peak_gib": peak / GIB, "held_gib": now / GIB, "reserved_gib": torch.cuda.memory_reserved(device) / GIB}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gib": peak / GIB, "held_gib": peak / GIB, "reserved_gib": peak / GIB}
