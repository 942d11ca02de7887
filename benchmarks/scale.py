"""Many clients on one machine: seconds and memory a round, against Flower's own way (one message a client, FedAvg).

    python -m benchmarks.scale --clients 10000 --sampled 1000 --rounds 10

Both sides train the same tiny BERT with LoRA of rank 2 on the same number of rows: each sampled client takes one AdamW
step on 4 rows a round, and next to nothing is evaluated. Flower's way is measured twice: with the model made for
every message, as its language model examples do, and at its best, with the model kept by each worker process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from simulations.keeper import end_processes
from simulations.superlink import flower_environment
from tests.support.tiny import save_texts, save_tiny_model

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


class Memory(threading.Thread):
    """Watches the resident memory of a process and its descendants, by the processes' own commands."""

    def __init__(self, mark: str) -> None:
        super().__init__(daemon=True)
        self.mark = mark
        self.samples: list[tuple[float, float]] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Sample until it is stopped."""
        while not self.over.wait(1.0):
            total = 0
            for process in psutil.process_iter():
                try:
                    if process.environ().get("FEDLORA_BENCH") == self.mark:
                        total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.samples.append((time.time(), total))

    def between(self, start: float, end: float) -> float:
        """Return the largest total of a span of time, in bytes."""
        return max((total for at, total in self.samples if start <= at <= end), default=0.0)


def report(name: str, ends: list[float], sampled: int, memory: Memory) -> float:
    """Print what the rounds took; return the median seconds a client and round."""
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    per_client = statistics.median(seconds) / sampled
    first, last = memory.between(ends[0], ends[1]), memory.between(ends[-2] - 1, ends[-1] + 1)
    print(
        f"{name}: {statistics.median(seconds):.2f} s a round (min {min(seconds):.2f}, max {max(seconds):.2f}, "
        f"{len(seconds)} rounds after the first), {1e3 * per_client:.2f} ms a client; all processes hold "
        f"{first / 1e9:.2f} GB in round 2 and {last / 1e9:.2f} GB in the last",
        flush=True,
    )
    return per_client


def ours(folder: Path, options: argparse.Namespace, data: dict[str, Any]) -> float:
    """Measure ``fedlora run``."""
    flat = {
        **data,
        "data.name": "file",
        "data.partition": "iid",
        "federation.num-clients": options.clients,
        "federation.clients-per-round": options.sampled,
        "strategy.name": "fedavg",
        "method.rank": 2,
        "train.batch-size": 4,
        "train.local-steps": 1,
        "rounds": options.rounds,
        "run.dir": str(folder),
        "run.name": "ours",
    }
    file = folder / "ours.toml"
    file.write_text(to_toml(flat))
    memory = Memory("ours")
    memory.start()
    done = subprocess.run(
        [str(BIN / "fedlora"), "run", "-c", str(file)],
        cwd=ROOT,
        env={**os.environ, "FEDLORA_BENCH": "ours"},
        capture_output=True,
        text=True,
        check=False,
    )
    memory.over.set()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = read_lines(folder / "ours" / "metrics.jsonl")
    assert all(line["clients_ok"] == options.sampled for line in lines), "clients were refused"
    # The adapter is written right after the last round.
    end = (folder / "ours" / "adapter" / "adapter_config.json").stat().st_mtime
    ends = [end]
    for line in reversed(lines[1:]):
        ends.insert(0, ends[0] - line["seconds"])
    return report("fedlora", ends, options.sampled, memory)


def flower(folder: Path, options: argparse.Namespace, data: dict[str, Any], *, cached: bool) -> float:
    """Measure Flower's own way."""
    name = "flower at its best" if cached else "flower as shipped"
    home = folder / name.replace(" ", "-")
    home.mkdir()
    times, rounds = home / "times.jsonl", options.rounds if cached else min(options.rounds, 3)
    flat = {
        "model": data["model.name"],
        "data": data["data.path"],
        "rounds": rounds,
        "clients-per-round": options.sampled,
        "cached": cached,
        "times": str(times),
    }
    (home / "config-of-run.toml").write_text(to_toml(flat))
    environment = {**flower_environment(home), "FEDLORA_BENCH": name}
    memory = Memory(name)
    memory.start()
    nodes = f"num-supernodes={options.clients} client-resources-num-cpus=1"
    command = ["run", str(ROOT / "benchmarks" / "flower_way"), "--stream"]
    command += ["--run-config", str(home / "config-of-run.toml"), "--federation-config", nodes]
    try:
        done = subprocess.run(
            [str(BIN / "flwr"), *command], env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
    finally:
        end_processes(home)
        memory.over.set()
    assert times.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    lines = read_lines(times)
    assert len(lines) == rounds + 1, done.stdout[-3000:]
    failures = done.stdout.count("Received error")
    assert not failures, f"{failures} clients failed"
    return report(name, [line["time_s"] for line in lines[1:]], options.sampled, memory)


def main() -> None:
    """Measure both sides in one run, and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--sampled", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--flower-clients", type=int, help="clients of Flower's side, where all are too many for it")
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    print(f"{options.clients} clients, {options.sampled} a round, {options.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = save_texts(folder / "texts.csv", rows=4 * options.clients)
        few = save_texts(folder / "few.csv", rows=20)  # that a round is measured on: Flower's side measures nothing
        data = {"model.name": save_tiny_model(folder / "model"), "data.path": texts, "data.test-path": few}
        fast = ours(folder, options, data)
        if options.flower_clients:
            print(f"Flower's side with {options.flower_clients} clients", flush=True)
            options.sampled = min(options.sampled, options.flower_clients)
            options.clients = options.flower_clients
        for cached in (True, False):
            slow = flower(folder, options, data, cached=cached)
            print(f"  {slow / fast:.1f} times the seconds a client of fedlora", flush=True)


if __name__ == "__main__":
    main()
