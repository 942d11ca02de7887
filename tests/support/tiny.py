"""A tiny model with a tokenizer, and a small file of texts, on disk: for runs that take seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.support.families import SIZES

WORDS = [f"w{n}" for n in range(40)]


def save_tiny_model(folder: Path, seed: int = 0, *, head: bool = False, layers: int = 2) -> str:
    """Save a BERT of 2 layers and 16 features with a word tokenizer, and a head for 2 classes; return the folder."""
    vocabulary = {word: n for n, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        **{**SIZES, "num_hidden_layers": layers},
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.BertForSequenceClassification(config)
    (model if head else model.bert).save_pretrained(folder)
    return str(folder)


def save_tiny_language_model(folder: Path, seed: int = 0) -> str:
    """Save a Llama of 2 layers and 16 features with a word tokenizer; return the folder."""
    special = ["[PAD]", "[UNK]", "[END]", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: n for n, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[END]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), **SIZES, num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def save_texts(path: Path, rows: int = 120, seed: int = 0) -> str:
    """Write a csv of texts whose class shows in their words; return its path."""
    generator = np.random.default_rng(seed)
    lines = ["text,label"]
    for _ in range(rows):
        label = int(generator.integers(0, 2))
        words = generator.choice(WORDS[:24] if label else WORDS[16:], size=int(generator.integers(2, 12)))
        lines.append(f"{' '.join(words)},{'good' if label else 'bad'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)
