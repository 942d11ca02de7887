"""A quantised base: linear layers whose weights bitsandbytes keeps in 4 or 8 bits, and that leave each row alone.

Imported where a base is quantised only: ``bitsandbytes`` is an optional extra.

- ``nf4``: 4-bit NormalFloat with doubly quantised scales (QLoRA, Dettmers et al. 2023).
- ``int8``: 8-bit weights, a scale for each output (LLM.int8(), Dettmers et al. 2022); activations stay in
  ``engine.dtype``. bitsandbytes' own forward on a GPU quantises activations as well, and computes features in 16 bits
  that exceed a threshold *in any row of the batch*: a row's output then depends on the other rows, so that clients of a
  pack would change each other, and under DP-SGD clipping a row's gradient would not bound what the row changes. No
  trial finds that reliably: it depends on the rows. Multiplying by the dequantised weight is what bitsandbytes itself
  does in training on a CPU; it is exact for any rows, and loses less than quantised activations do.

Which weights two machines get from one checkpoint may differ in the last digit of a block's scale: bitsandbytes takes
a mean over blocks, whose order depends on the device and its threads. What machines compare is therefore the
checkpoint's weights and what each layer was quantised to (:func:`describe`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D

from fedlora.config import ConfigError
from fedlora.messages import first_line
from fedlora.models.quiet import quiet
from fedlora.models.structure import kept_whole


def settings(quantization: str, dtype: torch.dtype, heads: list[str] | None) -> BitsAndBytesConfig:
    """Return what ``from_pretrained`` takes as ``quantization_config`` to make the same weights.

    Args:
        quantization: ``nf4`` or ``int8``.
        dtype: Of everything else in the model.
        heads: Modules that stay as they are; None: the output layer and what is tied, as transformers finds them.
    """
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=heads,
    )


def quantise(model: Any, quantization: str, heads: Sequence[str], device: torch.device) -> None:
    """Replace the linear layers of a loaded model by quantised ones, on ``device``.

    The output layer of a language model, heads, embeddings and norms stay as they are, and so does what a family keeps
    in float32.

    Args:
        model: The model, in the dtype that its layers are to compute in.
        quantization: ``nf4`` or ``int8``.
        heads: The modules at its top that hold the head.
        device: Where the quantised weights go; the rest stays where it is.
    """
    config = settings(quantization, next(model.parameters()).dtype, list(heads) or None)
    _replace(model, config, kept_whole(model, heads), device)
    model.config.quantization_config = config
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = quantization == "int8", quantization == "nf4"  # PEFT asks


def _replace(model: nn.Module, config: BitsAndBytesConfig, kept: list[str], device: torch.device) -> None:
    """Replace linear layers, one after the other, by quantised ones on ``device``."""
    plain: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    with quiet():
        replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    for name in list(plain):
        before = plain.pop(name)  # each plain weight is freed when it is quantised
        layer: Any = model.get_submodule(name)
        if layer is before:
            continue
        weight = before.weight.data.T if isinstance(before, Conv1D) else before.weight.data
        how = {key: value for key, value in vars(layer.weight).items() if key not in ("CB", "SCB")}
        layer.weight = type(layer.weight)(weight.cpu(), requires_grad=False, **how).to(device)
        layer.bias = before.bias
    leave_rows_alone(model)


def leave_rows_alone(model: nn.Module) -> None:
    """Have quantised layers compute each row by itself, in the model's dtype, with gradients at any time."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt):
            module.__class__ = Int8Linear
        elif isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            # On CPUs with bfloat16 it would repack its weight when a model is evaluated, for a kernel that computes in
            # bfloat16 and lets no gradient through: whatever is trained below the layer would train no more.
            module.support_avx512bf16_for_cpu = False


def describe(model: nn.Module) -> str:
    """Return which layers hold quantised weights, and how each is quantised; empty where none does."""
    lines = []
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight
            lines.append(f"{name} {weight.quant_type} {weight.blocksize} {weight.compress_statistics}")
        elif isinstance(module, bnb.nn.Linear8bitLt):
            lines.append(f"{name} int8")
    return "\n".join(sorted(lines))


def try_quantisation(quantization: str, dtype: torch.dtype, device: torch.device) -> None:
    """Quantise a small layer and multiply by it, there and back.

    Raises:
        ConfigError: bitsandbytes does not compute on this device.
    """
    try:
        layer = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
        _replace(layer, settings(quantization, dtype, None), [], device)
        layer.to(device)(torch.ones(2, 64, dtype=dtype, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # of kernels and libraries that are not there, in whatever words
        raise ConfigError(
            f"model.quantization = {quantization!r}: bitsandbytes {bnb.__version__} does not compute on this machine's "
            f"{device.type} ({first_line(error)}); set 'none', or use a machine that it supports."
        ) from error


@final
class Int8Linear(bnb.nn.Linear8bitLt):  # type: ignore[misc]
    """A linear layer with 8-bit weights and activations as they are: a row's output depends on that row alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        product: Tensor = _Product.apply(x, self.weight, self.weight.SCB, self.bias)  # type: ignore[no-untyped-call]
        return product


class _Product(torch.autograd.Function):
    """``x W^T`` by dequantised weights, which are made again for the backward pass and so take no memory between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Return the product, and the bias where there is one."""
        ctx.weight, ctx.scale = weight, scale  # frozen, and there anyway: no activation is kept
        return functional.linear(x, _dequantised(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of ``x`` alone; the rest is frozen."""
        return grads[0] @ _dequantised(ctx.weight, ctx.scale, grads[0].dtype), None, None, None


def _dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.data.to(dtype).mul_((scale / 127.0).unsqueeze(1))
