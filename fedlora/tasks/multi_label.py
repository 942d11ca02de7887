"""Multi-label classification of texts: each label is there or not, binary cross-entropy, F1.

The loss of a row is the mean over the labels of the binary cross-entropy, as of transformers' own
``multi_label_classification``. A label is predicted where its probability is above one half. Micro F1 takes the true
and false positives and the false negatives of all labels together, macro F1 is the mean of the labels' F1, and a label
that is neither there nor predicted counts as 0 in it, as in scikit-learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np

from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.text import NumbersTask, wide_logits

if TYPE_CHECKING:
    from torch import Tensor, nn

_HIT, _FALSE, _MISSED = "true_positive.", "false_positive.", "false_negative."


@final
class MultiLabel(NumbersTask):
    """Predicts which labels a text has."""

    measure = Measure("f1_micro", higher_is_better=True, most=1.0)
    metric_names = ("f1_micro", "f1_macro", "exact_match", "loss")
    has_classes = True
    problem_type = "multi_label_classification"

    @staticmethod
    def predictions(logits: Tensor) -> Tensor:
        """Return the probability of each label, [N, L]."""
        return logits.sigmoid()

    @staticmethod
    def said(logits: Tensor) -> Tensor:
        """Return which labels are predicted, bool [N, L]."""
        return logits > 0

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean binary cross-entropy over the labels of each row, [N], in float32 or wider."""
        return _losses(wide_logits(model, batch), batch)

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, ``exact_match`` (all labels right) and, by label, what was hit, false and missed."""
        logits = wide_logits(model, batch)
        there, said = batch["labels"] > 0, self.said(logits)
        facts = {"loss": _losses(logits, batch), "exact_match": (there == said).all(1).to(logits.dtype)}
        for name, counted in ((_HIT, there & said), (_FALSE, said & ~there), (_MISSED, there & ~said)):
            facts |= {f"{name}{label}": counted[:, label].to(logits.dtype) for label in range(counted.shape[1])}
        return facts

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return ``f1_micro``, ``f1_macro``, ``exact_match`` and ``loss``."""
        labels = [name.removeprefix(_HIT) for name in means if name.startswith(_HIT)]
        hit, false, missed = (np.array([means[f"{kind}{one}"] for one in labels]) for kind in (_HIT, _FALSE, _MISSED))
        return {
            "f1_micro": float(_f1(hit.sum(), false.sum(), missed.sum())),
            "f1_macro": float(_f1(hit, false, missed).mean()),
            "exact_match": means["exact_match"],
            "loss": means["loss"],
        }


def _losses(logits: Tensor, batch: Batch) -> Tensor:
    from torch.nn import functional

    labels = batch["labels"].to(logits.dtype).expand_as(logits)
    return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def _f1(hit: Any, false: Any, missed: Any) -> Any:
    """Return F1 = 2 hit / (2 hit + false + missed), and 0 where none is there or predicted."""
    counted = 2 * hit + false + missed
    return np.divide(2 * hit, counted, out=np.zeros_like(counted), where=counted > 0)
