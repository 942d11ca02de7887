"""A small Llama that a machine trains once, from its configuration: language modelling with nothing to download.

It learns to write docstrings from those that are in neither table of the built-in text, so what clients train and
are tested on is new to it. It is a base to try things on, not a model to use: 1.2 million parameters, 2,048 tokens,
a minute on two cores. Weights depend on the machine's arithmetic, so it serves simulations on one machine only.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedlora.data.docstrings import cache_folder, corpus_key, spare_docstrings

_END = "<|end|>"
_PAD = "<|pad|>"
_VOCABULARY = 2048
_CONTEXT = 256
_STEPS, _ROWS, _TOKENS, _RATE = 250, 16, 96, 3e-3
_FORMAT = 1  # raise when anything here changes what is trained


def small_llama_path() -> Path:
    """Return the folder of the model, whether or not it has been made."""
    return cache_folder() / f"small-llama-{_FORMAT}-{corpus_key()}"


def make_small_llama() -> None:
    """Train the model if this machine has not yet.

    Raises:
        ValueError: A library whose docstrings it learns from is not installed.
    """
    folder = small_llama_path()
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # another process may have trained it meanwhile
            logging.getLogger(__name__).warning("training small-llama, once on this machine: about a minute")
            partial = Path(mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".partial"))
            try:
                _make(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


def _make(folder: Path) -> None:
    texts = spare_docstrings()
    tokenizer = _tokenizer(texts)
    stream = torch.tensor([token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _trained(stream, len(tokenizer))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, eos_token=_END)


def _trained(stream: torch.Tensor, vocabulary: int) -> Any:
    """Train all weights on windows of the stream, with AdamW and a linear schedule."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=352,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1)
    window = torch.arange(_TOKENS)
    for step in range(_STEPS):
        ids = stream[torch.randint(len(stream) - _TOKENS, (_ROWS, 1)) + window]
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / 20) * (1 - step / _STEPS)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()
