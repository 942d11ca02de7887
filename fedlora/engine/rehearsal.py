"""A rehearsal: the base model's own architecture with random weights and few layers, tried in float32.

It finds before a run what the model itself would refuse in it (a layer that cannot be adapted, a row that another row
reaches), without its weights and in seconds; and it finds in float32 what 16 bits hide in their rounding.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch

from fedlora.config import Config, MethodConfig
from fedlora.engine.apart import find_batching
from fedlora.engine.core import Engine
from fedlora.engine.fast import without_padding
from fedlora.engine.trial import Plain, tried
from fedlora.methods import build_method, initial_tensors
from fedlora.models import Structure, inspect, load_config, prepare_base
from fedlora.models.loading import auto_model
from fedlora.models.quiet import quiet
from fedlora.seeded import Seeded
from fedlora.tasks import Task

_WHOLE = 100_000_000  # parameters up to which a model is built with all of its layers
_MOST = 20_000_000_000  # and above which two of them are too many
_LAYERS = 2
_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def rehearse(
    config: Config, structure: Structure, task: Task, tokenizer: Any, num_labels: int, *, unpadded: bool = False
) -> Engine | None:
    """Return an engine on random weights, with what :func:`find_batching` found; None where none can be made.

    Args:
        config: The run's configuration.
        structure: The model's structure.
        task: The task, with rows made up by the tokenizer.
        tokenizer: The tokenizer.
        num_labels: Outputs of the model's head.
        unpadded: Whether to try the model's blocks without padding; they run so then, if it is right in float32.

    Raises:
        ValueError: Rows cannot be kept apart in this model, or a layer cannot be adapted.
    """
    own, kind = load_config(config.model, num_labels, tokenizer), type(task)
    if structure.num_parameters > _MOST:
        return None
    if structure.num_parameters > _WHOLE:
        try:
            own = _shrunk(own)
            with torch.device("meta"), quiet():
                trial = auto_model(kind).from_config(own, trust_remote_code=config.model.trust_remote_code)
            inspect(trial, config.method.target_modules, has_head=kind.has_head)
        except Exception:  # some configurations describe each layer by itself: what they raise is theirs
            return None
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto_model(kind).from_config(own, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code)
    base = prepare_base(
        model,
        tokenizer,
        config.method.target_modules,
        has_head=kind.has_head,
        device=torch.device("cpu"),
        name=config.model.name,
    )
    lora = Config(method=MethodConfig("lora", rank=2))  # what goes through the model is the same for all methods
    method = build_method(lora, base.structure.adapted, base.structure.head)
    engine = Engine.build(base, method, task)
    tensors = initial_tensors(method.specs(), Seeded(0))
    engine = replace(engine, batching=find_batching(engine, tensors))
    return tried(engine, without_padding, tensors, Plain.of(engine, tensors)) if unpadded else engine


def _shrunk(config: Any) -> Any:
    """Return a model's configuration with few layers, in each of its parts."""
    config = copy.deepcopy(config)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in (part for part in parts if part is not None):
        for name in _COUNTS:
            count = getattr(part, name, None)
            if isinstance(count, int):
                setattr(part, name, min(count, _LAYERS))
        kinds = getattr(part, "layer_types", None)
        if kinds:
            part.layer_types = _some_of_each(kinds)
            part.num_hidden_layers = len(part.layer_types)
    return config


def _some_of_each(kinds: list[str]) -> list[str]:
    """Return at least as many layers as a shrunk model has, with one of each kind among them."""
    return list(dict.fromkeys(kinds)) + [kinds[0]] * (_LAYERS - len(set(kinds)))
