"""Tasks: one file each, one registry."""

from __future__ import annotations

from fedlora.registry import Registry
from fedlora.tasks.base import Batch, Measure, Rows, Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.text import Examples, TextTask

TASKS: Registry[type[Task]] = Registry("task")
TASKS.register("classification")(Classification)
TASKS.register("causal-lm")(CausalLM)

__all__ = ["TASKS", "Batch", "CausalLM", "Classification", "Examples", "Measure", "Rows", "Task", "TextTask"]
