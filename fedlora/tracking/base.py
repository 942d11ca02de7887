"""What a tracker is: it takes a run's configuration, its lines of ``metrics.jsonl`` and its result, and no more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, final


@final
@dataclass(frozen=True)
class TrackedRun:
    """A run, as its trackers know it.

    Attributes:
        name: Its name.
        folder: Its folder; what a tracker keeps of its own goes into ``trackers/`` there.
        config: Its configuration, by dotted key.
        earlier: The lines of the rounds before, of a run that is continued.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    earlier: Sequence[Mapping[str, Any]] = ()

    @property
    def own(self) -> Path:
        """The folder for what trackers keep with the run."""
        return self.folder / "trackers"

    @property
    def shared(self) -> Path:
        """The folder of all runs beside this one."""
        return self.folder.parent

    @property
    def dp(self) -> bool:
        """Whether it is under differential privacy."""
        return self.config.get("privacy.mode") == "dp"

    def identity(self, name: str, new: str) -> tuple[str, bool]:
        """Return the identity under which a tracker knows the run, and whether it had one before this start.

        Args:
            name: The tracker's name.
            new: The identity, if it is the first start.
        """
        file = self.own / f"{name}.id"
        if file.is_file():
            return file.read_text(encoding="utf-8").strip(), True
        file.write_text(f"{new}\n", encoding="utf-8")
        return new, False


class Tracker(ABC):
    """Writes a run's numbers to one place. It lives in a process of its own, and may raise and block as it likes.

    Columns have the names that they have in ``metrics.jsonl``; those of ``result.json`` begin with ``result/``, since
    ``bytes_up`` of a round and of the whole run are two things.
    """

    packages: ClassVar[tuple[str, ...]] = ()
    """What must be importable."""
    install: ClassVar[str] = ""
    """The command that installs it."""

    @classmethod
    @abstractmethod
    def start(cls, run: TrackedRun) -> Self:
        """Begin a run, or go on with one that is continued."""

    @abstractmethod
    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line of ``metrics.jsonl``."""

    @abstractmethod
    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        """Take what ``result.json`` holds, and end.

        Args:
            result: The result; None: the run failed.
            outside: Under DP the columns that the guarantee does not cover.
        """


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the columns of a line that are numbers, but for the round, which is a step."""
    return {
        f"{prefix}{name}": float(value)
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "round"
    }


def texts(line: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the columns of a line that are texts."""
    return {f"{prefix}{name}": value for name, value in line.items() if isinstance(value, str)}


def step(result: Mapping[str, Any] | None) -> int:
    """Return the round that a result belongs to."""
    return int((result or {}).get("rounds", 0))
