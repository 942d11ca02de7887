"""A conversation as tokens, by the tokenizer's chat template, with the tokens that the assistant is to learn marked.

A turn's prompt is what the template writes of all that comes before it, with the beginning of the assistant's turn;
what the template adds when the turn is there is learned, the end of the turn included. This needs a template that does
not write earlier turns differently later on; one that does is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.table import Turn

Marked = tuple[list[int], NDArray[np.bool_]]
"""Tokens of a row, and which of them are learned."""
_KEY = "data.chat-template"


def encode_chats(chats: Sequence[Sequence[Turn]], tokenizer: Any) -> list[Marked]:
    """Return the tokens of conversations, and which of them are learned.

    A token that is part of the prompt by a single character is not learned.

    Raises:
        ValueError: The tokenizer has no chat template, or one that refuses a conversation, leaves part of it out, or
            writes earlier turns differently later on; or a message spells one of its special tokens.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{_KEY} = true: the model's tokenizer has none; use data.prompt-template instead.")
    if not chats:
        return []
    written = [_write(turns, tokenizer) for turns in chats]
    texts = [text for text, _ in written]
    if not tokenizer.is_fast:
        return [_by_prefix(text, spans, tokenizer) for text, spans in written]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    rows = []
    for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True):
        learned = np.zeros(len(ids), dtype=np.bool_)
        begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        for first, last in spans:
            learned |= (begin >= first) & (begin < last) & (end <= last)
        rows.append((ids, learned))
    return rows


def _by_prefix(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> Marked:
    """Return the same by a tokenizer that does not say where its tokens are: those of prefixes must be prefixes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    learned = np.zeros(len(ids), dtype=np.bool_)
    for span in spans:
        first, last = (tokenizer(text[:place], add_special_tokens=False)["input_ids"] for place in span)
        if ids[: len(first)] != first or ids[: len(last)] != last:
            raise ValueError(
                f"{_KEY}: this tokenizer joins the end of a prompt and the beginning of its answer to one token, and "
                "does not say where; use data.prompt-template instead."
            )
        learned[len(first) : len(last)] = True
    return ids, learned


def _write(turns: Sequence[Turn], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation as the template writes it, and where the characters are that are learned."""
    _check_specials(turns, tokenizer)
    whole = _render(turns, tokenizer)
    for turn in turns:
        if (turn.role != "assistant" or turn.learned) and turn.content.strip() not in whole:
            cure = (
                "put it into the first message of the user, or choose a model with a system role"
                if turn.role == "system"
                else "choose another model, or use data.prompt-template"
            )
            raise ValueError(
                f"{_KEY}: this tokenizer's template leaves out or changes the {turn.role} message "
                f"{turn.content[:60]!r}; {cure}."
            )
    spans = []
    for at, turn in enumerate(turns):
        if not turn.learned:
            continue
        asked = _render(turns[:at], tokenizer, answer=True)
        said = whole if at + 1 == len(turns) else _render(turns[: at + 1], tokenizer)
        if not whole.startswith(said) or not said.startswith(asked) or len(said) == len(asked):
            more = "; data.learn = 'last' does not need them to stay" if sum(one.learned for one in turns) > 1 else ""
            raise ValueError(
                f"{_KEY}: this tokenizer's template writes a prompt differently once it is answered "
                f"({turns[0].content[:60]!r}), so prompt and answer cannot be separated{more}; use "
                "data.prompt-template, or a model with another template."
            )
        spans.append((len(asked), len(said)))
    return whole, spans


def _render(turns: Sequence[Turn], tokenizer: Any, *, answer: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
    except TemplateError as error:
        system = any(turn.role == "system" for turn in turns)
        cure = (
            "Put the system's text into the first message of the user, or choose" if system else "Correct it, or choose"
        )
        raise ValueError(
            f"{_KEY}: this tokenizer's template refuses the conversation of {', '.join(turn.role for turn in turns)} "
            f"that begins with {turns[0].content[:60]!r} ({error}). {cure} a model with another template."
        ) from error


def _check_specials(turns: Sequence[Turn], tokenizer: Any) -> None:
    """Refuse text that the tokenizer would read as the end of a turn, or as another of its marks."""
    for turn in turns:
        spelt = next((token for token in tokenizer.all_special_tokens if token in turn.content), None)
        if spelt is not None:
            raise ValueError(
                f"{_KEY}: the {turn.role} message {turn.content[:60]!r} spells the special token {spelt!r}, which "
                "would be read as a mark of the template; remove such rows, or the mark."
            )
