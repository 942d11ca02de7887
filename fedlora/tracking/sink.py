"""Feeds a tracker in a process of its own, through a bounded queue, and drops one that fails, hangs or falls behind."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import fedlora
from fedlora.tracking.base import TrackedRun

_LINES = 1000  # that a tracker may be behind
_logger = logging.getLogger(__name__)


@final
class Sink:
    """A tracker at work. No call raises, and none but :meth:`wait` waits.

    Args:
        name: The tracker's name.
        run: The run.
        lines: Lines that it may be behind.
    """

    def __init__(self, name: str, run: TrackedRun, lines: int = _LINES) -> None:
        self.name, self.dropped = name, False
        self._log = run.own / f"{name}.log"
        self._queue: queue.Queue[str | None] = queue.Queue(lines)
        self._process: subprocess.Popen[str] | None = None
        start = {"folder": str(run.folder), "config": dict(run.config), "earlier": list(run.earlier)}
        try:
            run.own.mkdir(exist_ok=True)
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "fedlora.track", name],
                    cwd=run.own,
                    env=_environment(),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    encoding="utf-8",
                )
        except OSError as error:
            self._drop(f"cannot be started ({error})")
            return
        self._thread = threading.Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self._thread.start()
        self._send({"start": start})

    def log(self, line: Mapping[str, Any]) -> None:
        """Send a line of ``metrics.jsonl``."""
        self._send({"line": dict(line)})

    def end(self, result: Mapping[str, Any] | None) -> None:
        """Send the result; None: the run failed."""
        self._send({"end": None if result is None else dict(result)})
        if not self.dropped:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self._drop(f"is {self._queue.maxsize} lines behind")

    def wait(self, until: float) -> None:
        """Wait until the tracker is done, but not beyond a time of ``time.monotonic``."""
        if self.dropped or self._process is None:
            return
        try:
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._drop("was not done in time after the end of the run")
            return
        if code:
            self._drop("failed")
        self._thread.join()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self.dropped or self._process is None:
            return
        if self._process.poll() is not None:
            self._drop("failed")
            return
        try:
            self._queue.put_nowait(json.dumps(message) + "\n")
        except queue.Full:
            self._drop(f"is {self._queue.maxsize} lines behind")

    def _feed(self) -> None:
        """Write what is queued into the process, until the end or until it is gone."""
        assert self._process is not None, "fed once it is started"
        assert self._process.stdin is not None, "started with a pipe"
        with suppress(OSError):  # it is gone; the next call, or the end, says so
            while (text := self._queue.get()) is not None:
                self._process.stdin.write(text)
                self._process.stdin.flush()
        with suppress(OSError):
            self._process.stdin.close()

    def _drop(self, why: str) -> None:
        """Warn, once, and have nothing more to do with it."""
        self.dropped = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            with suppress(queue.Full):
                self._queue.put_nowait(None)  # ends the thread, if it waits here and not at the pipe
            self._thread.join()
        last = _last_line(self._log)
        _logger.warning(
            "run.trackers: %s %s%s; the run goes on without it (%s)",
            self.name,
            why,
            f": {last}" if last else "",
            self._log,
        )


def _environment() -> dict[str, str]:
    """Return the environment of a tracker's process: this fedlora, no GPU, and one thread to compute with."""
    paths = [str(Path(str(fedlora.__file__)).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""
    return ""
