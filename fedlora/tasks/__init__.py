"""Tasks: one file each, one registry."""

from __future__ import annotations

from collections.abc import Callable

from fedlora.registry import Registry
from fedlora.tasks.base import Batch, Examples, Task
from fedlora.tasks.classification import Classification

TASKS: Registry[Callable[[int], Task]] = Registry("task")
TASKS.register("classification")(Classification)

__all__ = ["TASKS", "Batch", "Classification", "Examples", "Task"]
