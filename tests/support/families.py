"""Small classifiers and language models, made from their configurations, for tests in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers

from fedlora.models import Base, inspect, prepare_base
from fedlora.tasks import CausalLM, Classification, Examples, Task

PAD = 0
VOCABULARY = 60
CLASSES = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "num_labels": CLASSES, "pad_token_id": PAD}

CONFIGS: dict[str, Any] = {
    "bert": lambda: transformers.BertConfig(
        **SIZES, **_COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ),
    "roberta": lambda: transformers.RobertaConfig(
        **SIZES, **_COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=40
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        **_COMMON,
        dim=16,
        n_layers=2,
        n_heads=2,
        hidden_dim=24,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
    "llama": lambda: transformers.LlamaConfig(**SIZES, **_COMMON, num_key_value_heads=1, max_position_embeddings=64),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=16, n_layer=2, n_head=2, n_inner=24, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
_ROTARY: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64}
LANGUAGE: dict[str, Any] = {
    "llama-lm": CONFIGS["llama"],
    "gpt2-lm": CONFIGS["gpt2"],  # its output layer is tied to the embedding
    "qwen2-lm": lambda: transformers.Qwen2Config(**_COMMON, **_ROTARY, tie_word_embeddings=False),
    "mistral-lm": lambda: transformers.MistralConfig(**_COMMON, **_ROTARY, sliding_window=None),
}
FAMILIES = {**CONFIGS, **LANGUAGE}


def task_of(family: str) -> type[Task]:
    """Return the task of a family's small model."""
    return CausalLM if family in LANGUAGE else Classification


def small_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a small model in float64, every weight random (biases and norms, too).

    Args:
        family: Its architecture.
        seed: Of the weights.
        changes: Changed keys of its configuration.
    """
    torch.manual_seed(seed)
    auto_model = getattr(transformers, task_of(family).auto_model)
    config = FAMILIES[family]()
    config.update(changes)
    model = auto_model.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def small_base(family: str, target_modules: str = "auto", seed: int = 0) -> Base:
    """Return :func:`small_model` prepared as a base."""
    has_head = task_of(family).has_head
    model = without_float32(small_model(family, seed))
    return prepare_base(model, None, target_modules, has_head=has_head, device=torch.device("cpu"))


def small_structure(family: str, target_modules: str) -> Any:
    """Return the structure of a small model."""
    return inspect(small_model(family), target_modules, has_head=task_of(family).has_head)


def small_task(family: str = "bert") -> Task:
    """Return the task of a small model."""
    return task_of(family)(PAD)


def random_examples(rows: int, seed: int, longest: int = 12, family: str = "bert") -> Examples:
    """Return rows of random lengths and tokens, with random classes or answers that begin anywhere."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, size=rows)
    tokens = tuple(generator.integers(2, VOCABULARY, size=int(n)).astype(np.int64) for n in lengths)
    if family in LANGUAGE:
        starts = generator.integers(1, lengths)
        return Examples(tokens, tuple(np.arange(len(row)) >= start for row, start in zip(tokens, starts, strict=True)))
    return Examples(tokens, generator.integers(0, CLASSES, size=rows).astype(np.int64))


class _DoubleNorm(torch.nn.Module):
    """An RMSNorm without its detour through float32, which costs 5e-7 of any comparison."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def without_float32(model: Any) -> Any:
    """Replace RMSNorms by ones that compute in the dtype of their input."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "Qwen2RMSNorm", "MistralRMSNorm"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], _DoubleNorm(module))
    return model
