"""The model and the rows that both sides use."""

from functools import cache

import numpy as np
import pandas as pd
import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model


def build(name: str):
    """Return a fresh PEFT model, as the examples make one for every message."""
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=2, lora_alpha=16, target_modules=["query", "value"])
    return get_peft_model(base, config).train()


@cache
def cached(name: str):
    """Return the one PEFT model of this process."""
    return build(name)


@cache
def rows(name: str, path: str) -> tuple[list[list[int]], list[int]]:
    """Return all rows, tokenized once a process."""
    frame = pd.read_csv(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    ids = tokenizer(frame["text"].tolist(), truncation=True, max_length=48)["input_ids"]
    return ids, (frame["label"] == "good").astype(int).tolist()


def batch(name: str, path: str, partition: int, partitions: int, size: int) -> dict[str, torch.Tensor]:
    """Return the first batch of a client's rows."""
    ids, labels = rows(name, path)
    own = np.array_split(np.random.default_rng(0).permutation(len(ids)), partitions)[partition][:size]
    longest = max(len(ids[row]) for row in own)
    padded = torch.zeros((len(own), longest), dtype=torch.int64)
    for place, row in enumerate(own):
        padded[place, : len(ids[row])] = torch.tensor(ids[row])
    return {
        "input_ids": padded,
        "attention_mask": (padded != 0).long(),
        "labels": torch.tensor([labels[row] for row in own]),
    }
