"""Shapes of known models with random weights, and what a training step of one costs in floating-point operations.

Speed does not depend on what the weights are, so nothing has to be downloaded.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import transformers
from torch import nn

from fedlora.models import Base, head_modules, inspect
from fedlora.tasks import CausalLM, Classification, Task

CLASSES = 2
LEAST_TOKEN = 10  # below are padding and other special tokens, which no row holds


@final
@dataclass(frozen=True)
class Shape:
    """A model's shape.

    Attributes:
        name: What it is called on the command line.
        task: The task that it is trained for.
        config: Makes its configuration.
        targets: The projections that LoRA adapts, by PEFT's names.
    """

    name: str
    task: type[Task]
    config: Callable[[], Any]
    targets: tuple[str, ...]

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self.task is CausalLM

    def built_task(self) -> Task:
        """Return its task, for rows without padding."""
        return CausalLM(0) if self.causal else Classification(int(self.config().pad_token_id))


def _encoder(kind: str, layers: int, width: int, heads: int, inner: int, vocabulary: int, positions: int) -> Any:
    make = {"bert": transformers.BertConfig, "roberta": transformers.RobertaConfig}[kind]
    return make(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        type_vocab_size=1 if kind == "roberta" else 2,
        num_labels=CLASSES,
        pad_token_id=1 if kind == "roberta" else 0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _llama(
    layers: int, width: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool, head_dim: int
) -> Any:
    return transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
    )


_BERT, _LLAMA = ("query", "value"), ("q_proj", "v_proj")
_ALL = (
    Shape("tiny", Classification, lambda: _encoder("bert", 2, 64, 2, 128, 300, 64), _BERT),
    Shape("tiny-lm", CausalLM, lambda: _llama(2, 64, 2, 1, 128, 300, True, 32), _LLAMA),
    Shape("minilm", Classification, lambda: _encoder("bert", 6, 384, 12, 1536, 30522, 512), _BERT),
    Shape("roberta-large", Classification, lambda: _encoder("roberta", 24, 1024, 16, 4096, 50265, 514), _BERT),
    Shape("llama-3.2-1b", CausalLM, lambda: _llama(16, 2048, 32, 8, 8192, 128256, True, 64), _LLAMA),
    Shape("llama-3.2-3b", CausalLM, lambda: _llama(28, 3072, 24, 8, 8192, 128256, True, 128), _LLAMA),
    Shape("llama-2-7b", CausalLM, lambda: _llama(32, 4096, 32, 32, 11008, 32000, False, 128), _LLAMA),
)
SHAPES = {shape.name: shape for shape in _ALL}


def random_model(shape: Shape, device: torch.device, dtype: torch.dtype, quantization: str = "none") -> Any:
    """Return a model of a shape with random weights, made on the device, frozen and in evaluation mode.

    Args:
        shape: The shape.
        device: Where it computes.
        dtype: Of its weights, where they are not quantised, and of what it computes.
        quantization: ``none``, ``nf4`` or ``int8``.
    """
    kind = getattr(transformers, shape.task.auto_model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = kind.from_config(shape.config(), dtype=dtype)
    if quantization != "none":
        quantised = importlib.import_module("fedlora.models.quantised")  # with an optional package
        heads = head_modules(inspect(model, "auto", has_head=shape.task.has_head))
        quantised.quantise(model, quantization, heads, device)
    return model.to(device).requires_grad_(False).eval()


def twin(model: nn.Module) -> Any:
    """Return another tree of modules with the very same weights, so that each way may replace layers in its own."""
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


def base_of(model: nn.Module, shape: Shape) -> Base:
    """Return a model as the engine takes it; without a digest of its weights, which takes a minute of a large one."""
    return Base(model, None, inspect(model, "auto", has_head=shape.task.has_head), "")


def useful_flops(shape: Shape, model: nn.Module, tokens: int) -> float:
    """Return the floating-point operations that one token of a row of ``tokens`` needs, forward and backward.

    Four for each weight that the token is multiplied with (two forward, two for the gradient of the input; a frozen
    weight has no gradient of its own), and attention: 12 L T h, or half of that where it is causal. Adapters (less than
    half a per cent), pooler and head (one token a row) are not counted.
    """
    config: Any = model.config
    inside = (".layer.", ".layers.")
    weights = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (any(part in name for part in inside) or name == "lm_head")
    )
    heads = int(config.num_attention_heads)
    width = heads * int(getattr(config, "head_dim", config.hidden_size // heads))
    attention = (6 if shape.causal else 12) * int(config.num_hidden_layers) * tokens * width
    return 4.0 * weights + attention
