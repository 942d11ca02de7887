"""What tasks on texts share: rows of token numbers, padding on the right, logits of a transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.tasks.base import Batch, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Examples:
    """Rows of texts ready for the model.

    Attributes:
        tokens: One int64 array of token numbers a row, without padding.
        targets: What the task predicts from each row, int64 [n]: a class, or where the answer begins.
    """

    tokens: tuple[NDArray[np.int64], ...]
    targets: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @cached_property
    def cost(self) -> NDArray[np.int64]:
        """Tokens in each row, [n]."""
        return np.array([len(row) for row in self.tokens], dtype=np.int64)


class TextTask(Task):
    """A task on texts.

    Args:
        pad_token_id: The token that fills short rows up.
        chat_template: Whether prompts go through the tokenizer's chat template.
    """

    def __init__(self, pad_token_id: int, chat_template: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template

    @classmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        """Return the task for a model's tokenizer; its own keys are ``config.options(...)``."""
        return cls(tokenizer.pad_token_id, config.data.chat_template)

    def made_up_rows(self) -> Examples:
        """Return four rows of 3 to 29 tokens, of class 1, or whose answer begins at the second token."""
        tokens = [token for token in range(2, 40) if token != self.pad_token_id]
        rows = tuple(np.array(tokens[:length], dtype=np.int64) for length in (3, 17, 5, 29))
        return Examples(rows, np.ones(len(rows), dtype=np.int64))

    def join(self, parts: Sequence[tuple[Examples, int]]) -> Examples:
        """Return rows from several sources as one."""
        tokens = tuple(source.tokens[row] for source, row in parts)
        return Examples(tokens, np.array([source.targets[row] for source, row in parts], dtype=np.int64))

    def padded(self, rows: Examples, numbers: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token numbers and attention mask of the rows, [N, T] each."""
        longest = max(len(rows.tokens[row]) for row in numbers)
        ids = np.full((len(numbers), longest), self.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for place, row in enumerate(numbers):
            tokens = rows.tokens[row]
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
        return ids, mask


def wide_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits for a batch, in float32 or wider."""
    import torch

    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def to_device(arrays: Mapping[str, NDArray[np.int64]], device: torch.device) -> Batch:
    """Return arrays as tensors on ``device``."""
    import torch

    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
