"""Hands the lines of ``metrics.jsonl`` to a run's trackers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, final

from fedlora.config import Config
from fedlora.runs.folder import RunFolder, finite
from fedlora.server.observers.base import Observer, RoundEnd
from fedlora.tracking.base import TrackedRun
from fedlora.tracking.sink import Sink

_PATIENCE_S = 30.0  # that the end of a run waits for all its trackers


@final
class Trackers(Observer):
    """Feeds what ``run.trackers`` names; nothing that a tracker does reaches the run.

    Args:
        config: The run's configuration.
        folder: Its folder.
        earlier: The lines of the rounds before, of a run that is continued.
    """

    def __init__(self, config: Config, folder: RunFolder, earlier: Sequence[Mapping[str, Any]]) -> None:
        run = TrackedRun(config.run.name, folder.path, config.to_flat(), [finite(line) for line in earlier])
        self._sinks = [Sink(name, run) for name in config.run.tracker_names]

    def on_round(self, end: RoundEnd) -> None:
        """Send the round's line, once it is written."""
        for sink in self._sinks:
            sink.log(finite(end.line))

    def close(self, result: Mapping[str, Any] | None) -> None:
        """Send what the run came to (None: it failed), and end."""
        for sink in self._sinks:
            sink.end(None if result is None else finite(result))
        until = time.monotonic() + _PATIENCE_S
        for sink in self._sinks:
            sink.wait(until)
