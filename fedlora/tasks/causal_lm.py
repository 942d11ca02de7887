"""Language modelling: write an answer to a prompt; the prompt is read and not learned.

The loss of a row is the mean cross-entropy of its answer's tokens, the end-of-text token among them. Perplexity
is that of the answers' tokens taken together, exp(sum of cross-entropies / number of tokens). A row counts as an
exact match where each token of the answer is the likeliest one after those before it, which is where greedy
generation writes the answer and stops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.data import Table
from fedlora.tasks.base import Batch, Measure
from fedlora.tasks.text import Examples, TextTask, to_device, wide_logits

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
    measure = Measure("perplexity", higher_is_better=False)
    metric_names = ("perplexity", "loss", "exact_match")

    def encode(self, table: Table, tokenizer: Any, max_length: int) -> Examples:
        """Tokenize prompts and answers; an answer that does not fit is cut, a prompt is never.

        Raises:
            ValueError: The tokenizer has no end-of-text token or no chat template that is asked for, or a prompt
                leaves no room for its answer.
        """
        pairs = self._chats(table, tokenizer) if self.chat_template else self._plain(table, tokenizer)
        full = [row for row, (prompt, _) in enumerate(pairs) if len(prompt) >= max_length]
        if full:
            raise ValueError(
                f"train.max-length = {max_length}: {len(full)} of {len(pairs)} prompts leave no room for an answer, "
                f"the first is {table.texts[full[0]][:60]!r} with {len(pairs[full[0]][0])} tokens; raise it, or "
                "shorten them."
            )
        rows = tuple(np.array([*prompt, *answer][:max_length], dtype=np.int64) for prompt, answer in pairs)
        return Examples(rows, np.array([len(prompt) for prompt, _ in pairs], dtype=np.int64))

    @staticmethod
    def _plain(table: Table, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
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
        return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(prompts, answers, strict=True)]

    @staticmethod
    def _chats(table: Table, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
        if not tokenizer.chat_template:
            raise ValueError(
                "data.chat-template = true: the model's tokenizer has none; use data.prompt-template instead."
            )
        pairs = []
        for text, answer in zip(table.texts, table.answers, strict=True):
            asked = [{"role": "user", "content": text}]
            said = [*asked, {"role": "assistant", "content": answer}]
            prompt, whole = (
                tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False),
                tokenizer.apply_chat_template(said, tokenize=True, return_dict=False),
            )
            if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
                raise ValueError(
                    "data.chat-template = true: this tokenizer's template writes a prompt differently once it is "
                    f"answered ({text[:60]!r}), so prompt and answer cannot be separated; use data.prompt-template."
                )
            pairs.append((prompt, whole[len(prompt) :]))
        return pairs

    @staticmethod
    def made_up_table(texts: Sequence[str]) -> Table:
        """Return a table of prompts of one word, with the rest of these texts as answers."""
        prompts, _, answers = zip(*(text.partition(" ") for text in texts), strict=True)
        return Table(prompts, (0,) * len(texts), answers)

    def collate(self, rows: Examples, numbers: Sequence[int], device: torch.device) -> Batch:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` [N, T]; labels are -100 outside the answers."""
        ids, mask = self.padded(rows, numbers)
        starts = rows.targets[list(numbers)]
        places: NDArray[np.int64] = np.arange(ids.shape[1])[None]
        labels = np.where((mask == 1) & (places >= starts[:, None]), ids, _IGNORED)
        return to_device({"input_ids": ids, "attention_mask": mask, "labels": labels}, device)

    def outputs(self, model_config: Any) -> int:
        """Return the size of the vocabulary: there is a logit for each token and word."""
        return int(model_config.get_text_config().vocab_size)

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of each row's answer, [N], in float32 or wider."""
        loss_nt, counted_nt, _ = _tokens(model, batch)
        return loss_nt.sum(1) / counted_nt.sum(1)

    def row_metrics(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return ``loss``, ``nll`` (its sum over the answer), ``tokens`` and ``exact_match`` of each row."""
        loss_nt, counted_nt, right_nt = _tokens(model, batch)
        nll, tokens = loss_nt.sum(1), counted_nt.sum(1)
        exact = (right_nt | ~counted_nt).all(1)
        return {"loss": nll / tokens, "nll": nll, "tokens": tokens.to(nll.dtype), "exact_match": exact.to(nll.dtype)}

    @staticmethod
    def metrics(means: Mapping[str, float]) -> dict[str, float]:
        """Return ``loss``, ``perplexity`` and ``exact_match``."""
        nll = means["nll"] / means["tokens"]
        perplexity = math.exp(nll) if nll < 700 else math.inf
        return {"loss": means["loss"], "perplexity": perplexity, "exact_match": means["exact_match"]}


def _tokens(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each predicted token its loss (0 outside answers), whether it counts, whether it is the likeliest."""
    from torch.nn import functional

    logits_ntv, label_nt = wide_logits(model, batch)[:, :-1], batch["labels"][:, 1:]
    loss_nt = functional.cross_entropy(logits_ntv.mT, label_nt, reduction="none", ignore_index=_IGNORED)
    return loss_nt, label_nt != _IGNORED, logits_ntv.argmax(-1) == label_nt
