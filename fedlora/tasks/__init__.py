"""Tasks: one file each, one registry."""

from __future__ import annotations

from fedlora.data.targets import MultiLabelOptions
from fedlora.registry import Registry
from fedlora.tasks.base import Batch, Measure, Rows, Task
from fedlora.tasks.causal_lm import CausalLM
from fedlora.tasks.classification import Classification
from fedlora.tasks.multi_label import MultiLabel
from fedlora.tasks.regression import Regression
from fedlora.tasks.text import Examples, SequenceTask, TextTask

TASKS: Registry[type[Task]] = Registry("task")
TASKS.register("classification")(Classification)
TASKS.register("multi-label", MultiLabelOptions)(MultiLabel)
TASKS.register("regression")(Regression)
TASKS.register("causal-lm")(CausalLM)

__all__ = [
    "TASKS",
    "Batch",
    "CausalLM",
    "Classification",
    "Examples",
    "Measure",
    "MultiLabel",
    "Regression",
    "Rows",
    "SequenceTask",
    "Task",
    "TextTask",
]
