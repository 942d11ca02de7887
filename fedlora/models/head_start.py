"""Where the head starts: as the seed gives it, or as the checkpoint has trained it (``method.head-start``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlora.tasks import Task


def trained_labels(checkpoint: Any, task: type[Task]) -> tuple[str, ...]:
    """Return the class names of the head that a checkpoint was saved with; empty where it has none for the task.

    Args:
        checkpoint: Its configuration, as it was saved.
        task: The task.
    """
    kind = task.auto_model.removeprefix("AutoModel")
    if not task.has_head or not any(name.endswith(kind) for name in checkpoint.architectures or ()):
        return ()
    return tuple(str(checkpoint.id2label[number]) for number in sorted(checkpoint.id2label))


def keeps_head(policy: str, labels: Sequence[str], classes: Sequence[str]) -> bool:
    """Return whether the head starts as the checkpoint has it.

    Args:
        policy: ``method.head-start``.
        labels: What :func:`trained_labels` found.
        classes: The run's classes.

    Raises:
        ValueError: The policy is ``checkpoint``, and there is no head for these classes.
    """
    why = _disagreement(labels, classes)
    if policy == "checkpoint" and why:
        raise ValueError(f"method.head-start = 'checkpoint': {why}; use 'fresh', or a checkpoint with such a head.")
    return policy != "fresh" and not why


def head_words(policy: str, labels: Sequence[str], classes: Sequence[str]) -> str:
    """Return in words where the head starts, and why."""
    if keeps_head(policy, labels, classes):
        return f"as the checkpoint has trained it, for {', '.join(labels[:10])}"
    if not labels:
        return "anew, from the seed"
    why = "method.head-start = 'fresh'" if policy == "fresh" else _disagreement(labels, classes)
    return f"anew, from the seed ({why})"


def _disagreement(labels: Sequence[str], classes: Sequence[str]) -> str:
    """Return why a checkpoint's head is not one for these classes; empty where it is.

    Names that nobody gave (``LABEL_0``) agree with any: the order of the classes is then taken to be the same.
    """
    if not labels:
        return "the checkpoint has no head for this task"
    if len(labels) != len(classes):
        return f"the checkpoint's head has {len(labels)} classes and the data {len(classes)}"
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(labels))
    plain = [[str(name).strip().casefold() for name in names] for names in (labels, classes)]
    if not unnamed and plain[0] != plain[1]:
        return f"the checkpoint's classes are {', '.join(labels[:10])}, the data's {', '.join(classes[:10])}"
    return ""
