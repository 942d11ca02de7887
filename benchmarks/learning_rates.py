"""Which learning rate suits which strategy, method, optimizer and task, and how much noise DP-SGD learns through.

    python -m benchmarks.learning_rates rates train.tsv --workers 8
    python -m benchmarks.learning_rates noise train.tsv --workers 8

Each line of ``benchmarks/results/learning-rates.csv`` and ``signal-to-noise.csv`` is one run in this process's
federation (:mod:`simulations.in_process`), measured on dev rows, or for personal models on the rows that clients hold
out; test rows are not read. ``train.tsv`` is SST-2 as released by Socher et al. (2013); the other data set of
``rates`` is the built-in one, as classes and for a language model. For a GPU: about 25 GPU minutes. Lines that
are there already are not measured again. ``make tables`` makes of them what ``simulations/rates.py`` holds, and
``docs/learning_rates.md``.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import replace
from functools import cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress

from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.messages import first_line
from fedlora.server import FederationError
from simulations.in_process import Resident
from simulations.plan import trained_in_a_round
from simulations.privacy import PrivacyPlan
from simulations.setup import resolve, settle

RESULTS = Path(__file__).parent / "results"
PAIRS = (
    *(("lora", name) for name in ("fedavg", "ffa-lora", "rolora", "fedsvd", "flora", "fedsa-lora", "local")),
    *(("mos", name) for name in ("mos", "ffa-lora", "rolora", "fedsa-lora", "mos-personal", "local")),
    *(("s2-lora", name) for name in ("s2-lora", "s2-frozen", "s2-cyclic", "s2-personal", "local")),
)
RATES = {
    ("adamw", "none"): (0.0003, 0.001, 0.003, 0.01, 0.03),
    ("sgd", "none"): (0.03, 0.1, 0.3, 1.0, 3.0),
    ("adamw", "dp"): (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
    ("sgd", "dp"): (0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0),
}
COMMON = {
    "data.dev-share": 0.1,
    "data.holdout": 0.2,
    "data.partition": "iid",
    "eval.test": False,
    "federation.num-clients": 10,
    "rounds": 12,
    "train.local-steps": 10,
    "train.batch-size": 16,
    "train.max-length": 48,
    "mos.budget": 2,
    "method.rank": 6,
}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"data.header": False, "data.text-column": "0", "data.label-column": "1", "data.classes": "0,1"},
    "docstrings": {},
    "language": {"task": "causal-lm", "model.name": "small-llama", "train.max-length": 64, "method.rank": 4},
}
DISTINGUISHED = {
    "data": "data",
    "method": "method.name",
    "strategy": "strategy.name",
    "optimizer": "train.optimizer",
    "rounds": "rounds",
    "steps": "train.local-steps",
    "batch": "train.batch-size",
    "clients": "federation.num-clients",
    "rate": "train.learning-rate",
}
KEY = (*DISTINGUISHED, "epsilon")
# Rounds, steps a round, batch size, clients, epsilon.
SCHEDULES = (
    *((12, 10, 64, 10, epsilon) for epsilon in (1.0, 3.0, 8.0, 32.0)),
    *((12, 10, 16, 10, epsilon) for epsilon in (3.0, 8.0)),
    *((3, 70, 8, 10, epsilon) for epsilon in (8.0, 32.0)),
    *((5, 4, 256, 10, epsilon) for epsilon in (3.0, 8.0)),
    *((10, 4, 256, 10, epsilon) for epsilon in (3.0, 8.0)),
    *((20, 4, 256, 10, epsilon) for epsilon in (1.0, 3.0)),
    *((12, 10, 16, 40, epsilon) for epsilon in (3.0, 8.0)),
    *((12, 40, 16, 10, epsilon) for epsilon in (3.0, 8.0)),
)


def rates(path: str) -> Iterator[dict[str, Any]]:
    """Yield the configurations of the search for learning rates."""
    for (optimizer, privacy), values in RATES.items():
        for task, own in TASKS.items():
            if task != "sst2" and (privacy == "dp" or (optimizer, task) == ("sgd", "docstrings")):
                continue  # too few rows for a signal, and for a language model too small a one
            for method, strategy in PAIRS:
                for rate in values:
                    flat = COMMON | own | ({"data.path": path} if task == "sst2" else {})
                    flat |= {"method.name": method, "strategy.name": strategy, "train.optimizer": optimizer}
                    if privacy == "dp":
                        flat |= {
                            "privacy.mode": "dp",
                            "privacy.epsilon": 8.0,
                            "train.batch-size": 64,
                            "privacy.seed": 1,
                        }
                    if (
                        privacy == "dp" or optimizer == "sgd"
                    ):  # whose rates are so large that s2.sparsity leaves nothing
                        flat |= {"s2.sparsity": 0.0}
                    yield flat | {"train.learning-rate": rate, "data": task}


def noise(path: str) -> Iterator[dict[str, Any]]:
    """Yield the configurations that show how much noise still lets a run learn."""
    for rounds, steps, batch, clients, epsilon in SCHEDULES:
        for method, strategy in (("lora", "fedavg"), ("lora", "ffa-lora"), ("s2-lora", "s2-lora")):
            for optimizer, values in (("sgd", (0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)), ("adamw", (0.001, 0.003))):
                for rate in values:
                    yield COMMON | TASKS["sst2"] | {
                        "data.path": path, "data": "sst2", "data.holdout": 0.0, "s2.sparsity": 0.0,
                        "rounds": rounds, "train.local-steps": steps, "train.batch-size": batch,
                        "federation.num-clients": clients, "privacy.mode": "dp", "privacy.epsilon": epsilon,
                        "privacy.seed": 1, "method.name": method, "strategy.name": strategy,
                        "train.optimizer": optimizer, "train.learning-rate": rate,
                    }  # fmt: skip


def _take_gpu(numbers: Any) -> None:
    """Have this process compute on a GPU of its own, or share one, where there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(numbers.get() % torch.cuda.device_count())


@cache
def _resident() -> Resident:
    """Return this process's worker."""
    return Resident(1)


@cache
def _settled(items: tuple[tuple[str, Any], ...]) -> tuple[Config, FederatedData]:
    """Return a configuration and its data but for learning rate and optimizer, on which neither depends."""
    keys = dict(items)
    data = {key: value for key, value in keys.items() if key.startswith(("data.", "federation.", "eval.", "task"))}
    return settle(resolve(keys), 2, _data(tuple(data.items())))


@cache
def _data(items: tuple[tuple[str, Any], ...]) -> FederatedData:
    """Return the data that these keys name."""
    return settle(resolve(dict(items)), 2)[1]


def run(flat: dict[str, Any]) -> dict[str, Any]:
    """Run a configuration, and return what distinguishes it with what it came to."""
    started = time.monotonic()
    own = ("data", "train.learning-rate", "train.optimizer")
    config, data = _settled(tuple((key, value) for key, value in flat.items() if key not in own))
    train = replace(config.train, learning_rate=flat["train.learning-rate"], optimizer=flat["train.optimizer"])
    config = replace(config, train=train)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        federation = _resident().federation(config, data, folder)
        trained = trained_in_a_round(federation.core.strategy)
        try:
            for number in range(1, config.rounds + 1):
                federation.train(number)
            found |= federation.measure(config.rounds)
        except FederationError as error:  # numbers that are not finite: the rate is too large
            found["error"] = first_line(error)
    plan = PrivacyPlan(config, trained) if config.privacy.mode == "dp" else None
    return {
        **{name: flat[key] for name, key in DISTINGUISHED.items()},
        "epsilon": config.privacy.epsilon,
        "trained": trained,
        "noise_multiplier": config.privacy.noise_multiplier,
        "signal_to_noise": plan.signal_to_noise(plan.steps) if plan else "",
        **{name: found.get(name, "") for name in ("accuracy", "loss", "error")},
        "seconds": round(time.monotonic() - started, 2),
    }


def measure(configurations: list[dict[str, Any]], file: Path, workers: int, seconds: float) -> None:
    """Run what has no line in a file yet, side by side, and append a line for each run."""
    before = pd.read_csv(file, keep_default_na=False).astype(str).to_dict("records") if file.is_file() else []
    known = {tuple(line[name] for name in KEY) for line in before}
    missing = [one for one in configurations if _key(one) not in known]
    end, context = time.monotonic() + seconds, get_context("spawn")
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    with (
        ProcessPoolExecutor(workers, context, _take_gpu, (numbers,)) as pool,
        file.open("a", encoding="utf-8", newline="") as out,
    ):
        writer: csv.DictWriter[str] | None = None
        waiting = iter(missing)
        running = {pool.submit(run, one) for one in islice(waiting, workers)}
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task(file.name, total=len(missing))
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for line in (future.result() for future in done):
                    writer = writer or csv.DictWriter(out, list(line))
                    if out.tell() == 0:
                        writer.writeheader()
                    writer.writerow(line)
                    out.flush()
                    progress.advance(bar)
                if time.monotonic() < end:
                    running |= {pool.submit(run, one) for one in islice(waiting, len(done))}


def _key(flat: dict[str, Any]) -> tuple[str, ...]:
    """Return what a line of the file is known by."""
    return tuple(str(flat.get(DISTINGUISHED.get(name, "privacy.epsilon"), 0.0)) for name in KEY)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("rates", "noise"))
    parser.add_argument("path")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after so many seconds")
    options = parser.parse_args()
    path = str(Path(options.path).resolve())
    what, name = (rates, "learning-rates") if options.what == "rates" else (noise, "signal-to-noise")
    measure(list(what(path)), options.out / f"{name}.csv", options.workers, options.seconds)


if __name__ == "__main__":
    main()
