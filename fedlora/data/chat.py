"""Chat data: conversations in the public shapes (OpenAI messages, ShareGPT, Alpaca), recognised from the columns.

A conversation becomes turns with the roles of chat templates. Which of the assistant's turns are learned is decided
here (``data.learn``); how they are written is the tokenizer's chat template's affair (:mod:`fedlora.tasks.chat`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import pandas as pd

from fedlora.config import DataConfig
from fedlora.data.table import Turn

_COLUMNS = ("messages", "conversations", "conversation")
_KEYS = {"OpenAI": ("role", "content"), "ShareGPT": ("from", "value")}
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{given}### Response:"
)
_PAIRED = ", paired with an input that provides further context"

Texts = Callable[..., list[str]]
"""Returns a column as texts: a name, and whether cells may be ``empty``."""


@final
@dataclass(frozen=True)
class Shape:
    """A public shape of chat data.

    Attributes:
        name: What it is called: ``OpenAI``, ``ShareGPT`` or ``Alpaca``.
        column: The column of conversations; empty for Alpaca, whose columns have fixed names.
        reads: The columns that are read.
    """

    name: str
    column: str
    reads: tuple[str, ...]

    def describe(self, columns: Iterable[Any], data: DataConfig) -> str:
        """Return what a plan says of it, given the file's columns."""
        used = {*self.reads, data.partition_column, data.label_column}
        unread = [str(column) for column in columns if str(column) not in used]
        if self.column:
            what = f"conversations ({self.name}: {', '.join(_KEYS[self.name])}) in the column {self.column!r}"
            what += ", by the tokenizer's chat template; learned is "
            what += "the assistant's last turn" if data.learn == "last" else "each turn of the assistant"
        else:
            how = (
                "by the tokenizer's chat template"
                if data.chat_template
                else "in the words that Alpaca was trained with"
            )
            what = f"instructions (Alpaca: {', '.join(self.reads)}), {how}; learned is the output"
        return f"{what}" + (f" (not read: {', '.join(unread[:10])})" if unread else "")


def recognise(frame: pd.DataFrame, data: DataConfig) -> Shape | None:
    """Return the shape of a table for a language model; None where its own keys say what the prompt is.

    Conversations are found in ``data.text-column``. Where that has its default and the table has no such pairs, in a
    column that public data sets keep them in, or as Alpaca's columns.
    """
    columns = [str(column) for column in frame.columns]
    if data.prompt_template:
        return None
    own = () if data.text_column != "text" or {"text", data.answer_column} <= {*columns} else _COLUMNS
    for column in (data.text_column, *own):
        if column in columns and (keys := _keys(frame[column])):
            beside = ("system",) if "system" in columns else ()
            return Shape(keys, column, (column, *beside))
    if own and "text" not in columns and data.answer_column in ("answer", "output") and "answer" not in columns:
        optional = ("input", *(("system",) if data.chat_template else ()))
        if {"instruction", "output"} <= {*columns}:
            return Shape("Alpaca", "", ("instruction", *(name for name in optional if name in columns), "output"))
    return None


def _keys(column: pd.Series) -> str:
    """Return the shape of a column's messages; empty where its cells are none."""
    first = next((cell for cell in column if not _missing(cell) and len(_list(cell) or ())), None)
    messages = _list(first)
    if not messages or not isinstance(messages[0], Mapping):
        return ""
    return next((name for name, (who, what) in _KEYS.items() if {who, what} <= messages[0].keys()), "")


def _missing(cell: Any) -> bool:
    return cell is None or (isinstance(cell, float) and cell != cell)


def _list(cell: Any) -> list[Any] | None:
    """Return a cell's list, which may be written as JSON; None where it holds none."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    return list(cell) if isinstance(cell, list | tuple | np.ndarray) else None


def alpaca_prompts(shape: Shape, texts: Texts) -> list[str]:
    """Return Alpaca's instructions and inputs as prompts, in the words of its authors."""
    given = texts("input", empty=True) if "input" in shape.reads else [""] * len(texts("instruction"))
    return [
        _ALPACA.format(
            instruction=instruction,
            paired=_PAIRED if more.strip() else "",
            given=f"### Input:\n{more}\n\n" if more.strip() else "",
        )
        for instruction, more in zip(texts("instruction"), given, strict=True)
    ]


def read_chats(shape: Shape, frame: pd.DataFrame, texts: Texts, learn: str, place: str) -> list[tuple[Turn, ...]]:
    """Return each row's conversation, up to the last turn that is learned.

    Args:
        shape: The shape of the table.
        frame: The table.
        texts: Returns one of its columns of text.
        learn: Which of the assistant's turns are learned: ``last`` or ``all``.
        place: The source, for errors.

    Raises:
        ValueError: A row holds no conversation, a message that is no text or has an unknown role, or nothing to learn.
    """
    system = texts("system", empty=True) if "system" in shape.reads else [""] * len(frame)
    if shape.column:
        read = [
            _turns(cell, shape, f"{place}: row {row} of the column {shape.column!r} (from 0)")
            for row, cell in enumerate(frame[shape.column])
        ]
    else:
        more = texts("input", empty=True) if "input" in shape.reads else [""] * len(frame)
        read = [
            [Turn("user", f"{asked}\n\n{given}" if given.strip() else asked), Turn("assistant", said, learned=True)]
            for asked, given, said in zip(texts("instruction"), more, texts("output"), strict=True)
        ]
    rows = [
        [Turn("system", first), *turns] if first.strip() and turns[0].role != "system" else turns
        for first, turns in zip(system, read, strict=True)
    ]
    chats = [_learning(turns, learn) for turns in rows]
    for what, bad in {
        "have no turn of the assistant to learn": [row for row, turns in enumerate(chats) if not turns],
        "let the assistant speak first, with nothing to answer": [
            row for row, turns in enumerate(chats) if turns and not _asked(turns)
        ],
    }.items():
        if bad:
            raise ValueError(
                f"{place}: {len(bad)} of {len(chats)} conversations {what}, the first is row {bad[0]} (from 0); remove "
                "or complete them."
            )
    return chats


def _asked(turns: tuple[Turn, ...]) -> bool:
    """Return whether somebody else than the system speaks before the first turn that is learned."""
    first = next(at for at, turn in enumerate(turns) if turn.learned)
    return any(turn.role == "user" for turn in turns[:first])


def _learning(turns: list[Turn], learn: str) -> tuple[Turn, ...]:
    """Return the turns up to the last that is learned; all others of the assistant are not, with ``last``."""
    places = [at for at, turn in enumerate(turns) if turn.learned]
    if not places:
        return ()
    kept = set(places if learn == "all" else places[-1:])
    return tuple(turn._replace(learned=at in kept) for at, turn in enumerate(turns[: places[-1] + 1]))


def _turns(cell: Any, shape: Shape, place: str) -> list[Turn]:
    """Return the messages of a cell as turns; the assistant's are learned, but where a message has weight 0."""
    messages = _list(cell)
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"{place}: holds no list of messages but {str(cell)[:60]!r}; remove such rows.")
    who, what = _KEYS[shape.name]
    turns = []
    for number, message in enumerate(messages):
        role = _ROLES.get(str(message.get(who)))
        if role is None:
            raise ValueError(
                f"{place}: message {number} is of {who} = {message.get(who)!r}; known are {', '.join(_ROLES)}. (Tools "
                "and functions are not read; remove such rows.)"
            )
        content = _content(message.get(what))
        if content is None or any(message.get(key) is not None for key in ("tool_calls", "function_call")):
            raise ValueError(
                f"{place}: message {number} ({role}) holds no text alone but {str(dict(message))[:80]!r}; only text is "
                "trained on, so remove such rows."
            )
        if content.strip():
            turns.append(Turn(role, content, learned=role == "assistant" and message.get("weight") != 0))
        elif role != "system":  # some data sets have one that says nothing in every row
            raise ValueError(f"{place}: message {number} ({role}) is empty; remove or complete such rows.")
    if not turns:
        raise ValueError(f"{place}: holds no message; remove such rows.")
    return turns


def _content(value: Any) -> str | None:
    """Return what a message says: a text, or a list of parts all of which are text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in value
        ]
        if parts and all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    return None
