"""Trackers: TensorBoard, MLflow, Weights & Biases; where a run's numbers go beside its folder. One registry.

Each works in a process of its own (:mod:`fedlora.track`), which :class:`fedlora.tracking.sink.Sink` starts, feeds and
ends: whatever its library does, imports included, the run neither waits for it nor ends with it.
"""

from __future__ import annotations

import importlib.util

from fedlora.config import Config, ConfigError
from fedlora.registry import Registry
from fedlora.tracking.base import TrackedRun, Tracker
from fedlora.tracking.mlflow import MlflowTracker
from fedlora.tracking.tensorboard import TensorBoardTracker
from fedlora.tracking.wandb import WandbTracker

TRACKERS: Registry[type[Tracker]] = Registry("run.trackers")
TRACKERS.register("tensorboard")(TensorBoardTracker)
TRACKERS.register("mlflow")(MlflowTracker)
TRACKERS.register("wandb")(WandbTracker)

__all__ = ["TRACKERS", "TrackedRun", "Tracker", "check_trackers"]


def check_trackers(config: Config) -> None:
    """Refuse a tracker that is unknown, named twice, or whose package is not installed.

    Raises:
        ConfigError: One is.
    """
    names = config.run.tracker_names
    for name in names:
        tracker = TRACKERS[name]
        if names.count(name) > 1:
            raise ConfigError(f"run.trackers = {config.run.trackers!r}: names {name!r} twice.")
        if any(importlib.util.find_spec(package) is None for package in tracker.packages):
            raise ConfigError(
                f"run.trackers = {config.run.trackers!r}: {name!r} needs a package that is not installed; install it "
                f"with: {tracker.install}"
            )
