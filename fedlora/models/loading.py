"""Loading the frozen base model, once, with what would fail quietly later checked."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
import transformers
from torch import Tensor, nn
from transformers.quantizers import AutoHfQuantizer

from fedlora.config import ConfigError, ModelConfig
from fedlora.hub import found
from fedlora.methods import Layer
from fedlora.models.cards import check_spread, device_map
from fedlora.models.head_start import trained_labels
from fedlora.models.names import options, place
from fedlora.models.quiet import quiet
from fedlora.models.structure import Structure, head_modules, inspect
from fedlora.quantisation import check_quantisation
from fedlora.tasks import Task


@final
@dataclass(frozen=True)
class Base:
    """A loaded base model: frozen, in evaluation mode, without dropout.

    Attributes:
        model: The model with a head for the task.
        tokenizer: Its tokenizer, padding on the right.
        structure: Its layers.
        digest: SHA-256 of the weights without the head, as the checkpoint holds them, of the tokenizer's vocabulary,
            and of what each layer was quantised to.
        head: The head's tensors where the checkpoint has trained all of them at these shapes; otherwise empty.
        head_labels: The class names of the head that the checkpoint has; empty where it has none.
    """

    model: nn.Module
    tokenizer: Any
    structure: Structure
    digest: str
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_labels: tuple[str, ...] = ()


def auto_model(task: type[Task]) -> Any:
    """Return the class of transformers that loads a model for a task."""
    return getattr(transformers, task.auto_model)


def load_config(model: ModelConfig, num_labels: int, tokenizer: Any = None) -> Any:
    """Return the model's configuration with ``num_labels`` outputs and every dropout set to zero.

    Dropout draws one mask for all rows of a pack, so a client's result would depend on its neighbours.

    Args:
        model: The model.
        num_labels: Outputs of its head.
        tokenizer: Whose padding token the model is to know; None: it stays the checkpoint's.

    Raises:
        ValueError: There is none, or its quantisation cannot be read on this machine.
    """
    config = own_config(model)
    quantised = getattr(config, "quantization_config", None)
    check_quantisation(model, quantised if isinstance(quantised, dict | None) else quantised.to_dict())
    if tokenizer is not None:
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with found(model), quiet():
        config.num_labels = num_labels
        if quantised is not None:
            AutoHfQuantizer.from_config(quantised, pre_quantized=True).validate_environment(device_map=None)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def own_config(model: ModelConfig) -> Any:
    """Return the configuration that the checkpoint was saved with.

    Raises:
        ValueError: There is none.
    """
    with found(model), quiet():
        return transformers.AutoConfig.from_pretrained(place(model), **options(model))


def load_tokenizer(model: ModelConfig) -> Any:
    """Return the model's tokenizer, padding on the right, with a pad token.

    Raises:
        ValueError: There is none, or nothing to pad with.
    """
    with found(model), quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(place(model), **options(model))
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"model.name = {model.name!r}: its tokenizer has no pad, unknown or end token to pad with.")
    return tokenizer


def inspect_by_name(model: ModelConfig, task: type[Task], num_labels: int, target_modules: str) -> Structure:
    """Return the structure of the model that ``model.name`` names, for a task, without loading its weights.

    Raises:
        ValueError: There is none, or it cannot be adapted or quantised as it is to be.
    """
    config = load_config(model, num_labels)
    with torch.device("meta"), quiet(), found(model):
        skeleton = auto_model(task).from_config(config, trust_remote_code=model.trust_remote_code)
    structure = inspect(skeleton, target_modules, has_head=task.has_head)
    _check_layers(structure, model.quantization)
    return structure


_CHANGES_OUTPUTS = ("longformer",)
"""Families that change a projection's output in place, which autograd does not let them do with a quantised layer's."""


def _check_layers(structure: Structure, quantization: str) -> None:
    """Refuse to quantise a model whose layers cannot be.

    Raises:
        ConfigError: None of them can, or the family does not take it.
    """
    if quantization != "none" and (structure.family in _CHANGES_OUTPUTS or not structure.num_quantisable):
        raise ConfigError(
            f"model.quantization = {quantization!r}: the linear layers of a {structure.family} model cannot be "
            "quantised; set 'none', or choose another model."
        )


def load_base(
    model: ModelConfig,
    task: type[Task],
    num_labels: int,
    target_modules: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    cards: int = 1,
) -> Base:
    """Load a base model for a task with its weights, frozen.

    Args:
        model: The model.
        task: The task.
        num_labels: Outputs of its head.
        target_modules: The value of ``method.target-modules``.
        dtype: Of the weights.
        device: Where they go.
        cards: GPUs that the model spreads over, the first of this process; 1: it is on ``device`` alone.

    Raises:
        ValueError: The model is not there, its checkpoint lacks weights other than the head's, or it cannot be
            quantised, or not on this machine, or does not fit onto the GPUs.
    """
    tokenizer = load_tokenizer(model)
    config = load_config(model, num_labels, tokenizer)
    spread = device_map(model, config, cards) if cards > 1 else {}
    if model.quantization != "none":
        from fedlora.models.quantised import try_quantisation

        try_quantisation(model.quantization, dtype, device)
    packed = getattr(config, "quantization_config", None) is not None
    if packed and dtype == torch.float64:
        raise ConfigError(
            f"engine.dtype = 'float64': model.name = {model.name!r} is quantised, and bitsandbytes does not compute in "
            "it; use 'float32' or 'bfloat16'."
        )
    with found(model), quiet():
        loaded, report = auto_model(task).from_pretrained(
            place(model),
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **({"device_map": {"": device}} if packed else {}),  # packed weights stay where they are loaded
            **spread,
            **options(model),
        )
    if spread:
        check_spread(loaded, cards)
    # The head may be of another shape, it is seeded anyway; nothing else may be lacking.
    lacking = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    base = prepare_base(
        loaded,
        tokenizer,
        target_modules,
        has_head=task.has_head,
        device=device,
        missing=lacking,
        name=model.name,
        quantization=model.quantization,
    )
    return replace(base, head=_trained_head(base, lacking), head_labels=trained_labels(own_config(model), task))


def _trained_head(base: Base, lacking: set[str]) -> dict[str, Tensor]:
    """Return the head's tensors if the checkpoint had all of them."""
    names = [f"{layer.name}.{part}" for layer in base.structure.head for part in _parts(layer)]
    if lacking & set(names):
        return {}
    return {name: base.model.get_parameter(name) for name in names}


def _parts(layer: Layer) -> tuple[str, ...]:
    return ("weight", "bias") if layer.bias else ("weight",)


def prepare_base(
    model: nn.Module,
    tokenizer: Any,
    target_modules: str,
    *,
    has_head: bool = True,
    device: torch.device,
    missing: set[str] | None = None,
    name: str = "",
    quantization: str = "none",
) -> Base:
    """Freeze ``model``, quantise it, move it to ``device`` and check what would fail quietly later.

    One that accelerate has spread over several GPUs stays there.
    """
    structure = inspect(model, target_modules, has_head=has_head)
    _check_layers(structure, quantization)
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
    digest = _digest(model, tokenizer, head)
    if quantization != "none" or _is_quantised(model):
        digest = _quantised(model, quantization, structure, device, digest, name)
    model.requires_grad_(False)
    model.eval()  # the layers that took others' places, too
    if len({parameter.device for parameter in model.parameters()}) == 1:  # else it is where its device_map says
        model.to(device)
    logging.getLogger(__name__).debug("loaded %s: %d parameters", name, structure.num_parameters)
    return Base(model, tokenizer, structure, digest)


def _is_quantised(model: nn.Module) -> bool:
    return getattr(model, "quantization_method", None) is not None


def _quantised(
    model: nn.Module, quantization: str, structure: Structure, device: torch.device, digest: str, name: str
) -> str:
    """Quantise a model, or take one that its checkpoint holds quantised; return its digest.

    Args:
        model: The model.
        quantization: ``model.quantization``; ``none``: it is quantised already.
        structure: Its layers.
        device: Where the quantised weights go.
        digest: Of its weights as the checkpoint holds them.
        name: ``model.name``.
    """
    from fedlora.models import quantised

    if quantization != "none":
        quantised.quantise(model, quantization, head_modules(structure), device)
    quantised.leave_rows_alone(model)
    layers = quantised.describe(model)
    spoiled = [layer.name for layer in structure.head if f"\n{layer.name} " in f"\n{layers}"]
    if spoiled:
        raise ValueError(
            f"model.name = {name!r}: its checkpoint has quantised {spoiled[0]}, a layer of the head, which is trained; "
            "choose the checkpoint in full precision and set model.quantization."
        )
    return hashlib.sha256(f"{digest}\n{layers}".encode()).hexdigest()


def check_length(structure: Structure, wanted: int) -> None:
    """Refuse texts longer than the model has positions for.

    Raises:
        ValueError: ``train.max-length`` is too long.
    """
    limit = structure.max_length
    if limit is not None and wanted > limit:
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
