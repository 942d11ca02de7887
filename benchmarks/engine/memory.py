"""The memory of a pack of a large model over many rounds, with a plain or a quantised base.

A base has a process of its own, so that it finds nothing of another's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import psutil
import torch

from benchmarks.engine.packed import Packed
from benchmarks.engine.report import show_memory, write
from benchmarks.engine.timing import GIB, Budget, attempt, ceiling, machine, synchronize
from benchmarks.engine.ways import Bench
from fedlora.quantisation import base_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.set_defaults(shape="llama-2-7b")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--clients", type=int, default=32, help="clients of the pack")
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument("--rounds", type=int, default=50, help="rounds, one after another, unless the time ends before")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Train rounds; return the exit code: 1 where one failed."""
    budget, about, top = Budget(options.budget_s), machine(device), ceiling(device) / 1e12
    started = time.perf_counter()
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)
    loaded = {"ceiling_tflops": [top], "loaded": held(device), "load_s": time.perf_counter() - started}
    packed = bench.packed()
    loaded["settle_s"] = time.perf_counter() - started - loaded["load_s"]
    loaded |= {"base_gib": bench.base_bytes / GIB, "base_gib_predicted": predicted(packed, options, bench)}
    job = bench.job(options.clients, options.steps, options.rows, options.tokens)
    lines: list[dict[str, Any]] = []
    whole: dict[str, Any] = {}
    for number in range(1, options.rounds + 1):
        if lines and (lines[-1]["error"] or budget.over):
            break
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        losses: list[float] = []
        synchronize(device)
        started = time.perf_counter()
        error = attempt(lambda losses=losses: losses.extend(packed.round(job)))  # type: ignore[misc]
        synchronize(device)
        line = {"round": number, "wall_s": time.perf_counter() - started, "error": error, **held(device)}
        lines.append({**line, "loss": statistics.mean(losses) if losses else None})
        whole = write("memory", options, about, loaded | _summary(bench, job, lines), lines)
    show_memory(whole)
    return int(bool(whole["error"]))


def predicted(packed: Packed, options: argparse.Namespace, bench: Bench) -> float:
    """Return what ``fedlora plan`` says that the base takes, in GiB."""
    structure, dtype = packed.engine.base.structure, str(bench.dtype).removeprefix("torch.")
    return base_bytes(structure.num_parameters, structure.num_quantisable, options.quantization, dtype) / GIB


def _summary(bench: Bench, job: Any, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rounds came to; the first makes what stays, and is not timed where there are others."""
    warm = lines[1:] or lines
    ms = [1e3 * line["wall_s"] / (job.clients * job.steps) for line in warm]
    median = statistics.median(ms)
    return {
        "rounds": len(lines),
        "ms": median,
        "ms_min": min(ms),
        "ms_max": max(ms),
        "tflops": bench.step_flops(job) / median / 1e9,
        "peak_gib": max(line["peak_gib"] for line in lines),
        "growth_gib": warm[-1]["held_gib"] - warm[0]["held_gib"],
        "error": lines[-1]["error"],
    }


def held(device: torch.device) -> dict[str, float]:
    """Return the memory that is held, its peak, and what the allocator keeps; on a CPU the process's."""
    if device.type == "cuda":
        peak, now = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return {"peak_gib": peak / GIB, "held_gib": now / GIB, "reserved_gib": torch.cuda.memory_reserved(device) / GIB}
    now = psutil.Process().memory_info().rss
    return {"peak_gib": now / GIB, "held_gib": now / GIB, "reserved_gib": now / GIB}
