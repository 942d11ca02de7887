"""Weights & Biases: online where a key is known, else offline, in the run's folder (``wandb sync`` sends it later)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Self, final

from fedlora.tracking.base import TrackedRun, Tracker, numbers, texts


@final
class WandbTracker(Tracker):
    """Writes configuration, numbers by round, and the result as the summary.

    Nothing is collected beside what it is given: no console, code, git or figures of the machine.

    Args:
        run: The run of W&B.
    """

    packages = ("wandb",)
    install = "pip install 'fedlora[wandb]'  # or: pip install wandb"

    def __init__(self, run: Any) -> None:
        self._run = run

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """Begin a run, or go on with the one of a run that is continued."""
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        identity, known = run.identity("wandb", uuid.uuid4().hex[:8])
        tracker = cls(
            wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "fedlora",
                name=run.name,
                id=identity,
                resume="allow",
                dir=str(run.own),
                config=dict(run.config),
                mode=None if "WANDB_MODE" in os.environ or wandb.api.api_key else "offline",
                settings=wandb.Settings(
                    console="off", disable_code=True, disable_git=True, x_disable_stats=True, x_disable_meta=True
                ),
            )
        )
        if not known:
            for line in run.earlier:
                tracker.log(line)
        return tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a round's numbers."""
        self._run.log(numbers(line), step=int(line["round"]))

    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        """Write the result, and end the run."""
        self._run.summary.update(numbers(result or {}, "result/") | texts(result or {}, "result/"))
        if outside:
            self._run.summary.update({"outside the guarantee": ", ".join(outside)})
        self._run.finish(exit_code=0 if result is not None else 1)
