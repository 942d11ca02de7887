"""Where the time of a packed round goes: device time by kind of work, and idle time."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity

from benchmarks.engine.families import FAMILIES, busy_us, family
from benchmarks.engine.packed import METHODS
from benchmarks.engine.report import show_profile, write
from benchmarks.engine.timing import ceiling, machine, synchronize
from benchmarks.engine.ways import Bench, Kind

IDLE = "idle"
_MOST_KERNELS = 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a row")
    parser.add_argument("--clients", type=int, default=64, help="clients of the pack")
    parser.add_argument("--steps", type=int, default=4, help="steps of the round")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--dp", action="store_true", help="under DP-SGD")
    parser.add_argument("--ragged-ranks", action="store_true", help="with unlike ranks")


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Profile a round and print it."""
    about = machine(device)
    tops = [ceiling(device) / 1e12]
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)
    job = bench.job(options.clients, options.steps, options.rows, options.tokens)
    packed = bench.packed(Kind(options.method, options.dp, options.ragged_ranks))
    packed.round(job)
    seconds = []
    for _ in range(options.repeats):
        synchronize(device)
        started = time.perf_counter()
        packed.round(job)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    wall_us = 1e6 * statistics.median(seconds)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        packed.round(job)
        synchronize(device)
    totals, kernels, busy = (
        _device(profiler, packed.numbers) if device.type == "cuda" else _host(profiler, packed.numbers)
    )
    idle = max(0.0, wall_us - busy)
    lines: list[dict[str, Any]] = [
        {"family": name, "ms": totals[name] / 1e3, "share": totals[name] / wall_us} for name in FAMILIES
    ]
    lines.append({"family": IDLE, "ms": idle / 1e3, "share": idle / wall_us})
    found = {
        "ceiling_tflops": tops,
        "round_s": seconds,
        "ms": wall_us / 1e3 / (job.clients * job.steps),
        "tflops": bench.step_flops(job) * job.clients * job.steps / wall_us / 1e6,
        "covered": sum(line["share"] for line in lines if line["family"] != "other"),
        "kernels": [
            {"name": name[:160], "family": kind, "ms": us / 1e3, "calls": calls} for name, kind, us, calls in kernels
        ],
    }
    whole = write("profile", options, about, found, lines)
    show_profile(whole)
    return 0


def _device(profiler: Any, numbers: int) -> tuple[dict[str, float], list[Any], float]:
    """Return device time by family, the longest kernels, and how long the device was busy; in microseconds."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    unclaimed: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spans.append((event.time_range.start, event.time_range.end))
            unclaimed[event.name].append(event.time_range.elapsed_us())
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            for kernel in event.kernels:
                kind = family(kernel.name, event.name, event.input_shapes or [], numbers)
                times[kernel.name, kind].append(kernel.duration)
                if unclaimed[kernel.name]:
                    unclaimed[kernel.name].pop()
    for name, rest in unclaimed.items():  # those of CUDA graphs, which no operation launched
        times[name, family(name, "", [], numbers)] += rest
    return (*_summed(times), busy_us(spans))


def _host(profiler: Any, numbers: int) -> tuple[dict[str, float], list[Any], float]:
    """Return the same of a CPU: each operation's own time."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.self_cpu_time_total > 0:
            kind = family(event.key, event.key, event.input_shapes or [], numbers)
            times[event.key, kind] += [event.self_cpu_time_total / event.count] * event.count
    totals, kernels = _summed(times)
    return totals, kernels, sum(totals.values())


def _summed(times: dict[tuple[str, str], list[float]]) -> tuple[dict[str, float], list[Any]]:
    totals: dict[str, float] = dict.fromkeys(FAMILIES, 0.0)
    for (_, kind), durations in times.items():
        totals[kind] += sum(durations)
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:_MOST_KERNELS]
    return totals, [(name, kind, sum(durations), len(durations)) for (name, kind), durations in longest]
