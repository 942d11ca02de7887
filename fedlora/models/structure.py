"""The structure of a base model: which of its layers are adapted, and which are the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from fedlora.methods import Layer
from fedlora.models.targets import resolve_targets

_NORMS = (nn.LayerNorm, nn.RMSNorm)


@final
@dataclass(frozen=True)
class Structure:
    """What a run needs to know of a model without its weights.

    Attributes:
        family: ``model_type`` of the configuration, e.g. ``bert``.
        adapted: The layers that the method adapts.
        head: The layers of the head: linear ones, and norms.
        num_parameters: Parameters of the model, head included.
        num_quantisable: Those among them that ``model.quantization`` stores in fewer bits.
        max_length: The most tokens that it has positions for; None: it has no such limit.
    """

    family: str
    adapted: tuple[Layer, ...]
    head: tuple[Layer, ...]
    num_parameters: int
    num_quantisable: int = 0
    max_length: int | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The last parts of the adapted layers' names, each once."""
        return tuple(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in self.adapted))


def inspect(model: nn.Module, target_modules: str, *, has_head: bool) -> Structure:
    """Return the structure of ``model``, with target modules resolved by PEFT itself.

    The head is every linear layer and norm outside the base model (``classifier``, ``score``, ``pre_classifier`` ...):
    what the task adds, and what a checkpoint of the bare model does not carry. Of a model of several parts (vision
    and text) only the text model's layers are adapted.

    Args:
        model: The model; its weights may be on the ``meta`` device.
        target_modules: The value of ``method.target-modules``.
        has_head: Whether the task adds a head; a language model's output layer is part of the base.

    Raises:
        ValueError: No layer, or a layer that cannot be adapted, is named.
    """
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    kinds = (nn.Linear, Conv1D, *_NORMS)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    head = [name for name in layers if has_head and not name.startswith(prefix)]
    linear = [name for name, module in layers.items() if not isinstance(module, _NORMS) and name not in head]
    text = _text_part(model)
    candidates = [name for name in linear if text is None or name.startswith(text) or not name.startswith(prefix)]
    excluded = [name for name in head if not isinstance(layers[name], _NORMS)] + sorted({*linear} - {*candidates})
    targets = resolve_targets(model, target_modules, candidates, excluded)
    _refuse_tied(model, targets)
    config: Any = model.config
    heads = tuple(_layer(name, layers[name]) for name in head)
    kept = kept_whole(model, _tops(heads))
    return Structure(
        family=str(config.model_type),
        adapted=tuple(_layer(name, layers[name]) for name in targets),
        head=heads,
        num_parameters=_num_parameters(model),
        num_quantisable=sum(
            _numbers(layers[name]) for name in linear if _is_plain(layers[name]) and should_convert_module(name, kept)
        ),
        max_length=_max_length(model),
    )


def kept_whole(model: Any, heads: Sequence[str]) -> list[str]:
    """Return what transformers' quantisation leaves out of a model, as patterns of names.

    Args:
        model: The model.
        heads: The modules at its top that hold the head; without any the output layer, and what is tied to another.
    """
    found = HfQuantizer.get_modules_to_not_convert(model, list(heads) or None, model._keep_in_fp32_modules)
    return sorted(found)


def head_modules(structure: Structure) -> tuple[str, ...]:
    """Return the top modules that hold the head, such as ``classifier``: what PEFT saves whole."""
    return _tops(structure.head)


def _tops(head: Sequence[Layer]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.name.split(".", 1)[0] for layer in head))


def _num_parameters(model: nn.Module) -> int:
    """Return the number of a model's parameters, of which a quantised layer's weight packs several in one element."""
    packed = {id(module.weight): _numbers(module) for module in model.modules() if isinstance(module, nn.Linear)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def _numbers(layer: Any) -> int:
    """Return the numbers in the weight of a linear layer."""
    return int(layer.weight.numel() if isinstance(layer, Conv1D) else layer.in_features * layer.out_features)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a linear layer is one that transformers quantises, or has quantised: none of a family's own."""
    return type(layer) in (nn.Linear, Conv1D) or type(layer).__module__.startswith("bitsandbytes.")


def _max_length(model: nn.Module) -> int | None:
    """Return the tokens that a model has positions for; in RoBERTa's line they start after the padding's."""
    config: Any = model.config
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    known = [int(limit) for limit in limits if limit is not None and limit > 0]
    return min(known, default=None)


def _text_part(model: nn.Module) -> str | None:
    """Return what names within the text model begin with, in a model of several parts; None: there is one only."""
    config: Any = model.config
    text: Any = config.get_text_config()
    if text is config:
        return None
    parts: list[str] = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config.model_type == text.model_type
    ]
    return f"{parts[0]}." if parts else None


def _refuse_tied(model: nn.Module, targets: list[str]) -> None:
    """Refuse output layers that share the embedding's weight: merging an adapter would change the embedding, too."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    config: Any = model.config
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    tied = config.tie_word_embeddings or config.get_text_config().tie_word_embeddings
    for name in targets:
        layer = model.get_submodule(name)
        if layer.weight is embedding.weight or (layer is output and tied):
            raise ValueError(
                f"method.target-modules: {name} is tied to the embedding of this {config.model_type} model; merging "
                "an adapter into it would corrupt the embedding. Name other layers, or untie them in the model "
                "(tie_word_embeddings = false)."
            )


def _layer(name: str, module: Any) -> Layer:
    if isinstance(module, _NORMS):
        width = int(module.normalized_shape[-1])
        bias = isinstance(module, nn.LayerNorm) and module.bias is not None
        return Layer(name, width, width, bias=bias, fan_in_fan_out=False, norm=True)
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return Layer(name, d_in, d_out, bias=True, fan_in_fan_out=True)
    return Layer(name, module.in_features, module.out_features, bias=module.bias is not None, fan_in_fan_out=False)
