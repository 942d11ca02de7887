"""Language modelling: write an answer to a prompt, or the assistant's turns of a conversation.

Prompts are read and not learned. The loss of a row is the mean cross-entropy of its answer's tokens, the end-of-text
token among them; of a conversation, of the tokens of all turns that are learned. Perplexity
is that of the answers' tokens taken together, exp(sum of cross-entropies / number of tokens). A row counts as an
exact match where each token of the answer is the likeliest one after those before it, which is where greedy
generation writes the answer and stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.data import Table
from fedlora.data.table import Turn
from fedlora.ragged import Ragged
from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.chat import Marked, encode_chats
from fedlora.tasks.text import Examples, TextTask, model_inputs, to_device, wide_logits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_IGNORED = -100


@final
class CausalLM(TextTask):
    """Predicts the answer's tokens one after another.

    The padding token may be any, the end-of-text token too: what is padding is known from the rows' lengths.
    """

    auto_model = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    has_head = False
    has_classes = False
    measure = Measure("perplexity", higher_is_better=False)
    metric_names = ("perplexity", "loss", "exact_match")
    _by_answers = False

    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Tokenize prompts and answers, or conversations; what does not fit is cut at the end, a prompt never.

        A row ends with the last token that is learned.

        Raises:
            ValueError: The tokenizer has no end-of-text token or no chat template that is asked for, or a prompt
                leaves no room for its answer.
        """
        chats: Sequence[Sequence[Turn]] = table.chats
        if self.chat_template and not chats:
            pairs = zip(table.texts, table.answers, strict=True)
            chats = [(Turn("user", text), Turn("assistant", answer, learned=True)) for text, answer in pairs]
        marked = encode_chats(chats, tokenizer) if chats else self._plain(table, tokenizer)
        full = [row for row, (_, learned) in enumerate(marked) if not learned[:max_length].any()]
        if full:
            _, learned = marked[full[0]]
            raise ValueError(
                f"train.max-length = {max_length}: {len(full)} of {len(marked)} prompts leave no room for an answer, "
                f"the first is {table.texts[full[0]][:60]!r} with {int(np.argmax([*learned, True]))} tokens; raise "
                "it, or shorten them."
            )
        ends = [int(np.flatnonzero(learned[:max_length])[-1]) + 1 for _, learned in marked]
        return Examples(
            tuple(np.array(ids[:end], dtype=np.int64) for (ids, _), end in zip(marked, ends, strict=True)),
            tuple(learned[:end] for (_, learned), end in zip(marked, ends, strict=True)),
        )

    @staticmethod
    def _plain(table: Table, tokenizer: Any) -> list[Marked]:
        if not table.texts:
            return []
        if tokenizer.eos_token_id is None:
            raise ValueError("task = 'causal-lm': the tokenizer has no end-of-text token, by which an answer ends.")
        options = {"split_special_tokens": True}  # a text that spells a special token is text
        prompts = tokenizer(list(table.texts), **options)["input_ids"]
        if tokenizer("x")["input_ids"][-1] == tokenizer.eos_token_id:
            prompts = [ids[:-1] for ids in prompts]  # some tokenizers end every text; a prompt goes on
        answers = tokenizer(list(table.answers), add_special_tokens=False, **options)["input_ids"]
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        # A prompt of no tokens at all would leave the answer's first token with nothing to be predicted from.
        prompts = [ids or begin or [tokenizer.eos_token_id] for ids in prompts]
        rows = [[*prompt, *answer, tokenizer.eos_token_id] for prompt, answer in zip(prompts, answers, strict=True)]
        return [(row, np.arange(len(row)) >= len(prompt)) for row, prompt in zip(rows, prompts, strict=True)]

    def made_up_targets(self, tokens: Sequence[NDArray[np.int64]]) -> tuple[NDArray[np.bool_], ...]:
        """Return for each row that it is learned from the second token on."""
        return tuple(np.arange(len(row)) >= 1 for row in tokens)

    def collate(self, rows: Examples, numbers: Sequence[int], device: torch.device) -> Batch:
        """Return the model's inputs and ``labels`` [N, T]; labels are -100 where nothing is learned."""
        assert isinstance(rows.targets, Ragged), "the rows of a task with a head"
        inputs = self.padded(rows, numbers)
        learned, _ = rows.targets.padded(np.asarray(numbers, dtype=np.int64), False)
        labels = np.where(learned, inputs["input_ids"], _IGNORED)
        answered = labels[:, 1:] != _IGNORED
        places = {"answer_at": np.flatnonzero(answered), "answers": labels[:, 1:][answered]}
        return to_device({**inputs, "labels": labels, **places}, device)

    def outputs(self, model_config: Any) -> int:
        """Return the size of the vocabulary: there is a logit for each token and word, if all tokens have any."""
        return 1 if self._by_answers else int(model_config.get_text_config().vocab_size)

    def with_less_memory(self, model: nn.Module) -> CausalLM | None:
        """Return the task with the answers' tokens alone meeting the model's output layer, where it is an ordinary one.

        Whether the model does more with its logits has to be tried.
        """
        if not meets_head_alone(model):
            return None
        other = copy(self)
        other._by_answers = True
        return other

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each row's answer, [N], in float32 or wider."""
        loss_nt, counted_nt, _ = _tokens(model, batch, chunked=self._by_answers)
        return loss_nt.sum(1) / counted_nt.sum(1)

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, ``nll`` (its sum over the answer), ``tokens`` and ``exact_match`` of each row."""
        loss_nt, counted_nt, right_nt = _tokens(model, batch, chunked=self._by_answers)
        nll, tokens = loss_nt.sum(1), counted_nt.sum(1)
        exact = (right_nt | ~counted_nt).all(1)
        return {"loss": nll / tokens, "nll": nll, "tokens": tokens.to(nll.dtype), "exact_match": exact.to(nll.dtype)}

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return ``loss``, ``perplexity`` and ``exact_match``."""
        nll = means["nll"] / means["tokens"]
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return {"loss": means["loss"], "perplexity": perplexity, "exact_match": means["exact_match"]}


def _tokens(model: nn.Module, batch: Batch, *, chunked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each predicted token its loss (0 outside answers), whether it counts, whether it is the likeliest.

    Args:
        model: The model.
        batch: The rows.
        chunked: Whether the answers' tokens alone meet the output layer; the likeliest is then known of these alone.
    """
    label_nt = batch["labels"][:, 1:]
    counted_nt = label_nt != _IGNORED
    if chunked:
        loss_nt, right_nt = _by_answers(model, batch)
        return loss_nt, counted_nt, right_nt
    from torch.nn import functional

    logits_ntv = wide_logits(model, batch)[:, :-1]
    # Laid out by token: over the words of a transposed tensor a GPU's kernel is ten times slower.
    losses = functional.cross_entropy(
        logits_ntv.flatten(0, 1), label_nt.flatten(), reduction="none", ignore_index=_IGNORED
    )
    loss_nt = losses.view_as(label_nt)
    return loss_nt, counted_nt, logits_ntv.argmax(-1) == label_nt


def _by_answers(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the losses of the answers' tokens and whether each is the likeliest, in the places of all, [N, T - 1]."""
    from fedlora.tasks.token_losses import token_losses

    hidden_ntd = model.get_decoder()(**model_inputs(model, batch)).last_hidden_state[:, :-1]
    at, answers = batch["answer_at"], batch["answers"]
    found, right = token_losses(hidden_ntd.flatten(0, 1)[at], model.get_output_embeddings(), answers)
    loss_nt, right_nt = found.new_zeros(hidden_ntd.shape[:2]), right.new_zeros(hidden_ntd.shape[:2])
    return loss_nt.flatten().index_put((at,), found).view_as(loss_nt), right_nt.flatten().index_put(
        (at,), right
    ).view_as(right_nt)


def meets_head_alone(model: Any) -> bool:
    """Return whether a model's frozen output layer is one that answers' tokens alone can meet.

    Whether it does nothing else with its logits is found by trying, see :mod:`fedlora.engine.fast`.
    """
    from torch import nn

    head = model.get_output_embeddings()
    return type(head) is nn.Linear and not head.weight.requires_grad and model.get_decoder() is not model
