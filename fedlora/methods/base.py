"""What a low-rank method is: named tensors, and the function that makes layers' updates from them.

A method has no part in clients, servers, privacy or Flower. Shapes are written with `*` for "nothing,
or the axis G of groups (clients of a pack)"; only negative dimensions are used, so the same code serves
one client and a pack of many.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, MethodConfig, require
from fedlora.methods.scaled_bases import ScaledBases
from fedlora.methods.square import Square
from fedlora.methods.top_ranks import TopRanks
from fedlora.seeded import Seeded

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


class LowRank(NamedTuple):
    """What a layer adds to its base: ``y = W x + out_scale * B (scale * A x)``, and the same of a residual."""

    A: Tensor  # [*, r, d_in]
    B: Tensor  # [*, d_out, r]
    scale: float | Tensor  # one number, or one for each rank [*, r]
    residual: LowRank | None = None  # without one of its own; common to all groups, or [*]
    out_scale: Tensor | None = None  # one number for each output [*, d_out]; None: 1

    def scaled_b(self) -> Tensor:
        """Return B with both scales folded in, [*, d_out, r]."""
        b = self.B * (self.scale if isinstance(self.scale, float) else self.scale.unsqueeze(-2))
        return b if self.out_scale is None else b * self.out_scale.unsqueeze(-1)


class ScaledPair(NamedTuple):
    """A layer's update ``scale * B A``, or what has that one's gradients, of two tensors and nothing else."""

    a: str  # the name of A [r, d_in]
    b: str  # the name of B [d_out, r]
    scale: float


class WeightDecomposed(NamedTuple):
    """A layer whose weight is split in magnitude and direction: ``y = m (W x + B A x) / |W + B A| + bias``.

    Norms are those of rows, one an output, and constants in gradients.
    """

    update: LowRank  # without a residual
    magnitude: Tensor  # m - |W|, [*, d_out]


class Experts(NamedTuple):
    """What a layer adds to its base where a router weighs several low-rank updates for each token of its input x.

    The router's first M outputs are of the M experts, the rest of the client's own one; the M largest count, by their
    softmax.
    """

    own: LowRank  # the client's own expert
    all: LowRank  # the M experts side by side, A [*, M r, d_in] and B [*, d_out, M r]
    router: Tensor  # [*, 2 M - 1, d_in]
    is_own: Tensor  # [*, M], 1 where it is the client's own, whose weight goes to ``own``, and else 0


class Dense(NamedTuple):
    """A layer that is replaced: ``y = weight x + bias``."""

    weight: Tensor  # [*, d_out, d_in]
    bias: Tensor | None  # [*, d_out]


class Scale(NamedTuple):
    """A norm whose features are scaled anew: ``y = norm(x) * weight + bias``."""

    weight: Tensor  # [*, d]
    bias: Tensor | None  # [*, d]


Factor = LowRank | WeightDecomposed | ScaledBases | Square | TopRanks | Experts | Dense | Scale


def as_low_rank(factor: Factor) -> LowRank | None:
    """Return what a factor adds to its layer as one product, for exports and reports; None: it adds nothing to one.

    That of scaled bases has as many ranks as its layer has features, and more. Of a weight-decomposed layer it is what
    is added before its rows are brought to their magnitudes. Where it is another one for each token there is none.
    """
    if isinstance(factor, ScaledBases | Square):
        return LowRank(*factor.product(), 1.0)
    if isinstance(factor, WeightDecomposed):
        return factor.update
    return factor if isinstance(factor, LowRank) else None


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
        """
        raise NotImplementedError(f"{type(self).__name__} has no modules that a client could train some of")

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


def concatenated(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Return matrices [*, n, m] one behind the other; some may be common to the groups of a pack and others not.

    Args:
        parts: The matrices.
        dim: Where they are put together, -2 or -1.
    """
    import torch

    lead = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))  # type: ignore[no-untyped-call]
    return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in parts], dim)


def refuse_rslora(config: Config) -> None:
    """Refuse ``method.rslora`` for a method that scales by alpha / rank."""
    if config.method.rslora:
        raise ValueError(f"method.rslora = true: is read by lora; {config.method.name} scales by alpha / rank.")


def refuse_scale(config: Config) -> None:
    """Refuse ``method.alpha`` and ``method.rslora`` for a method without a scale."""
    rule = f"{config.method.name} has no scale alpha / r: leave it at its default."
    for key in ("alpha", "rslora"):
        value = getattr(config.method, key)
        require(value == getattr(MethodConfig, key), f"method.{key}", value, rule)


def check_products(config: Config, method: Method) -> None:
    """Refuse a ``train.gradient`` that has to know each layer's A and B, where a method has none."""
    gradient, name, init = config.train.gradient, config.method.name, config.method.init
    start = "" if init == "auto" else f" and method.init = {init!r}"
    rule = f"is of a product B A of two tensors, and a layer's update is none with {name!r}{start}; use 'plain', or a "
    rule += "method such as 'lora', with method.init = 'auto'."
    require(gradient == "plain" or bool(method.scaled_pairs()), "train.gradient", gradient, rule)


def check_init(config: Config, known: Sequence[str]) -> None:
    """Refuse a ``method.init`` that the method does not know."""
    init, rule = config.method.init, f"method {config.method.name!r} knows {', '.join(('auto', *known))}."
    require(init in ("auto", *known), "method.init", init, rule)


def orthonormal(config: Config, layers: Sequence[Layer], rank: int) -> bool:
    """Return whether factors are to be drawn orthonormal, by ``method.init``.

    Args:
        config: The configuration.
        layers: The adapted layers.
        rank: Rows of A and columns of B.

    Raises:
        ConfigError: A layer has fewer features than that.
    """
    init = config.method.init
    if init == "auto":
        return False
    for layer in layers:
        features = min(layer.d_in, layer.d_out)
        rule = f"{rank} orthonormal vectors do not fit into the {features} features of {layer.name}; lower method.rank."
        require(rank <= features, "method.init", init, rule)
    return init == "orthonormal"


def fixed(kind: str, shape: tuple[int, int], product: tuple[str, ...], orthonormal: bool) -> TensorSpec:
    """Return a fixed A [r, d_in] or B [d_out, r], whose rows or columns have length one, on average or exactly.

    Args:
        kind: ``A`` or ``B``.
        shape: Its shape.
        product: The products that it is a factor of.
        orthonormal: What :func:`orthonormal` says.
    """
    features = shape[1] if kind == "A" else shape[0]
    return TensorSpec(shape, kind, product, math.sqrt(3 / features), orthonormal=orthonormal)


def count_parameters(specs: Mapping[str, TensorSpec]) -> int:
    """Return the number of elements of these tensors."""
    return sum(math.prod(spec.shape) for spec in specs.values())


def payload_bytes(specs: Mapping[str, TensorSpec], dtype: str) -> int:
    """Return the bytes of these tensors in a message, without its manifest."""
    return count_parameters(specs) * np.dtype(dtype).itemsize


def initial_tensors(
    specs: Mapping[str, TensorSpec], seeded: Seeded, dtype: str = "float64", round_number: int = 0
) -> dict[str, NDArray[np.floating]]:
    """Return the tensors as every machine with the same seed starts them, without a group axis.

    Each is keyed by its own name, so layers of one shape still start differently.

    Args:
        specs: The tensors.
        seeded: The run's seed.
        dtype: Of the tensors.
        round_number: The round, from 1, for which tensors that start anew in each round are drawn; 0: those of the run.
    """
    key = (round_number,) if round_number else ()

    def start(name: str, spec: TensorSpec) -> NDArray[np.float64]:
        if not spec.bound:
            return np.full(spec.shape, spec.start)
        if spec.orthonormal:
            return seeded.orthonormal("init", name, *key, shape=spec.shape)
        return seeded.uniform("init", name, *key, shape=spec.shape, bound=spec.bound)

    return {name: start(name, spec).astype(dtype) for name, spec in specs.items()}


def zero_kinds(specs: Mapping[str, TensorSpec]) -> dict[str, dict[str, bool]]:
    """Return by product, for each kind that is a factor of it, whether it starts at zero."""
    products: dict[str, dict[str, bool]] = {}
    for spec in specs.values():
        for product in spec.factors:
            products.setdefault(product, {})[spec.kind] = spec.bound == spec.start == 0.0
    return products


def check_start(specs: Mapping[str, TensorSpec]) -> None:
    """See to it that each product starts at zero, and can leave it: exactly one of its factors is zero.

    With two zero factors no gradient ever comes; with none the model does not start as its base. A layer that is
    replaced, as a head is, is no product; neither is an update of one tensor, which must not start at zero where it is
    not linear in it, as it would have no gradient there.
    """
    products = zero_kinds(specs)
    for product, kinds in products.items():
        factors = {kind[0]: zero for kind, zero in kinds.items()}
        zero = [factor for factor, is_zero in factors.items() if is_zero]
        assert len(factors) == 1 or len(zero) == 1, f"{product}: of {', '.join(factors)} one must start at zero: {zero}"
    for name, spec in specs.items():
        alone = any(len(products[product]) == 1 for product in spec.factors)
        at_zero = spec.bound == spec.start == 0.0
        assert spec.linear or not alone or not at_zero, f"{name} must not start at zero: it would have no gradient"


T = TypeVar("T", bound="NDArray[np.floating] | Tensor")


def soft_threshold(x: T, threshold: T | float) -> T:
    """Return ``sign(x) max(|x| - threshold, 0)``, the proximal step of an L1 penalty; of an array or a tensor."""
    whole: Any = x
    result: T = whole - whole.clip(-threshold, threshold)
    return result


def proximal_step(
    tensors: Mapping[str, NDArray[np.floating]], specs: Mapping[str, TensorSpec], learning_rate: float
) -> dict[str, NDArray[np.floating]]:
    """Return those of the tensors that have an L1 weight, after a proximal step of its penalty."""
    return {name: soft_threshold(tensors[name], learning_rate * spec.l1) for name, spec in specs.items() if spec.l1}


def tensors_digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return a SHA-256 digest of tensors with their names, shapes and dtypes."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name}{value.shape}{value.dtype}".encode() + np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()
