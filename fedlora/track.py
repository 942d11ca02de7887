"""A tracker's process: reads a run's configuration, lines and result from its input, and hands them to the tracker.

It ends with its input, so that it does not outlive a run that was killed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from fedlora import plugins
from fedlora.metrics import is_covered
from fedlora.tracking import TRACKERS, TrackedRun, Tracker


def main(name: str, messages: Iterable[str]) -> None:
    """Feed the tracker called ``name``."""
    os.nice(10)  # the run comes first
    tracker: Tracker | None = None
    run: TrackedRun | None = None
    seen: dict[str, None] = {}
    for message in map(json.loads, messages):
        match message:
            case {"start": {"folder": folder, "config": config, "earlier": earlier}}:
                plugins.load(str(config.get("run.plugins", "")))
                run = TrackedRun(Path(folder).name, Path(folder), config, earlier)
                seen |= dict.fromkeys(key for line in earlier for key in line)
                tracker = TRACKERS[name].start(run)
            case {"line": line}:
                assert tracker is not None, "the start comes first"
                seen |= dict.fromkeys(key for key, value in line.items() if value is not None)
                tracker.log(line)
            case {"end": result}:
                assert tracker is not None, "the start comes first"
                assert run is not None, "the start comes first"
                seen |= dict.fromkeys(result or {})
                outside = [key for key in seen if not is_covered(key)] if run.dp else []
                tracker.finish(result, outside)
                return
    if tracker is not None:
        tracker.finish(None, [])


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
