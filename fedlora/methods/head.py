"""The head: the linear layers and norms that a task puts on top of the base model, trained in full.

Weights start uniform on +-1/sqrt(d_in) (PyTorch's default for a linear layer), those of norms at one and biases at
zero, from the run's seed on every machine, also when the head is never trained: a head drawn by each client for itself
would make the clients' metrics incomparable. Where the checkpoint has trained a head for the same classes, it starts as
that one (``method.head-start``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.methods.base import Fault, Layer, Method, PeftAdapter, ScaledPair, TensorSpec
from fedlora.methods.factors import Dense, Factor, Scale

if TYPE_CHECKING:
    from torch import Tensor


@final
class Head(Method):
    """Dense layers and norms, joined to a method as one.

    Args:
        method: The low-rank method whose tensors and factors stand beside the head's.
        layers: The head's layers.
    """

    def __init__(self, method: Method, layers: Sequence[Layer]) -> None:
        self.method = method
        self.layers = tuple(layers)

    def specs(self) -> dict[str, TensorSpec]:
        """Return the method's tensors, then ``<layer>.weight`` [d_out, d_in], of norms [d], and ``<layer>.bias``."""
        specs = self.method.specs()
        for layer in self.layers:
            if layer.norm:
                weight = TensorSpec((layer.d_out,), "head", (layer.name,), 0.0, start=1.0)
            else:
                weight = TensorSpec((layer.d_out, layer.d_in), "head", (layer.name,), 1.0 / math.sqrt(layer.d_in))
            specs[f"{layer.name}.weight"] = weight
            if layer.bias:
                specs[f"{layer.name}.bias"] = TensorSpec((layer.d_out,), "head", (f"{layer.name}.bias",), 0.0)
        return specs

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return the method's factors and the head's layers."""
        factors = self.method.factors(tensors)
        for layer in self.layers:
            own = tensors[f"{layer.name}.weight"], tensors.get(f"{layer.name}.bias")
            factors[layer.name] = Scale(*own) if layer.norm else Dense(*own)
        return factors

    def scaled_pairs(self) -> list[ScaledPair]:
        """Return the method's; the head has none."""
        return self.method.scaled_pairs()

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the method's penalty; the head has none."""
        return self.method.penalty(tensors)

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return the method's constants."""
        return self.method.constants()

    def folded(
        self, tensors: Mapping[str, NDArray[np.floating]], modules: Sequence[int]
    ) -> dict[str, NDArray[np.floating]]:
        """Return the method's fixed tensors; the head has no modules, and all of it is trained."""
        return self.method.folded(tensors, modules)

    def peft_adapter(self, tensors: Mapping[str, Tensor]) -> PeftAdapter | None:
        """Return the method's own type of PEFT adapter, without the head."""
        return self.method.peft_adapter(tensors)

    def advice(self, fault: Fault) -> str:
        """Return the method's advice."""
        return self.method.advice(fault)
