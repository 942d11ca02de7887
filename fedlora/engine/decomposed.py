"""Weight-decomposed layers (DoRA): what their outputs are scaled by, without d_out x d_in numbers for each client.

The norm of a row of ``W + B A``, with the scale in B, follows from what a client has few numbers of:
``|W_i + B_i A|^2 = |W_i|^2 + 2 B_i A W_i^T + B_i A A^T B_i^T``, where A W^T has r numbers for each output. Under DP,
where each row is a group, that is less than the row's activations. In 16 bits the squares are added in float32, and
only A W^T is rounded.

This is the one place that reads a base layer's weight; a quantised one is dequantised for as long as A W^T is computed,
by PEFT's own function, which knows the same kinds of layers as PEFT's DoRA.
"""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.methods import WeightDecomposed


def weight_of(base: nn.Module) -> Tensor:
    """Return the weight of a linear layer, [d_out, d_in]; of a quantised one what it computes with."""
    weight: Tensor = dequantize_module_weight(base).detach()
    return weight.mT if isinstance(base, Conv1D) else weight


def squared_norms(base: nn.Module, name: str) -> Tensor:
    """Return |W_i|^2 for each output of a base layer, [d_out].

    Raises:
        ValueError: The weight cannot be read, or a row of it is zero.
    """
    with torch.inference_mode(mode=False), torch.no_grad():  # else what an evaluation made could not be trained with
        try:
            weight = weight_of(base)
        except Exception as error:  # whatever a library for quantised layers raises
            raise ValueError(
                f"method.name = 'dora': the weight of {name} ({type(base).__name__}), whose norms it needs, cannot be "
                "read; choose another method, or a base that is quantised otherwise or not at all."
            ) from error
        squares = weight.to(_wide(weight)).square().sum(1)
    empty = int((squares == 0).sum())
    if empty:
        raise ValueError(
            f"method.name = 'dora': {name} has {empty} outputs whose weights are all zero in the base model: they have "
            "no direction. Leave this layer out of method.target-modules, or choose another method."
        )
    return squares


def gain(base: nn.Module, squares: Tensor, factor: WeightDecomposed) -> Tensor:
    """Return ``m / |W + B A|`` for each output, [*, d_out]; the norm is a constant in gradients.

    Args:
        base: The base layer.
        squares: Its :func:`squared_norms`.
        factor: What it is adapted by.
    """
    with torch.no_grad():
        weight, wide = weight_of(base), squares.dtype
        a, b = factor.update.A.to(weight.dtype), factor.update.scaled_b().to(weight.dtype)
        along, a, b = (a @ weight.mT).to(wide), a.to(wide), b.to(wide)  # [*, r, d_out]
        added = 2.0 * (along * b.mT).sum(-2) + (b @ (a @ a.mT) * b).sum(-1)
        norm = (squares + added).sqrt()
    return (squares.sqrt() + factor.magnitude.to(wide)) / norm


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
