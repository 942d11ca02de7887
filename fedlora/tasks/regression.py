"""Regression: one number a text, squared error, and how well predictions follow the numbers.

Targets are learned as they are: what the exported adapter puts out is in their unit. Reported are ``pearson`` (linear
correlation), ``spearman`` (correlation of ranks), ``loss`` (mean squared error) and ``mae`` (mean absolute error). A
correlation is 0 where predictions or targets are all alike. Pearson's follows from means over rows and is that of all
rows taken together, wherever they are. Ranks need the rows in one place: where clients measure their own rows,
Spearman's is the mean over the clients, each among its own rows, weighted by their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.text import NumbersTask, wide_logits

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROUNDING = 1e-12  # a variance below this share of the mean square is rounding


@final
class Regression(NumbersTask):
    """Predicts a number from the model's pooled output."""

    measure = Measure("pearson", higher_is_better=True, most=1.0)
    metric_names = ("pearson", "spearman", "loss", "mae")
    has_classes = False
    problem_type = "regression"

    @staticmethod
    def predictions(logits: Tensor) -> Tensor:
        """Return the number, in the unit of the targets, [N, 1]."""
        return logits

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the squared error of each row, [N], in float32 or wider."""
        logits = wide_logits(model, batch)
        return (logits - batch["labels"].to(logits.dtype)).square()[:, 0]

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, ``mae``, ``prediction`` and ``target`` of each row, with the squares and the product."""
        said, there = wide_logits(model, batch)[:, 0].double(), batch["labels"][:, 0].double()
        return {
            "loss": (said - there).square(),
            "mae": (said - there).abs(),
            "prediction": said,
            "target": there,
            "prediction_squared": said.square(),
            "target_squared": there.square(),
            "product": said * there,
        }

    @staticmethod
    def facts_together(facts: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Return ``spearman``, the correlation of the ranks of predictions and targets among these rows."""
        from scipy.stats import rankdata

        said, there = rankdata(facts["prediction"]), rankdata(facts["target"])
        means = {
            "prediction": said.mean(),
            "target": there.mean(),
            "prediction_squared": np.square(said).mean(),
            "target_squared": np.square(there).mean(),
            "product": (said * there).mean(),
        }
        return {"spearman": _correlation(means)}

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return ``pearson``, ``spearman``, ``loss`` and ``mae``."""
        return {"pearson": _correlation(means), **{name: means[name] for name in ("spearman", "loss", "mae")}}


def _correlation(means: Mapping[str, Any]) -> float:
    """Return Pearson's correlation from the means of predictions, targets, their squares and their product."""
    spread = []
    for name in ("prediction", "target"):
        square = float(means[f"{name}_squared"])
        variance = square - float(means[name]) ** 2
        if variance <= _ROUNDING * square:
            return 0.0
        spread.append(math.sqrt(variance))
    together = float(means["product"]) - float(means["prediction"]) * float(means["target"])
    return float(np.clip(together / (spread[0] * spread[1]), -1.0, 1.0))  # NaN stays: a model that diverged
