"""Loading the frozen base model, once, with what would fail quietly later checked."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from fedlora.messages import first_line
from fedlora.models.names import prepare_model
from fedlora.models.quiet import quiet
from fedlora.models.structure import Structure, inspect
from fedlora.tasks import Task


@final
@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, in evaluation mode, without dropout.

    Attributes:
        model: The model with a head for the task.
        tokenizer: Its tokenizer, padding on the right.
        structure: Its layers.
        digest: SHA-256 of the weights without the head, and of the tokenizer's vocabulary.
    """

    model: nn.Module
    tokenizer: Any
    structure: Structure
    digest: str


@contextmanager
def _found(name: str) -> Iterator[None]:
    """Turn the many errors of a model that is not there into one that names both cures."""
    try:
        yield
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"model.name = {name!r}: cannot be loaded ({first_line(error)}). Either set model.name to a local folder "
            "that holds config.json, the weights and the tokenizer, or connect to the network once so that the hub "
            "model is cached. The bundled model.name = 'minilm' needs neither."
        ) from error


def _auto_model(task: type[Task]) -> Any:
    return getattr(transformers, task.auto_model)


def load_config(name: str, num_labels: int) -> Any:
    """Return the model's configuration with ``num_labels`` outputs and every dropout set to zero.

    Dropout draws one mask for all rows of a pack, so a client's result would depend on its neighbours.
    """
    with _found(name), quiet():
        config = transformers.AutoConfig.from_pretrained(prepare_model(name), num_labels=num_labels)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def load_tokenizer(name: str) -> Any:
    """Return the model's tokenizer, padding on the right, with a pad token."""
    with _found(name), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(prepare_model(name))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model.name = {name!r}: its tokenizer has no pad, unknown or end token to pad with.")
    return tokenizer


def inspect_by_name(name: str, task: type[Task], num_labels: int, target_modules: str) -> Structure:
    """Return the structure of the model called ``name`` for a task without loading its weights."""
    config = load_config(name, num_labels)
    with torch.device("meta"), quiet(), _found(name):
        model = _auto_model(task).from_config(config)
    return inspect(model, target_modules, has_head=task.has_head)


def load_base(
    name: str, task: type[Task], num_labels: int, target_modules: str, *, dtype: torch.dtype, device: torch.device
) -> Base:
    """Load a base model for a task with its weights, frozen, on ``device``.

    Raises:
        ValueError: The model is not there, or its checkpoint lacks weights other than the head's.
    """
    config = load_config(name, num_labels)
    tokenizer = load_tokenizer(name)
    config.pad_token_id = tokenizer.pad_token_id
    with _found(name), quiet():
        model, report = _auto_model(task).from_pretrained(
            prepare_model(name), config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    # The head may be of another shape, it is seeded anyway; nothing else may be lacking.
    lacking = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    return prepare_base(
        model, tokenizer, target_modules, has_head=task.has_head, device=device, missing=lacking, name=name
    )


def prepare_base(
    model: nn.Module,
    tokenizer: Any,
    target_modules: str,
    *,
    has_head: bool = True,
    device: torch.device,
    missing: set[str] | None = None,
    name: str = "",
) -> Base:
    """Freeze ``model``, move it to ``device`` and check what would fail quietly later."""
    structure = inspect(model, target_modules, has_head=has_head)
    head = {layer.name for layer in structure.head}
    lost = sorted(key for key in missing or set() if key.rsplit(".", 1)[0] not in head)
    if lost:
        raise ValueError(
            f"model.name = {name!r}: the checkpoint has no weights for {lost[0]} ({len(lost)} tensors are missing). "
            "They would start at random, differently on each machine; choose a checkpoint that holds the whole base."
        )
    active = [key for key, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    if active:
        raise ValueError(f"model.name = {name!r}: dropout in {active[0]} could not be switched off.")
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    logging.getLogger(__name__).debug("loaded %s: %d parameters", name, structure.num_parameters)
    return Base(model, tokenizer, structure, _digest(model, tokenizer, head))


def check_length(config: Any, wanted: int) -> None:
    """Refuse texts longer than the model of this configuration has positions for.

    Raises:
        ValueError: ``train.max-length`` is too long.
    """
    limit = int(getattr(config, "max_position_embeddings", wanted))
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):  # positions start after the padding's
        limit -= 2
    if wanted > limit:
        raise ValueError(f"train.max-length = {wanted}: the model takes {limit} tokens at most; lower it to that.")


def _digest(model: nn.Module, tokenizer: Any, head: set[str]) -> str:
    sha = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if key.rsplit(".", 1)[0] not in head:
            sha.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    if tokenizer is not None:
        vocabulary = sorted(tokenizer.get_vocab().items())
        sha.update(re.sub(r"\s", "", str(vocabulary)).encode())
    return sha.hexdigest()
