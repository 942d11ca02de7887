"""What tasks on texts share: rows of token numbers, padding on the right, logits of a transformers model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.data import Table
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

    Attributes:
        made_up: Rows that are nobody's, as the tokenizer makes them, the last two long; None: numbers stand for them.
    """

    def __init__(self, pad_token_id: int, chat_template: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template
        self.made_up: Examples | None = None

    @classmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        """Return the task for a model's tokenizer; its own keys are ``config.options(...)``."""
        task = cls(tokenizer.pad_token_id, config.data.chat_template)
        longest = min(config.train.max_length, _LONG)
        task.made_up = task.encode(cls.made_up_table(_made_up_texts(tokenizer, longest)), tokenizer, longest)
        return task

    @abstractmethod
    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Turn the table's rows into token numbers, ``max_length`` of them at most."""

    @staticmethod
    @abstractmethod
    def made_up_table(texts: Sequence[str]) -> Table:
        """Return a table of these texts, with something to learn of each."""

    def made_up_rows(self, *, long: bool = False) -> Examples:
        """Return four rows of about 3 to 29 tokens, with begin, end and whatever else the tokenizer puts there."""
        if self.made_up is None:
            tokens = [token for token in range(2, 40) if token != self.pad_token_id]
            rows = [np.array(tokens[:length], dtype=np.int64) for length in _LENGTHS]
            rows += [rows[-1][::-1], rows[-1]] if long else []
            return Examples(tuple(rows), np.ones(len(rows), dtype=np.int64))
        return self.join([(self.made_up, row) for row in range(len(_LENGTHS) + 2 * long)])

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


_LENGTHS = (3, 17, 5, 29)
_LONG = 1024


def _made_up_texts(tokenizer: Any, longest: int) -> list[str]:
    """Return texts of words that the tokenizer knows: four short ones, and two that fill ``longest`` tokens."""
    special = set(tokenizer.all_special_ids)
    numbers = [number for number in sorted(tokenizer.get_vocab().values()) if number not in special]
    step = max(1, len(numbers) // 400)
    words = [word for number in numbers[::step] if (word := tokenizer.decode([number]).strip()) and word.isprintable()]
    words = words or ["a"]
    lengths = (*_LENGTHS, longest, longest)
    return [" ".join(words[(7 * at + start) % len(words)] for at in range(n)) for start, n in enumerate(lengths)]


def wide_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits for a batch, in float32 or wider."""
    import torch

    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def to_device(arrays: Mapping[str, NDArray[np.int64]], device: torch.device) -> Batch:
    """Return arrays as tensors on ``device``."""
    import torch

    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
