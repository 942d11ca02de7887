"""Trackers that fail, each in its own way; a plug-in (``run.plugins``)."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from fedlora.tracking import TRACKERS, TrackedRun, Tracker


class _Failing(Tracker):
    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        return cls()

    def log(self, line: Mapping[str, Any]) -> None:
        return None

    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        return None


class NoImport(_Failing):
    """Its package is there and cannot be imported."""

    @classmethod
    def start(cls, run: TrackedRun) -> Self:
        raise ImportError("libbroken.so.1: cannot open shared object file")


class Raising(_Failing):
    def log(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise RuntimeError("the service said no")


class Killed(_Failing):
    """As by the system when memory is short."""

    def log(self, line: Mapping[str, Any]) -> None:
        os.kill(os.getpid(), 9)


class Exiting(_Failing):
    """As libraries that call sys.exit do."""

    def log(self, line: Mapping[str, Any]) -> None:
        sys.exit("goodbye")


class Hanging(_Failing):
    def log(self, line: Mapping[str, Any]) -> None:
        time.sleep(3600)


class HangingEnd(_Failing):
    def finish(self, result: Mapping[str, Any] | None, outside: Sequence[str]) -> None:
        time.sleep(3600)


class Missing(_Failing):
    packages = ("a_package_that_nobody_has",)
    install = "pip install a-package-that-nobody-has"


for name, kind in {
    "no-import": NoImport,
    "raising": Raising,
    "killed": Killed,
    "exiting": Exiting,
    "hanging": Hanging,
    "hanging-end": HangingEnd,
    "missing": Missing,
}.items():
    TRACKERS.register(name)(kind)
