"""Classification of texts, or pairs of texts: one class a sequence, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.data import Table
from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.text import SequenceTask, wide_logits

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
class Classification(SequenceTask):
    """Predicts the class of a text from the model's pooled output."""

    measure = Measure("accuracy", higher_is_better=True, most=1.0)
    metric_names = ("accuracy", "loss")
    has_classes = True

    def targets(self, table: Table) -> NDArray[Any]:
        """Return the class of each row, int64 [n]."""
        return np.asarray(table.labels, dtype=np.int64)

    @staticmethod
    def predictions(logits: Tensor) -> Tensor:
        """Return the probability of each class, [N, L]."""
        return logits.softmax(-1)

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the cross-entropy of each row, [N], in float32 or wider."""
        from torch.nn import functional

        return functional.cross_entropy(wide_logits(model, batch), batch["labels"], reduction="none")

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss`` and ``accuracy`` (1 where the likeliest class is right) of each row."""
        from torch.nn import functional

        logits = wide_logits(model, batch)
        return {
            "loss": functional.cross_entropy(logits, batch["labels"], reduction="none"),
            "accuracy": (logits.argmax(-1) == batch["labels"]).to(logits.dtype),
        }

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return the means themselves."""
        return dict(means)
