"""Loss curves of the packed engine in bfloat16 beside float32, and beside PEFT's in both."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.engine.jobs import Job
from benchmarks.engine.report import show_curves, write
from benchmarks.engine.timing import attempt, ceiling, free, machine
from benchmarks.engine.train import numbers
from benchmarks.engine.ways import Bench

WAYS = ("fedlora", "eager")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.add_argument("--rows", type=int, default=8, help="rows of a step, the same in each")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--clients", type=int, default=4, help="clients of the pack")
    parser.add_argument("--steps", type=numbers, default=[1, 2, 5, 10, 20, 30, 40, 50], help="lengths of the round")
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Train rounds of growing length; return the exit code: 1 where a way failed."""
    about, top = machine(device), ceiling(device) / 1e12
    lines: list[dict[str, Any]] = []
    exact = Bench(options.shape, options.rank, device, options.visits, "float32")
    for dtype in ("float32", "bfloat16"):
        bench = exact if dtype == "float32" else Bench(options.shape, options.rank, device, options.visits, dtype)
        with torch.no_grad():  # the same model, rounded
            for own, other in zip(bench.model.parameters(), exact.model.parameters(), strict=True):
                own.copy_(other)
        whole = bench.job(options.clients, 1, options.rows, options.tokens)
        for way in WAYS:
            line: dict[str, Any] = {"way": way, "dtype": dtype, "steps": [], "losses": []}
            line["error"] = attempt(partial(_curve, bench, way, whole, options, line))
            lines.append(line)
            _compare(lines)
            written = write("curves", options, about, {"ceiling_tflops": [top]}, lines)
        free()
    show_curves(written)
    return int(any(line["error"] for line in lines))


def _compare(lines: list[dict[str, Any]]) -> None:
    """Fill in how far each line's losses are from PEFT's in float32, which is the second."""
    reference = lines[1]["losses"] if len(lines) > 1 else []
    for line in lines:
        both = zip(line["losses"], reference, strict=False)
        line["off"] = [float(np.abs(np.subtract(own, other)).max()) for own, other in both]


def _curve(bench: Bench, way: str, job: Job, options: argparse.Namespace, line: dict[str, Any]) -> None:
    """Fill a line with each client's mean loss over rounds of each length."""
    for steps in options.steps:
        own = replace(job, steps=steps, repeated=True, rate=options.rate)
        losses = bench.packed().round(own) if way == "fedlora" else bench.sequential(way, own).round(own, own.clients)
        line["steps"].append(steps)
        line["losses"].append(losses.tolist())
