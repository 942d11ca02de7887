"""Classification of texts: one class a sequence, cross-entropy, accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np

from fedlora.data import Table
from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.text import Examples, TextTask, to_device, wide_logits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@final
class Classification(TextTask):
    """Predicts the class of a text from the model's pooled output.

    No real token may be equal to the padding token, because decoder models find the end of a text by it.
    """

    auto_model = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    has_head = True
    measure = Measure("accuracy", higher_is_better=True)
    metric_names = ("accuracy", "loss")

    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Tokenize; a text that spells a special token, such as ``[PAD]``, is read as plain text.

        Raises:
            ValueError: A text has no token, or holds the padding token.
        """
        if not table.texts:
            return Examples((), np.zeros(0, dtype=np.int64))
        encoded = tokenizer(list(table.texts), truncation=True, max_length=max_length, split_special_tokens=True)
        rows = tuple(np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"])
        for row, text in zip(rows, table.texts, strict=True):
            if len(row) == 0:
                raise ValueError(f"the text {text[:60]!r} has no tokens; remove such rows from the data.")
            if (row == self.pad_token_id).any():
                raise ValueError(
                    f"the text {text[:60]!r} holds the padding token (number {self.pad_token_id}), by which the model "
                    "would find its end in the wrong place; choose a model whose tokenizer has a pad token of its own."
                )
        return Examples(rows, np.asarray(table.labels, dtype=np.int64))

    @staticmethod
    def made_up_table(texts: Sequence[str]) -> Table:
        """Return a table of these texts, all of class 1."""
        return Table(tuple(texts), (1,) * len(texts))

    def collate(self, rows: Examples, numbers: Sequence[int], device: torch.device) -> Batch:
        """Return ``input_ids`` and ``attention_mask`` [N, T] and ``labels`` [N]."""
        ids, mask = self.padded(rows, numbers)
        return to_device({"input_ids": ids, "attention_mask": mask, "labels": rows.targets[list(numbers)]}, device)

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
