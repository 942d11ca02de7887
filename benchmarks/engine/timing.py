"""Measuring: ways in ABBA order, the ceiling of matrix products in the same run, and what machine it was."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch

Round = Callable[[], Any]
GIB = 2**30


@final
@dataclass(frozen=True)
class Way:
    """One of the ways that are compared.

    Attributes:
        name: What it is called.
        make: Prepares it, and returns what runs a round.
        client_steps: Optimizer steps of clients in a round.
        facts: What a line of the table says of it beside.
    """

    name: str
    make: Callable[[], Round]
    client_steps: int
    facts: dict[str, Any] = field(default_factory=dict)


@final
@dataclass
class Measured:
    """What came of a way.

    Attributes:
        way: The way.
        seconds: Wall time of each round.
        cpu_seconds: Time of this process on its processors.
        peak_bytes: The most device memory of a round, with the base model and without what other ways hold.
        error: Why there is nothing, or no more.
    """

    way: Way
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    error: str = ""

    def ms(self, *, cpu: bool) -> list[float]:
        """Return milliseconds a client-step: median, least, most; of CPU time on a CPU."""
        times = [1e3 * one / self.way.client_steps for one in (self.cpu_seconds if cpu else self.seconds)]
        return [statistics.median(times), min(times), max(times)] if times else []


@final
class Budget:
    """Seconds after which nothing new is started.

    Args:
        seconds: Their number; 0: any.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds if seconds else float("inf")

    @property
    def over(self) -> bool:
        """Whether they have passed."""
        return time.monotonic() > self._end


@final
class Comparison:
    """Ways in turn: each is prepared, run once to warm up and timed; then all of them, backwards and forwards (ABBA).

    A way that fails keeps the first line of its error; the others go on. What comes first is measured even where the
    time ends.

    Args:
        ways: The ways, what matters most first.
        budget: When to begin no more.
        device: Where they compute.
        base_bytes: What the base model takes.
        progress: Called whenever there is something new.
    """

    def __init__(
        self,
        ways: Sequence[Way],
        budget: Budget,
        device: torch.device,
        base_bytes: int = 0,
        progress: Callable[[list[Measured]], object] = lambda _: None,
    ) -> None:
        self.measured = [Measured(way, peak_bytes=base_bytes, error="not started: no time left") for way in ways]
        self._budget, self._device, self._progress = budget, device, progress
        self._runs: dict[int, Round] = {}
        self._memories = [Memory(device, base_bytes) for _ in ways]

    def first(self) -> None:
        """Prepare each way, run it to warm up, and time it once."""
        for number, one in enumerate(self.measured):
            if self._budget.over:
                continue
            started = time.monotonic()
            self._attempt(number, self._prepare)
            seconds = time.monotonic() - started
            if not one.error:
                self._attempt(number, self._time)
            came = one.error or f"{1e3 * one.seconds[0] / one.way.client_steps:.3f} ms a client-step"
            print(f"{_words(one.way.facts)}: {seconds:.1f} s to prepare, {came}", file=sys.stderr, flush=True)
            self._progress(self.measured)

    def repeat(self, times: int) -> list[Measured]:
        """Time all of them so many times more, backwards first; return what came of all."""
        for repeat in range(times):
            for number in sorted(self._runs, reverse=repeat % 2 == 0):
                if not self._budget.over:
                    self._attempt(number, self._time)
            self._progress(self.measured)
        return self.measured

    def _attempt(self, number: int, act: Callable[[int], None]) -> None:
        one = self.measured[number]
        self._memories[number].watch(one, lambda: act(number))
        if one.error and number in self._runs:
            del self._runs[number]
            free()

    def _prepare(self, number: int) -> None:
        self._runs[number] = self.measured[number].way.make()
        self._runs[number]()

    def _time(self, number: int) -> None:
        _timed(self.measured[number], self._runs[number], self._device)


def measure(
    ways: Sequence[Way], repeats: int, budget: Budget, device: torch.device, base_bytes: int = 0
) -> list[Measured]:
    """Return what came of each way, timed so many times; see :class:`Comparison`."""
    comparison = Comparison(ways, budget, device, base_bytes)
    comparison.first()
    return comparison.repeat(repeats - 1)


def _timed(one: Measured, run: Round, device: torch.device) -> None:
    synchronize(device)
    cpu, started = time.process_time(), time.perf_counter()
    run()
    synchronize(device)
    one.seconds.append(time.perf_counter() - started)
    one.cpu_seconds.append(time.process_time() - cpu)


@final
class Memory:
    """The device memory of a way, with the base model and without what other ways hold.

    Args:
        device: The device.
        base_bytes: What the base model takes.
    """

    def __init__(self, device: torch.device, base_bytes: int) -> None:
        self._device = device
        self._own = base_bytes

    def watch(self, one: Measured, act: Callable[[], None]) -> None:
        """Run something of a way, and note its peak, or its error."""
        cuda = self._device.type == "cuda"
        before = torch.cuda.memory_allocated(self._device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        one.error = attempt(act)
        if cuda:
            peak = torch.cuda.max_memory_allocated(self._device) - before
            one.peak_bytes = max(one.peak_bytes, self._own + peak)
            self._own += torch.cuda.memory_allocated(self._device) - before


def attempt(act: Callable[[], Any]) -> str:
    """Run something; return the first line of what went wrong, with all of it on the terminal."""
    try:
        act()
    except Exception as error:
        if not isinstance(error, torch.OutOfMemoryError | ImportError | ValueError):
            traceback.print_exc()
        text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
        if isinstance(error, torch.OutOfMemoryError):
            text = "out of memory"
    else:
        return ""
    free()
    return text


def free() -> None:
    """Give back the device memory of what is gone."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling(device: torch.device) -> float:
    """Return the floating-point operations a second of a large product of random matrices.

    8192 x 8192 x 8192 in bfloat16 on a GPU, the median of ten; on a CPU 1024 in float32, by the process's time.
    """
    cuda = device.type == "cuda"
    size, dtype, times = (8192, torch.bfloat16, 10) if cuda else (1024, torch.float32, 1)
    clock = time.perf_counter if cuda else time.process_time
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13 if cuda else 6):
        synchronize(device)
        started = clock()
        for _ in range(times):
            one @ other
        synchronize(device)
        seconds.append((clock() - started) / times)
    return 2.0 * size**3 / statistics.median(seconds[3:])  # the first warm up


def machine(device: torch.device, command: str = "benchmarks.engine") -> dict[str, Any]:
    """Return what it was measured on: command, versions, device, load.

    Args:
        device: The device.
        command: The module that runs.
    """
    versions = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "peft",
        "numpy",
        "triton",
        "opacus",
        "bitsandbytes",
        "flwr",
        "ray",
        "fedlora",
    ):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cuda = device.type == "cuda"
    return {
        "command": f"python -m {command} {shlex.join(sys.argv[1:])}".strip(),
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "device_gib": round(torch.cuda.get_device_properties(device).total_memory / GIB, 1) if cuda else 0,
        "cuda": torch.version.cuda if cuda else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": versions,
    }


def _commit() -> str:
    """Return the commit of the working tree, empty where it is none, with a plus where files differ from it."""
    if shutil.which("git") is None:
        return ""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + "+" * bool(changed.stdout.strip()) if head.returncode == 0 else ""


def _words(facts: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in facts.items())
