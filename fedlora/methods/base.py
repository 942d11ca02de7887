"""What a low-rank method is: named tensors, and the function that makes layers' updates from them.

A method has no part in clients, servers, privacy or Flower. Shapes are written with `*` for "nothing,
or the axis G of groups (clients of a pack)"; only negative dimensions are used, so the same code serves
one client and a pack of many.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.methods.factors import Factor

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Layer:
    """A layer of the base model: a linear one, or a norm of the head.

    Attributes:
        name: Its full module name.
        d_in: Number of input features.
        d_out: Number of output features.
        bias: Whether it has a bias.
        fan_in_fan_out: Whether its weight is stored as [d_in, d_out] (GPT-2's Conv1D).
        norm: Whether it is a norm, with one weight (and bias) a feature.
    """

    name: str
    d_in: int
    d_out: int
    bias: bool
    fan_in_fan_out: bool
    norm: bool = False


_BLOCK = re.compile(r"(.*?\.)?\d+(?=\.)")  # a name up to its first part that is a number, and not the last one


@final
@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a method owns.

    Attributes:
        shape: Its shape, without a group axis.
        kind: What strategies call it by when they give it a role: ``"A"``, ``"B"``, ``"s"``, ``"head"`` ... A kind
            that is a part of a factor begins with that factor's letter: ``"A_private"``.
        factors: Names of the products it is a factor of. Tensors of one product may hide each other's
            gradient (A has none while B is 0); tensors of different products may not.
        bound: It starts uniform on [-bound, bound); 0 means that it starts at ``start``.
        l1: Weight of an L1 penalty on it. It is applied as a proximal step: a soft threshold of learning rate times
            this, after each optimizer step and once more on the server's mean.
        rank_axis: The axis that counts ranks, where a client may hold fewer of them than the server; None: none does.
        start: What all of it starts at, without a bound.
        linear: Whether the layer's update is linear in it, or affine, while the other factors stay as they are.
        orthonormal: Whether it is drawn orthonormal, in place of uniform: rows, or columns where these are fewer.
        computed: Whether the server computes it before the first round (``method.init``) and sends it, whatever the
            strategy; nobody trains it. What the seed gives only stands in for it while an engine is tried.
    """

    shape: tuple[int, ...]
    kind: str
    factors: tuple[str, ...]
    bound: float
    l1: float = 0.0
    rank_axis: int | None = None
    start: float = 0.0
    linear: bool = True
    orthonormal: bool = False
    computed: bool = False

    @cached_property
    def block(self) -> str:
        """The block (transformer layer) that its products are in, such as ``model.layers.3``; empty: none, or several.

        That is a layer's name up to the first part that is a number. A head has none.
        """
        found = [_BLOCK.match(product) for product in self.factors if self.kind != "head"]
        blocks = {one.group() if one else "" for one in found}
        return blocks.pop() if len(blocks) == 1 else ""


class ScaledPair(NamedTuple):
    """A layer's update ``scale * B A``, or what has that one's gradients, of two tensors and nothing else."""

    a: str  # the name of A [r, d_in]
    b: str  # the name of B [d_out, r]
    scale: float


class PeftAdapter(NamedTuple):
    """A method's tensors as an adapter of a type that PEFT has for it.

    Attributes:
        kind: The name of the type, in ``peft.PeftType``.
        settings: Fields of its configuration, ``target_modules`` among them; not those that follow from model and task.
        weights: Its tensors, by the name that PEFT saves them with.
    """

    kind: str
    settings: dict[str, Any]
    weights: dict[str, Tensor]


class Fault(Enum):
    """What may be wrong with a tensor after training, where a method's own keys may be behind it."""

    HIDDEN = "all that it is multiplied with is zero and stays so"
    ZEROED = "the proximal step of its L1 penalty set all of it to zero"


class Method(ABC):
    """A low-rank parametrisation of a set of layers, or a head."""

    @abstractmethod
    def specs(self) -> dict[str, TensorSpec]:
        """Return the method's tensors by name."""

    @abstractmethod
    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factor]:
        """Return, by layer name, what each layer computes from ``tensors`` (a pure function)."""

    def penalty(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return what is added to the loss of each group whatever its data, [*]; None for nothing."""
        return None

    def scaled_pairs(self) -> list[ScaledPair]:
        """Return each layer's update as a product of two tensors; empty: it is none, see ``train.gradient``."""
        return []

    def constants(self) -> dict[str, NDArray[Any]]:
        """Return fixed numbers beside the tensors that every machine must agree on, by name (:mod:`.fixed`)."""
        return {}

    def folded(
        self, tensors: Mapping[str, NDArray[np.floating]], modules: Sequence[int]
    ) -> dict[str, NDArray[np.floating]]:
        """Return what a client that trains some modules alone has of the others, as fixed tensors of its own, by name.

        :meth:`factors` of these and of the trained modules is that of ``tensors``.

        Args:
            tensors: The whole of each tensor.
            modules: The places of the trained modules on the rank axes, ascending.

        Raises:
            TypeError: It is no method of modules.
        """
        raise TypeError(f"{type(self).__name__} has no modules that a client could train some of")

    def peft_adapter(self, tensors: Mapping[str, Tensor]) -> PeftAdapter | None:
        """Return the method's own type of PEFT adapter; None: its factors are a LoRA there."""
        return None

    def advice(self, fault: Fault) -> str:
        """Return what of this method's own keys is likely to be behind a fault of training; empty: nothing."""
        return ""


class LowRankMethod(Method):
    """A method that ``method.name`` may choose: it is built from the configuration."""

    strategies: ClassVar[tuple[str, ...]] = ()
    """Strategies that work with it, beside those that name it among their ``methods``: they are older than it."""
    rank_is_bounded: ClassVar[bool] = True
    """Whether ranks above the layers' features are refused, as they would add nothing."""
    ragged: ClassVar[bool] = False
    """Whether clients may hold different ranks of it (``method.ranks``): its tensors have rank axes."""
    inits: ClassVar[tuple[str, ...]] = ()
    """Values of ``method.init`` that it knows, beside ``auto``."""
    no_adapter: ClassVar[str] = ""
    """Why its update is no PEFT adapter, so that none is exported; empty: it is one."""

    def peft_adapter(self, tensors: Mapping[str, Tensor]) -> PeftAdapter | None:
        """Return the method's own type of PEFT adapter; None: its factors are a LoRA there.

        Raises:
            ValueError: Its update is no PEFT adapter.
        """
        if self.no_adapter:
            raise ValueError(f"the method cannot be exported to PEFT: {self.no_adapter}.")
        return None

    @classmethod
    @abstractmethod
    def build(cls, layers: Sequence[Layer], config: Config) -> Method:
        """Return the method on these layers; its own keys are ``config.options(...)``.

        Raises:
            ValueError: The configuration does not fit the layers. On no layers: what does not depend on the model.
        """

    @classmethod
    def whole_rank(cls, config: Config) -> tuple[str, int]:
        """Return the most that ``method.ranks`` may give a client, behind the key that says it."""
        return "method.rank", config.method.rank

    @classmethod
    def without_penalties(cls, config: Config) -> Config:
        """Return the configuration with nothing left that moves tensors whatever the data: for audits of gradients."""
        return config
