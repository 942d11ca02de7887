"""Quantised bases for tests, and what they must equal: plain layers that hold the dequantised weights."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from fedlora.engine import Engine
from fedlora.models import Base, prepare_base
from tools.families import task_of, tiny_model
from tools.model_table import engine_of

KINDS = ("nf4", "int8")
FAMILIES = ("BERT", "Llama", "GPT-2")
"""One with a head, one with RMSNorm and an output layer of its own, one with Conv1D and a tied one."""


def dequantised(model: Any) -> Any:
    """Replace quantised layers by plain ones with the weights that they stand for; the reference of all they do."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    return model


def quantised_base(family: str, kind: str) -> Base:
    """A family's tiny model in float32, quantised."""
    model = tiny_model(family).float()
    has_head = task_of(family).has_head
    return prepare_base(model, None, "auto", has_head=has_head, device=torch.device("cpu"), quantization=kind)


def plain_engine(family: str, kind: str) -> Engine:
    """An engine on the dequantised weights of a family's quantised base."""
    engine, base = engine_of(family, "auto", kind)[0], quantised_base(family, kind)
    return Engine.build(replace(base, model=dequantised(base.model)), engine.method, engine.task)


def weights_hash(model: nn.Module) -> str:
    """A hash of all that a model holds, packed weights and their scales among it."""
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sha.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
