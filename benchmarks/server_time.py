"""What the server takes for a round under each strategy: what it sends, the reduction of updates, the strategy's rule.

    python -m benchmarks.server_time

The strategies of ``simulations/sweeps/comparison.toml``, each as it stands there, in this process: MiniLM, eight
clients, 15 rounds, in which what some of them send has grown to its largest. Clients train one step of two rows; they
are not in the times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from fedlora.reduce import fold
from simulations.in_process import InProcess, Resident
from simulations.options import read_overrides
from simulations.setup import settle
from simulations.sweeps.file import Sweep

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "server-time.json"
_LAST = 4  # rounds, whose median is shown
_SHORT = {"train.local-steps": 1, "train.batch-size": 2, "train.max-length": 16, "engine.dtype": "float32"}


def main() -> None:
    """Measure, print, and write ``benchmarks/results/server-time.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each strategy")
    parser.add_argument("--threads", type=int, default=1, help="of the server")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sweep = Sweep.read(
        str(ROOT / "simulations" / "sweeps" / "comparison.toml"),
        read_overrides(ROOT, []),
        {**_SHORT, "rounds": options.rounds},
    )
    resident = Resident(os.cpu_count() or 1)
    found: dict[str, Any] = {
        "command": "python -m benchmarks.server_time",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}",
        "versions": {name: version(name) for name in ("numpy", "torch")},
        "threads": options.threads,
        "lines": [],
    }
    for group in sweep.groups():
        config, data = settle(sweep.tuning(group)[0].config, 0)
        with tempfile.TemporaryDirectory() as folder:
            seconds = measured(resident.federation(config, data, folder), options.rounds, options.threads)
        ms = 1e3 * statistics.median(seconds[-_LAST:])
        found["lines"].append({"strategy": group["strategy"], "ms": ms, "seconds": seconds})
        print(f"{group['strategy']:20} {ms:8.1f} ms a round", flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(federation: InProcess, rounds: int, threads: int) -> list[float]:
    """Return the seconds of the server in each round."""
    core, seconds = federation.core, []
    for number in range(1, rounds + 1):
        with threadpool_limits(threads):
            began = time.perf_counter()
            told = core.instruction(number, core.federation.cohort(number))
            instructing = time.perf_counter() - began
        updates = federation.released(number)
        with threadpool_limits(threads):
            began = time.perf_counter()
            _, total = fold(told, iter(updates))
            core.apply(number, total, told.clients)
            seconds.append(instructing + time.perf_counter() - began)
    return seconds


if __name__ == "__main__":
    main()
