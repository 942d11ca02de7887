"""TensorBoard: event files in the run's folder (``tensorboard --logdir runs``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self, final

from fedlora.tracking.base import TrackedRun, Tracker, numbers, step, texts


@final
class TensorBoardTracker(Tracker):
    """Writes scalars by round, and configuration and texts as text.

    Args:
        writer: Torch's ``SummaryWriter``.
    """

    packages = ("tensorboard",)
    install = "pip install 'fedlora[tensorboard]'  # or: pip install tensorboard"

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        """Open an event file; one of a run that is continued takes the place of all after its last round."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.own / "tensorboard"
        known = folder.is_dir()
        after = max((int(line["round"]) for line in run.earlier), default=0) + 1
        writer: Any = SummaryWriter(str(folder), purge_step=after if known else None)
        tracker = cls(writer)
        if not known:
            rows = "\n".join(f"| {key} | `{value}` |" for key, value in run.config.items())
            writer.add_text("config", f"| key | value |\n| --- | --- |\n{rows}")
            for line in run.earlier:
                tracker.log(line)
        return tracker

    def log(self, line: Mapping[str, Any]) -> None:
        """Write a round's numbers."""
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, int(line["round"]))
        self._writer.flush()

    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        """Write the result, and close the file."""
        for name, value in numbers(result or {}, "result/").items():
            self._writer.add_scalar(name, value, step(result))
        for name, text in texts(result or {}, "result/").items():
            self._writer.add_text(name, text, step(result))
        if outside:
            self._writer.add_text("outside the guarantee", ", ".join(outside), step(result))
        self._writer.close()
