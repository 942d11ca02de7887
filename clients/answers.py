"""Answers that a model writes for rows, as text beside what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clients.resident import LoadedModel
from fedlora.engine.generation import end_tokens, generate, split_answer
from fedlora.engine.work import Arrays
from fedlora.generated import Answer


def write_answers(
    model: LoadedModel,
    common: Arrays,
    split: str,
    numbers: Sequence[int],
    *,
    own: Sequence[Arrays] = ({},),
    group: NDArray[np.int64] | None = None,
) -> list[Answer]:
    """Return what is written for some rows of a split; arguments as of :func:`fedlora.engine.generation.generate`.

    An answer may have as many tokens as ``train.max-length`` leaves after its prompt, as in training.
    """
    engine, rows = model.engine, model.examples[split]
    tokenizer: Any = engine.base.tokenizer
    pairs = [split_answer(rows, number) for number in numbers]
    rooms = [max(1, model.config.train.max_length - len(prompt)) for prompt, _ in pairs]
    ends = end_tokens(engine.task, tokenizer, engine.base.model)
    written = generate(engine, common, [prompt for prompt, _ in pairs], rooms, ends, own=own, group=group)
    return [
        Answer(
            *(str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in (new, until(wanted, ends)))
        )
        for new, (_, wanted) in zip(written, pairs, strict=True)
    ]


def until(tokens: NDArray[np.int64], ends: Sequence[int]) -> NDArray[np.int64]:
    """Return the tokens before the first that ends an answer."""
    at = np.flatnonzero(np.isin(tokens, ends))
    return tokens[: at[0]] if len(at) else tokens
