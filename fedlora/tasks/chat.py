"""A conversation as tokens, by the tokenizer's chat template, with the tokens that the assistant is to learn marked.

A turn's prompt is what the template writes of all that comes before it, with the beginning of the assistant's turn;
what the template adds when the turn is there is learned, the end of the turn included. This needs a template that does
not write earlier turns differently later on; one that does is refused by name.

When an answer is generated, the model has read the tokens of the prompt alone. Where a tokenizer would join the last
characters of the prompt and the first of the answer to one token (two line ends, to most), they are tokenised apart, so
that the prompt has the tokens that it has then, and each character of the answer is learned.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.data.table import Turn

Marked = tuple[list[int], NDArray[np.bool_]]
"""Tokens of a row, and which of them are learned."""
Span = tuple[int, int]
"""Where in a text characters are that are learned: from, and up to."""
_KEY = "data.chat-template"
_SPACES = ("\u2581", "\u0120")  # as SentencePiece and byte-level tokenizers write a space


def encode_chats(chats: Sequence[Sequence[Turn]], tokenizer: Any) -> list[Marked]:
    """Return the tokens of conversations, and which of them are learned.

    Raises:
        ValueError: The tokenizer has no chat template, or one that refuses a conversation, leaves part of it out, or
            writes earlier turns differently later on; a message spells one of its special tokens; or prompt and answer
            are joined by a tokenizer that cannot tokenise them apart.
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
    return [
        _by_offsets(ids, offsets, text, spans, tokenizer)
        for ids, offsets, (text, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True)
    ]


def _by_offsets(
    ids: list[int], offsets: Sequence[tuple[int, int]], text: str, spans: Sequence[Span], tokenizer: Any
) -> Marked:
    """Mark the tokens of a text by where they are in it."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    begin = np.minimum(begin, np.concatenate([[0], end[:-1]]))  # some leave a space out that is in the token
    if any(((begin < edge) & (edge < end)).any() for span in spans for edge in span):
        return _apart(text, spans, tokenizer)
    learned = np.zeros(len(ids), dtype=np.bool_)
    for first, last in spans:
        learned |= (begin >= first) & (end <= last) & (begin < last)
    return ids, learned


def _by_prefix(text: str, spans: Sequence[Span], tokenizer: Any) -> Marked:
    """Return the same by a tokenizer that does not say where its tokens are: those of prefixes must be prefixes."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    learned = np.zeros(len(ids), dtype=np.bool_)
    for span in spans:
        first, last = (tokenizer(text[:place], add_special_tokens=False)["input_ids"] for place in span)
        if ids[: len(first)] != first or ids[: len(last)] != last:
            return _apart(text, spans, tokenizer)
        learned[len(first) : len(last)] = True
    return ids, learned


def _apart(text: str, spans: Sequence[Span], tokenizer: Any) -> Marked:
    """Return the tokens of a text whose learned and other parts are tokenised each by itself.

    Raises:
        ValueError: The tokenizer puts a space before every text, which is not there.
    """
    (first, *_) = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
    if first.startswith(_SPACES):
        raise ValueError(
            f"{_KEY}: this tokenizer joins the end of a prompt and the beginning of its answer to one token, as in "
            f"{text[:60]!r}, and cannot tokenise them apart, because it puts a space before each text; use "
            "data.prompt-template instead, or remove such rows."
        )
    edges = sorted({0, len(text), *itertools.chain.from_iterable(spans)})
    parts = list(itertools.pairwise(edges))
    tokens = tokenizer([text[begin:end] for begin, end in parts], add_special_tokens=False)["input_ids"]
    marks = [any(first <= begin and end <= last for first, last in spans) for begin, end in parts]
    return list(itertools.chain.from_iterable(tokens)), np.repeat(marks, [len(part) for part in tokens])


def _write(turns: Sequence[Turn], tokenizer: Any) -> tuple[str, list[Span]]:
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
