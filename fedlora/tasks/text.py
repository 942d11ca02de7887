"""What tasks on texts share: rows of token numbers, padding on the right, logits of a transformers model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.data import Table
from fedlora.ragged import Ragged, stacked
from fedlora.tasks.base import Batch, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class Examples:
    """Rows of texts ready for the model, kept one after another whatever sequences they are given as.

    Attributes:
        tokens: The token numbers of each row, without padding; int64 arrays, in memory int32.
        targets: What the task predicts from each row: its class, int64 [n]; numbers, float64 [n, L]; or of a language
            model which of the row's tokens it learns to write, bool arrays as long as ``tokens``.
        types: Token types of each row, as long as ``tokens``, where the tokenizer tells two texts apart by them
            (BERT's segments); empty where they are all zero, or there are none.
    """

    tokens: Sequence[NDArray[np.int64]]
    targets: NDArray[Any] | Sequence[NDArray[np.bool_]]
    types: Sequence[NDArray[np.int64]] = ()

    def __post_init__(self) -> None:
        """Lay the rows out one after another."""
        for name, dtype in (("tokens", np.int32), ("targets", np.bool_), ("types", np.int8)):
            value = getattr(self, name)
            if not isinstance(value, Ragged | np.ndarray) and (len(value) or name == "tokens"):
                object.__setattr__(self, name, Ragged.of(value, dtype))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @property
    def flat(self) -> NDArray[np.int32]:
        """All rows' token numbers, one row after another, [total]."""
        return _ragged(self.tokens).flat

    @property
    def starts(self) -> NDArray[np.int64]:
        """Where each row begins in :attr:`flat`, and where the last one ends, [n + 1]."""
        return _ragged(self.tokens).starts

    def types_of(self, row: int) -> NDArray[np.int64]:
        """Return a row's token types, [T]."""
        return self.types[row] if self.types else np.zeros(len(self.tokens[row]), dtype=np.int64)

    @cached_property
    def cost(self) -> NDArray[np.int64]:
        """Tokens in each row, [n]."""
        return _ragged(self.tokens).lengths

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """Return some of the rows, in this order."""
        targets = self.targets[rows] if isinstance(self.targets, np.ndarray) else _ragged(self.targets).take(rows)
        return Examples(_ragged(self.tokens).take(rows), targets, _ragged(self.types).take(rows) if self.types else ())

    def typed(self) -> Examples:
        """Return the rows with token types, zero where they have none."""
        zeros = Ragged(np.zeros(len(self.flat), dtype=np.int8), self.starts)
        return self if self.types else replace(self, types=zeros)


def _ragged(rows: Any) -> Ragged:
    assert isinstance(rows, Ragged), "rows are laid out when they are made"
    return rows


class TextTask(Task):
    """A task on texts.

    Args:
        pad_token_id: The token that fills short rows up.
        chat_template: Whether prompts go through the tokenizer's chat template.

    Attributes:
        made_up: Tokens of rows that are nobody's, by the tokenizer, the last two long; None: numbers stand for them.
    """

    def __init__(self, pad_token_id: int, chat_template: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template
        self.made_up: Sequence[NDArray[np.int64]] | None = None

    @classmethod
    def build(cls, tokenizer: Any, config: Config) -> Self:
        """Return the task for a model's tokenizer; its own keys are ``config.options(...)``."""
        task = cls(tokenizer.pad_token_id, config.data.chat_template)
        longest = min(config.train.max_length, _LONG)
        texts = _made_up_texts(tokenizer, longest)
        encoded = tokenizer(texts, truncation=True, max_length=longest, split_special_tokens=True)["input_ids"]
        task.made_up = tuple(np.array(ids, dtype=np.int64) for ids in encoded)
        return task

    def made_up_targets(self, tokens: Sequence[NDArray[np.int64]]) -> NDArray[Any] | tuple[NDArray[np.bool_], ...]:
        """Return something to learn of each of these rows: class 1, unless a task says otherwise."""
        return np.ones(len(tokens), dtype=np.int64)

    def made_up_rows(self, *, long: bool = False) -> Examples:
        """Return four rows of about 3 to 29 tokens, with begin, end and whatever else the tokenizer puts there."""
        rows = self.made_up
        if rows is None:
            plain = np.array([token for token in range(2, 40) if token != self.pad_token_id], dtype=np.int64)
            rows = (*(plain[:length] for length in _LENGTHS), plain, plain[::-1])
        rows = rows[: len(_LENGTHS) + 2 * long]
        return Examples(rows, self.made_up_targets(rows))

    def join(self, parts: Sequence[tuple[Examples, int]]) -> Examples:
        """Return rows from several sources as one."""
        sources = list({id(source): source for source, _ in parts}.values())
        numbers = np.array([row for _, row in parts], dtype=np.int64)
        if len(sources) == 1:
            return sources[0].take(numbers)
        place = {id(source): at for at, source in enumerate(sources)}
        origin = np.array([place[id(source)] for source, _ in parts])
        taken = [source.take(numbers[origin == at]) for at, source in enumerate(sources)]
        if any(one.types for one in taken):
            taken = [one.typed() for one in taken]
        order = np.argsort(np.argsort(origin, kind="stable"), kind="stable")
        ragged = isinstance(taken[0].targets, Ragged)
        together = Examples(
            stacked([_ragged(one.tokens) for one in taken]),
            stacked([_ragged(one.targets) for one in taken])
            if ragged
            else np.concatenate([np.asarray(one.targets) for one in taken]),
            stacked([_ragged(one.types) for one in taken]) if taken[0].types else (),
        )
        return together.take(order)

    def padded(self, rows: Examples, numbers: Sequence[int]) -> dict[str, NDArray[np.int64]]:
        """Return the rows as the model's inputs, [N, T] each: token numbers, attention mask and, if any, types."""
        chosen = np.asarray(numbers, dtype=np.int64)
        ids, own = _ragged(rows.tokens).padded(chosen, self.pad_token_id)
        inputs = {"input_ids": ids, "attention_mask": own.astype(np.int64)}
        return inputs | ({"token_type_ids": _ragged(rows.types).padded(chosen, 0)[0]} if rows.types else {})


class SequenceTask(TextTask):
    """A task that predicts something of a whole text, or of a pair of texts, by a head on the model's pooled output.

    No real token may be equal to the padding token, because decoder models find the end of a text by it.
    """

    auto_model = "AutoModelForSequenceClassification"
    peft_type = "SEQ_CLS"
    has_head = True

    @abstractmethod
    def targets(self, table: Table) -> NDArray[Any]:
        """Return what is predicted of each row, [n, ...]."""

    @staticmethod
    @abstractmethod
    def predictions(logits: Tensor) -> Tensor:
        """Return what logits [N, L] say: the probability of each class or label, or the number itself."""

    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Tokenize texts, or pairs of them, of which the longer is cut first where both do not fit.

        A text that spells a special token, such as ``[PAD]``, is read as plain text.

        Raises:
            ValueError: A text has no token, or holds the padding token; or there is no room for both texts of a pair,
                or the tokenizer puts nothing between them.
        """
        if not table.texts:
            return Examples((), np.zeros(0, dtype=np.int64))
        if table.seconds and not _marks_pairs(tokenizer):
            raise ValueError(
                "data.text-column names a sentence pair: this model's tokenizer puts nothing between two texts (as "
                "GPT-2's), so the model could not tell where the second begins; write both into one column of the "
                "file, with a mark such as a line's end between them, or choose a model whose tokenizer marks pairs."
            )
        texts = [list(table.texts), *([list(table.seconds)] if table.seconds else [])]
        least = tokenizer.num_special_tokens_to_add(pair=len(texts) > 1) + len(texts)
        if max_length < least:
            raise ValueError(
                f"train.max-length = {max_length}: a pair takes {least} tokens or more with this tokenizer, a token of "
                "each text and its own marks; raise it."
            )
        encoded = tokenizer(*texts, truncation="longest_first", max_length=max_length, split_special_tokens=True)
        rows = Ragged.of(encoded["input_ids"], np.int32)
        for row in np.flatnonzero(rows.lengths == 0)[:1]:
            raise ValueError(f"the text {table.texts[row][:60]!r} has no tokens; remove such rows from the data.")
        for place in np.flatnonzero(rows.flat == self.pad_token_id)[:1]:
            text = table.texts[int(np.searchsorted(rows.starts, place, side="right")) - 1]
            raise ValueError(
                f"the text {text[:60]!r} holds the padding token (number {self.pad_token_id}), by which the model "
                "would find its end in the wrong place; choose a model whose tokenizer has a pad token of its own."
            )
        types = Ragged.of(encoded.get("token_type_ids", ()), np.int8)
        return Examples(rows, self.targets(table), types if types.flat.any() else ())

    def collate(self, rows: Examples, numbers: Sequence[int], device: torch.device) -> Batch:
        """Return the model's inputs [N, T] and ``labels`` [N, ...]."""
        assert isinstance(rows.targets, np.ndarray), "the rows of a language model"
        return to_device({**self.padded(rows, numbers), "labels": rows.targets[list(numbers)]}, device)


class NumbersTask(SequenceTask):
    """A sequence task whose rows have numbers in place of one class."""

    one_class = False

    def targets(self, table: Table) -> NDArray[Any]:
        """Return the numbers of each row, float64 [n, L]."""
        return np.array(table.numbers, dtype=np.float64)

    def made_up_targets(self, tokens: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
        """Return a 1 for each; one number stands for all of a row's."""
        return np.ones((len(tokens), 1))


def _marks_pairs(tokenizer: Any) -> bool:
    """Return whether a tokenizer puts a token of its own between two texts."""
    special = np.array(tokenizer("a", "a", return_special_tokens_mask=True)["special_tokens_mask"], dtype=np.bool_)
    text = np.flatnonzero(~special)
    return len(text) > 0 and bool(special[text[0] : text[-1]].any())


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


def model_inputs(model: nn.Module, batch: Batch) -> Batch:
    """Return what a model reads of a batch.

    A model without token types, or with one type alone (RoBERTa's), is not given the tokenizer's.
    """
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in batch and "token_type_ids" in signature(model.forward).parameters:
        config: Any = model.config
        names += ["token_type_ids"] if getattr(config, "type_vocab_size", 2) > 1 else []
    inputs: dict[str, Any] = {name: batch[name] for name in names}
    if "use_cache" in signature(model.forward).parameters:
        inputs["use_cache"] = False  # of keys and values, for writing one token after another
    return inputs


def wide_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's logits for a batch, in float32 or wider."""
    import torch

    logits: Tensor = model(**model_inputs(model, batch)).logits
    return logits if logits.dtype == torch.float64 else logits.float()


def to_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> Batch:
    """Return arrays as tensors on ``device``."""
    from fedlora import transfer

    return {name: transfer.to_device(array, device) for name, array in arrays.items()}
