"""The table of the engine: a client-step by way, method, clients and steps a round."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.engine.checks import check
from benchmarks.engine.packed import METHODS
from benchmarks.engine.report import show, write
from benchmarks.engine.timing import Budget, Comparison, Measured, Way, ceiling, machine
from benchmarks.engine.ways import BASELINES, LORA, PRIVATE, Bench, Kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--clients", type=numbers, default=[16, 64], help="clients of a pack, with commas between")
    parser.add_argument("--steps", type=numbers, default=[4, 20], help="steps a round, with commas between")
    parser.add_argument("--methods", type=methods, default=["lora"], help=", ".join(METHODS))
    parser.add_argument("--dp", action="store_true", help="measure DP-SGD, too")
    parser.add_argument("--ragged-ranks", action="store_true", help="measure LoRA of unlike ranks, too")
    parser.add_argument("--baselines", type=baselines, default=["eager", "graph"], help=", ".join(BASELINES))


def numbers(text: str) -> list[int]:
    """Return numbers with commas between."""
    return [int(part) for part in text.split(",")]


def _names(text: str, known: tuple[str, ...]) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    unknown = sorted({*found} - {*known})
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
    return found


def baselines(text: str) -> list[str]:
    """Return names of baselines with commas between; none where it is empty."""
    return _names(text, BASELINES)


def methods(text: str) -> list[str]:
    """Return names of methods with commas between."""
    return _names(text, METHODS)


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure; return the exit code: 1 where losses differ."""
    budget = Budget(options.budget_s)
    about = machine(device)
    found: dict[str, Any] = {"ceiling_tflops": [ceiling(device) / 1e12], "checks": []}
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)

    def written(measured: list[Measured]) -> dict[str, Any]:
        return write("train", options, about, found, as_lines(bench, measured, device))

    kinds = _kinds(options)
    comparison = Comparison(_ways(bench, options, kinds), budget, device, bench.base_bytes, written)
    comparison.first()
    job = bench.job(max(options.clients), options.steps[0], options.rows, options.tokens)
    others = [name for name in options.baselines if name != "as-shipped"]
    for kind in kinds:
        found["checks"] += check(bench, job, kind, others, budget)
        written(comparison.measured)
    measured = comparison.repeat(options.repeats - 1)
    found["ceiling_tflops"].append(ceiling(device) / 1e12)
    return show(written(measured))


def _kinds(options: argparse.Namespace) -> list[Kind]:
    """Return what packs train, what matters most first."""
    kinds = [Kind(method, dp) for dp in ([False, True] if options.dp else [False]) for method in options.methods]
    kinds += [Kind(ragged=True)] if options.ragged_ranks else []
    return sorted(kinds, key=lambda kind: (kind.method != LORA.method, kind.ragged, kind.dp))


def _ways(bench: Bench, options: argparse.Namespace, kinds: list[Kind]) -> list[Way]:
    """Return the ways, what matters most first: LoRA, what it is compared with, then the rest, in short rounds only."""
    jobs = [bench.job(k, steps, options.rows, options.tokens) for steps in options.steps for k in options.clients]
    first = jobs[: len(options.clients)]
    longest = jobs[len(options.clients) - 1 :: len(options.clients)]  # of each number of steps that with most clients
    main = [kind for kind in kinds if kind in (LORA, LORA._replace(dp=True))]
    rest = [kind for kind in kinds if kind not in main]
    named = [name for name in BASELINES if name in options.baselines]
    ways = [bench.ours(job, LORA) for job in jobs if LORA in main]
    ways += [bench.baseline(name, job) for name in named if name in ("eager", "graph") for job in longest]
    ways += [bench.ours(job, kind) for kind in main if kind != LORA for job in jobs]
    ways += [bench.baseline(name, first[-1]) for name in named if name in PRIVATE]
    ways += [bench.ours(job, kind) for kind in rest if not kind.dp for job in first]
    ways += [bench.baseline(name, job) for name in named if name == "compile" for job in longest]
    ways += [bench.baseline(name, first[-1]) for name in named if name == "as-shipped"]
    return ways + [bench.ours(job, kind) for kind in rest if kind.dp for job in first]


def as_lines(bench: Bench, measured: list[Measured], device: torch.device) -> list[dict[str, Any]]:
    """Return what was measured as lines of a table; ratios to baselines of the same number of steps."""
    cpu = device.type == "cpu"
    medians = {
        (one.way.facts["steps"], one.way.name): one.ms(cpu=cpu)[0]
        for one in measured
        if one.way.name != "fedlora" and one.seconds
    }
    lines = []
    for one in measured:
        line: dict[str, Any] = {**one.way.facts, "repeats": len(one.seconds), "error": one.error}
        if one.seconds:
            median, least, most = one.ms(cpu=cpu)
            job = bench.job(line["clients"], line["steps"], line["rows"], line["tokens"])
            line |= {"ms": median, "ms_min": least, "ms_max": most, "wall_s": one.seconds, "cpu_s": one.cpu_seconds}
            line |= {"tflops": bench.step_flops(job) / median / 1e9, "peak_gib": one.peak_bytes / 2**30}
            line["times"] = {
                name: other / median
                for (steps, name), other in medians.items()
                if steps == line["steps"] and name != one.way.name
            }
        lines.append(line)
    return lines
