"""The table by tokens a client-step, from 16 to 8,192: where packing pays, and where it does not."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.engine.checks import check
from benchmarks.engine.report import show, write
from benchmarks.engine.timing import Budget, ceiling, machine, measure
from benchmarks.engine.train import as_lines, baselines, numbers
from benchmarks.engine.ways import LORA, Bench

_LEAST_CLIENTS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    sizes = [16, 64, 256, 1024, 2048, 4096, 8192]
    parser.add_argument("--sizes", type=numbers, default=sizes, help="tokens a client-step, with commas between")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, where a step has so many")
    parser.add_argument("--pack-tokens", type=int, default=32768, help="tokens of a step of all clients, about")
    parser.add_argument("--most-clients", type=int, default=256, help="clients of a pack at most")
    parser.add_argument("--steps", type=int, default=4, help="steps a round")
    parser.add_argument("--baselines", type=baselines, default=["eager", "graph"], help="what packs are compared with")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure; return the exit code: 1 where losses differ."""
    budget, about = Budget(options.budget_s), machine(device)
    tops = [ceiling(device) / 1e12]
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)
    lines: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for size in options.sizes:
        tokens = min(options.length, size)
        clients = max(_LEAST_CLIENTS, min(options.most_clients, options.pack_tokens // size))
        job = bench.job(clients, options.steps, size // tokens, tokens)
        checks += check(bench, job, LORA, options.baselines, budget)
        ways = [*(bench.baseline(name, job) for name in options.baselines), bench.ours(job)]
        measured = measure(ways, options.repeats, budget, device, bench.base_bytes)
        lines += [{**line, "size": size} for line in as_lines(bench, measured, device)]
        del ways, measured
        bench.forget()  # the graph of this size
        found = {"ceiling_tflops": [*tops, ceiling(device) / 1e12], "checks": checks}
        whole = write("regimes", options, about, found, lines)
    return show(whole)
