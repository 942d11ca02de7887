"""How busy GPUs were, as nvidia-smi says: the share of the time in which at least one kernel ran."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import Self, final

_EVERY_MS = 200


@final
class GpuUse:
    """Watches GPUs while a block runs.

    Args:
        gpus: Their numbers; none: nothing is watched.

    Attributes:
        started: When it began, by ``time.time``.
    """

    def __init__(self, gpus: Sequence[str]) -> None:
        self.started = time.time()
        self._gpus = list(gpus)
        self._samples: list[tuple[float, str, float]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Begin."""
        if self._gpus and shutil.which("nvidia-smi") is not None:
            command = ["nvidia-smi", f"--id={','.join(self._gpus)}", "--query-gpu=index,utilization.gpu"]
            command += ["--format=csv,noheader,nounits", f"-lms={_EVERY_MS}"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stdout or ():
            gpu, _, percent = line.strip().partition(", ")
            if percent.strip().isdigit():
                self._samples.append((time.time(), gpu, float(percent) / 100))

    def busy(self, start: float, end: float) -> dict[str, float]:
        """Return by GPU the mean share of a span of time; empty where it is not known."""
        found = {
            gpu: [share for at, own, share in self._samples if own == gpu and start <= at <= end] for gpu in self._gpus
        }
        return {gpu: statistics.mean(shares) for gpu, shares in found.items() if shares}
