"""Greedy generation through the resident base model: what each row's model writes after its prompt.

Rows of one prompt length are generated together, so that no prompt is padded: left padding changes what models with
absolute positions write, and right padding is not what ``generate`` reads. Rows of several clients share a batch, each
with its client's factors in place, as in :func:`fedlora.engine.core.evaluate`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlora.data import Table
from fedlora.engine.core import Engine, GroupTensors
from fedlora.engine.work import Arrays
from fedlora.models.quiet import quiet
from fedlora.tasks import Task

Tokens = NDArray[np.int64]


def generate(
    engine: Engine,
    common: Arrays,
    prompts: Sequence[Tokens],
    rooms: Sequence[int],
    ends: Sequence[int],
    *,
    own: Sequence[Arrays] = ({},),
    group: Tokens | None = None,
) -> list[Tokens]:
    """Return the tokens that are written after each prompt, without the token that ends them.

    Args:
        engine: The engine.
        common: Tensors that all rows have in common, without a group axis.
        prompts: The token numbers of each prompt.
        rooms: The most tokens that may be written after each.
        ends: Tokens that end an answer.
        own: For each group (client) the tensors that only its rows have; ranks may differ.
        group: For each prompt its place in ``own``; None: all belong to the first.
    """
    group = np.zeros(len(prompts), dtype=np.int64) if group is None else group
    tensors = GroupTensors(engine, common, own)
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    written: list[Tokens] = [np.zeros(0, dtype=np.int64)] * len(prompts)
    for length in np.unique(lengths):
        alike = np.flatnonzero(lengths == length)
        cost = np.array([length + rooms[int(row)] for row in alike], dtype=np.int64)
        for chosen in engine.passes(cost, group[alike], padded=True):
            rows = alike[chosen]
            rows = rows[np.argsort(group[rows], kind="stable")]
            ids = torch.from_numpy(np.stack([prompts[row] for row in rows])).to(engine.device)
            with tensors.placed(group[rows]) as model:
                new = greedy(model, ids, max(rooms[row] for row in rows), ends, engine.base.tokenizer.pad_token_id)
            for row, answer in zip(rows, new, strict=True):
                written[row] = answer[: rooms[row]]
    return written


def greedy(model: Any, prompts: Tensor, room: int, ends: Collection[int], pad_token_id: int) -> list[Tokens]:
    """Return what a model writes after each of these prompts [N, T], without the token that ends it.

    The model's own generation settings hold, but for sampling and beams.
    """
    if room < 1:
        return [np.zeros(0, dtype=np.int64)] * len(prompts)
    with quiet(), torch.no_grad():
        whole = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            num_beams=1,
            max_new_tokens=room,
            eos_token_id=sorted(ends),
            pad_token_id=pad_token_id,
        )
    new = whole[:, prompts.shape[1] :].cpu().numpy()
    return [np.array([*takewhile(lambda token: token not in ends, row)], dtype=np.int64) for row in new]


def split_answer(rows: Any, row: int) -> tuple[Tokens, Tokens]:
    """Return the tokens of a row's prompt, and those of its answer: of the last one, where a row has several turns."""
    tokens, learned = rows.tokens[row], rows.targets[row]
    before = np.flatnonzero(~learned)
    start = int(before[-1]) + 1 if len(before) else 0
    return tokens[:start], tokens[start:]


def end_tokens(task: Task, tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """Return the tokens that end an answer: the tokenizer's, the model's own, and what the task writes after one.

    The last is what a chat template closes a turn with, which need not be the tokenizer's end-of-text token.
    """
    ends = {tokenizer.eos_token_id}
    settings: Any = getattr(model, "generation_config", None)
    declared = settings.eos_token_id if settings is not None else None
    ends |= set(declared) if isinstance(declared, list | tuple) else {declared}
    rows: Any = task.encode(Table(("a", "a"), (0, 0), ("a", "b")), tokenizer, 2**31)
    one, other = (split_answer(rows, row)[1][::-1] for row in range(2))
    closing = [int(a) for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))][::-1]
    closing = [token for token in closing if token != tokenizer.unk_token_id]  # which answers of any words may have
    special = [token for token in closing if token in tokenizer.all_special_ids]
    ends |= set(special[:1] or closing[:1])
    return tuple(sorted(ends - {None}))
