"""Clients of unequal size and texts of unequal length: the share of the computed tokens that are real ones."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine.packed import Packed
from benchmarks.engine.report import show, write
from benchmarks.engine.shapes import CLASSES, LEAST_TOKEN, useful_flops
from benchmarks.engine.timing import Budget, Way, ceiling, machine, measure
from benchmarks.engine.ways import Bench, Kind
from fedlora.config import TrainConfig
from fedlora.engine import ClientWork, Engine, plan_batches
from fedlora.engine.blocks import blocks_of
from fedlora.seeded import Seeded
from fedlora.tasks import Examples

_SPREAD = 10  # the largest client has so many times the rows of the smallest
_MEDIAN, _SIGMA = 24.0, 0.7  # of the lengths, log-normal: those of sentences and short texts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this command reads."""
    parser.add_argument("--clients", type=int, default=64, help="clients of the pack")
    parser.add_argument("--mean-rows", type=int, default=32, help="rows of a client, on average; one epoch a round")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--shortest", type=int, default=5, help="tokens of a row at least")
    parser.add_argument("--longest", type=int, default=128, help="tokens of a row at most")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet distribution of clients' sizes")
    parser.add_argument("--dp", action="store_true", help="under DP-SGD, with batches of fixed size")


def sizes_of(clients: int, mean_rows: int, alpha: float) -> NDArray[np.int64]:
    """Return rows of each client: Dirichlet shares, cut so that the largest is ten times the smallest."""
    shares = np.random.default_rng(5).dirichlet([alpha] * clients) * clients * mean_rows
    least = np.median(shares) / _SPREAD**0.5
    return np.rint(np.clip(shares, max(1.0, least), max(1.0, least) * _SPREAD)).astype(np.int64)


def lengths_of(count: int, seed: int, shortest: int, longest: int) -> NDArray[np.int64]:
    """Return lengths of texts."""
    drawn = np.random.default_rng([11, seed]).lognormal(np.log(_MEDIAN), _SIGMA, count)
    return np.clip(np.rint(drawn), shortest, longest).astype(np.int64)


def work_of(bench: Bench, packed: Packed, client: int, lengths: NDArray[np.int64], train: TrainConfig) -> ClientWork:
    """Return what a client with rows of these lengths does: one epoch."""
    generator = np.random.default_rng([13, client])
    tokens = tuple(generator.integers(LEAST_TOKEN, int(bench.model.config.vocab_size), n) for n in lengths)
    targets: Any = generator.integers(0, CLASSES, len(lengths))
    if bench.shape.causal:
        targets = tuple(np.arange(n) >= 1 for n in lengths)
    batches = plan_batches(Seeded(0), 1, client, np.arange(len(lengths)), train)
    return ClientWork(client, Examples(tokens, targets), len(lengths), batches, packed.starts[-1])


@contextmanager
def counted(engine: Engine) -> Iterator[list[int]]:
    """Count the tokens that go through a model's last block, padding included."""
    count: list[int] = []
    block = blocks_of(engine)[-1]
    handle = block.register_forward_pre_hook(lambda _module, inputs: count.append(math.prod(inputs[0].shape[:-1])))
    try:
        yield count
    finally:
        handle.remove()


def run(options: argparse.Namespace, device: torch.device) -> int:
    """Measure uneven clients, and equal ones with as many steps and tokens."""
    budget, about, tops = Budget(options.budget_s), machine(device), [ceiling(device) / 1e12]
    bench = Bench(options.shape, options.rank, device, options.visits, options.dtype, options.quantization)
    packed = bench.packed(Kind(dp=options.dp))
    train = TrainConfig(batch_size=options.rows, learning_rate=1e-3)
    rows = sizes_of(options.clients, options.mean_rows, options.alpha)
    lengths = [lengths_of(n, client, options.shortest, options.longest) for client, n in enumerate(rows)]
    uneven = [work_of(bench, packed, client, own, train) for client, own in enumerate(lengths)]
    steps = max(1, round(np.mean([len(work.batches) for work in uneven])))
    mean = round(float(np.mean(np.concatenate(lengths))))
    alike = np.full(steps * options.rows, mean)
    equal = [work_of(bench, packed, client, alike, train) for client in range(options.clients)]
    ways: list[Way] = []
    facts: list[dict[str, Any]] = []
    for name, works in (("uneven clients", uneven), ("equal clients", equal)):
        with counted(packed.engine) as through:
            packed.train(works, train)
        real = int(sum(work.examples.cost[batch].sum() for work in works for batch in work.batches))
        client_steps = sum(len(work.batches) for work in works)
        fact: dict[str, Any] = {"clients": len(works), "client_steps": client_steps, "tokens_real": real}
        costs, counts = np.unique(np.concatenate([work.examples.cost for work in works]), return_counts=True)
        flops = [
            useful_flops(bench.shape, bench.model, int(n)) * n * count for n, count in zip(costs, counts, strict=True)
        ]
        computed = sum(through)
        if computed >= real:  # fewer are seen where a captured graph runs in place of the modules
            fact |= {"tokens_computed": computed, "useful": real / computed}
        facts.append({**fact, "flops": float(sum(flops))})
        ways.append(Way(name, lambda works=works: lambda: packed.train(works, train), client_steps, {"way": name}))  # type: ignore[misc]
    lines = []
    for one, fact in zip(measure(ways, options.repeats, budget, device, bench.base_bytes), facts, strict=True):
        line: dict[str, Any] = {**one.way.facts, **fact, "repeats": len(one.seconds), "error": one.error}
        if one.seconds:
            median, least, most = one.ms(cpu=device.type == "cpu")
            line |= {"ms": median, "ms_min": least, "ms_max": most, "wall_s": one.seconds, "cpu_s": one.cpu_seconds}
            line |= {"us_a_token": 1e3 * median * fact["client_steps"] / fact["tokens_real"]}
            line |= {"tflops": fact["flops"] / median / fact["client_steps"] / 1e9, "peak_gib": one.peak_bytes / 2**30}
        lines.append(line)
    sizes = {"rows_least": int(rows.min()), "rows_most": int(rows.max()), "mean_length": mean}
    whole = write("uneven", options, about, {"ceiling_tflops": [*tops, ceiling(device) / 1e12], **sizes}, lines)
    return show(whole)
