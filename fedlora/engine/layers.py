"""Grouped layers: one base layer for all rows of a batch, each row with its own client's factors.

Shapes: rows are sequences. `N` rows of a batch, `G` groups (clients of a pack), `S` row slots a group,
`T` positions, `d` features, `r` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.engine.decomposed import gain, squared_norms
from fedlora.engine.kernels import low_rank
from fedlora.engine.kernels.attention import rows_in_place, without_cudnn
from fedlora.engine.layout import Layout
from fedlora.engine.unpadded import blocks_without_padding
from fedlora.methods import Dense, Experts, Factor, LowRank, Scale, ScaledBases, Square, TopRanks, WeightDecomposed


class LayerProbe(Protocol):
    """What may stand in for a layer's sum of base and update, see :mod:`fedlora.engine.probe`."""

    def output(self, x: Tensor, own: Callable[[Tensor], Tensor], fixed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return the layer's output for ``x``; ``own`` is what its factor computes, ``fixed`` what it is added to."""


class Replaced(Protocol):
    """A replaced layer whose gradient is taken row by row without a weight for each row."""

    def output(self, x: Tensor) -> Tensor:
        """Return what the layer makes of the batch's rows ``x`` [N, ..., d_in]."""


@final
class NoRowsError(ValueError):
    """A model calls a layer on something else than the batch's rows, so that groups cannot be told apart there."""

    def __init__(self, layer: str) -> None:
        super().__init__(f"the model calls {layer} on something else than the rows of a batch")
        self.layer = layer


@final
class GroupedLayer(nn.Module):
    """A base layer that adds what its factor says for each row's group.

    It calls the base layer and does not read its weight, so any kind of base layer works; of a weight-decomposed factor
    (:mod:`fedlora.engine.decomposed`) it needs the weight's norms.

    Args:
        base: The wrapped layer.
        name: Its full module name, for errors.
    """

    def __init__(self, base: nn.Module, name: str) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.factor: Factor | Replaced | None = None
        self.layout: Layout | None = None
        self.probe: LayerProbe | None = None
        self._squares: Tensor | None = None  # of a base layer, which does not change
        self._gain: Tensor | None = None

    def squares(self) -> Tensor:
        """Return the squared norms of the base layer's rows, [d_out]."""
        if self._squares is None:
            self._squares = squared_norms(self.base, self.name)
        return self._squares

    def settle(self) -> None:
        """Compute what the factor in place needs once a pass, before the layer runs, compiled or twice."""
        one = self.factor
        self._gain = gain(self.base, self.squares(), one) if isinstance(one, WeightDecomposed) else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x`` [N, ..., d_in]; without a factor, the base layer's.

        Where all rows belong to one group, ``x`` may be anything: relative positions, or rows behind another axis.

        Raises:
            NoRowsError: It is not the batch's rows, and there are several groups.
        """
        if self.factor is None:
            return self.base(x)  # type: ignore[no-any-return]
        assert self.layout is not None, "a factor without a layout"
        spans = self.layout.spans if self.probe is None else None
        # First, and by tensors' shapes alone: what is compiled holds for any number of groups.
        low = for_kernel(self.factor)
        if spans is not None and low is not None and self.layout.of_rows(x, spans.group_n.shape[0]):
            a, b = low.A.to(x.dtype), low.scaled_b().to(x.dtype)
            y = low_rank.added(self._fixed(x), x, a, b, spans)
            return y if low is self.factor else self._at_magnitude(y)
        if self.layout.groups > 1 and not self.layout.of_rows(x, self.layout.rows):
            raise NoRowsError(self.name)
        added = isinstance(self.factor, LowRank | ScaledBases | Square | TopRanks | Experts)
        if self.probe is not None:
            return self.probe.output(x, self._own, self._fixed if added else None)
        own = self._own(x)  # before the base layer: the order in which x's gradients are added up depends on it
        return self._fixed(x) + own if added else own

    def _fixed(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` without what is trained: the base layer's output and the residual's."""
        y: Tensor = self.base(x)
        residual = self.factor.residual if isinstance(self.factor, LowRank) else None
        if residual is None:
            return y
        a, b = residual.A.to(x.dtype), residual.scaled_b().to(x.dtype)
        if a.dim() == b.dim() == 2:
            return y + (x @ a.mT) @ b.mT
        assert self.layout is not None, "a factor without a layout"
        return y + self.layout.to_rows((self.layout.to_groups(x) @ a.mT) @ b.mT, x)

    def _own(self, x: Tensor) -> Tensor:
        """Return what the factor makes of ``x``: an added one's update of the base layer, or the whole output."""
        assert self.layout is not None, "a factor without a layout"
        if isinstance(self.factor, Scale):
            x_g = self.layout.to_groups(_normed(self.base, x))
            y_g = with_bias(x_g * self.factor.weight.to(x.dtype).unsqueeze(-2), self.factor.bias)
            return self.layout.to_rows(y_g, x)
        if isinstance(self.factor, LowRank):
            return self.layout.to_rows(_update(self.layout.to_groups(x), self.factor), x)
        if isinstance(self.factor, WeightDecomposed):
            own = self.layout.to_rows(_update(self.layout.to_groups(x), self.factor.update), x)
            return self._at_magnitude(self.base(x) + own)
        if isinstance(self.factor, ScaledBases | Square | TopRanks):
            return self.layout.to_rows(self.factor.of(self.layout.to_groups(x)), x)
        if isinstance(self.factor, Experts):
            return self.layout.to_rows(routed(self.factor, self.layout.to_groups(x)), x)
        if isinstance(self.factor, Dense):
            x_g = self.layout.to_groups(x)
            # In this order the weight's gradient comes as the weight lies, and is not transposed behind it.
            y_g = with_bias((self.factor.weight.to(x.dtype) @ x_g.mT).mT, self.factor.bias)
            return self.layout.to_rows(y_g, x)
        assert self.factor is not None, "no factor"
        return self.factor.output(x)

    def _at_magnitude(self, y: Tensor) -> Tensor:
        """Return outputs of base and update, [N, ..., d_out], at the magnitudes of the factor, bias apart."""
        assert self.layout is not None, "a factor without a layout"
        assert self._gain is not None, "a factor that is not settled"
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        weighted = self.layout.to_groups(y if bias is None else y - bias)
        more = weighted * (self._gain - 1.0).to(y.dtype).unsqueeze(-2)
        return y + self.layout.to_rows(more, y)  # the base's own bits where m is |W + B A|


def for_kernel(factor: Factor | Replaced | None) -> LowRank | None:
    """Return the part of a factor that the low-rank kernel computes; None: none, as of A and B for all groups."""
    low = factor.update if isinstance(factor, WeightDecomposed) else factor
    return low if isinstance(low, LowRank) and low.out_scale is None else None


def _update(x_g: Tensor, factor: LowRank) -> Tensor:
    """Return what a low-rank factor makes of inputs [G, n, d_in]; the residual is not in it."""
    low = x_g @ factor.A.to(x_g.dtype).mT
    if factor.out_scale is None:
        return low @ factor.scaled_b().to(x_g.dtype).mT
    # Scaled apart, so that no group has an A or B of its own where they are common to all.
    scale = factor.scale if isinstance(factor.scale, float) else factor.scale.to(x_g.dtype).unsqueeze(-2)
    return (low * scale) @ factor.B.to(x_g.dtype).mT * factor.out_scale.to(x_g.dtype).unsqueeze(-2)


def routed(experts: Experts, x_g: Tensor) -> Tensor:
    """Return the update [G, n, d_out] of tokens [G, n, d_in], each with the experts that the router weighs for it.

    The experts that are not trained may be common to all groups: then each is one matrix product for all tokens.
    """
    own_g, rest_g = router_weights(experts, x_g)
    hidden_g = x_g @ experts.own.A.to(x_g.dtype).mT * own_g
    y_g = hidden_g @ experts.own.scaled_b().to(x_g.dtype).mT
    hidden_g = x_g @ experts.all.A.to(x_g.dtype).mT  # [G, n, M r]
    weighed_g: Tensor = hidden_g.unflatten(-1, (rest_g.shape[-1], -1)) * rest_g.unsqueeze(-1)  # type: ignore[no-untyped-call]
    return y_g + weighed_g.flatten(-2) @ experts.all.scaled_b().to(x_g.dtype).mT


def router_weights(experts: Experts, x_g: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's weight of the own expert [G, n, 1], and of all of them [G, n, M], 0 for the own one."""
    wide, count = torch.promote_types(x_g.dtype, torch.float32), experts.is_own.shape[-1]
    output_g = x_g.to(wide) @ experts.router.to(wide).mT  # [G, n, 2 M - 1]
    largest = output_g.topk(count, -1)
    weight_g = torch.zeros_like(output_g).scatter(-1, largest.indices, largest.values.softmax(-1)).to(x_g.dtype)
    first_g, is_own = weight_g[..., :count], experts.is_own.to(x_g.dtype).unsqueeze(-2)
    own_g = (first_g * is_own).sum(-1, keepdim=True) + weight_g[..., count:].sum(-1, keepdim=True)
    return own_g, first_g * (1.0 - is_own)


def with_bias(y_g: Tensor, bias_g: Tensor | None) -> Tensor:
    """Return outputs [G, ..., d] with each group's bias [G, d] added."""
    return y_g if bias_g is None else y_g + bias_g.to(y_g.dtype).unsqueeze(-2)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm makes of ``x`` before its own weight and bias."""
    if isinstance(norm, nn.LayerNorm):
        return functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    assert isinstance(norm, nn.RMSNorm), "a norm of a third kind"
    return functional.rms_norm(x, norm.normalized_shape, eps=norm.eps)


@final
class GroupedModel:
    """A base model whose adapted layers and head are grouped layers.

    Args:
        model: The base model; its layers are wrapped in place.
        layers: Names of the layers to wrap.

    Attributes:
        blocks: Modules of the base model that do not run as they are, with what runs in their place: compiled, or
            checkpointed (:mod:`fedlora.engine.blocks`).
        checkpointed: Whether they are the latter.
        unpadded: The model's blocks in their order, where they run on tokens side by side; none: on padded rows.
        placement: Moves what a pass puts in place to where layers are (:mod:`fedlora.engine.cards`); None: it is there.
    """

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.model = model
        self.blocks: dict[nn.Module, Callable[..., Any]] = {}
        self.checkpointed = False
        self.unpadded: Sequence[nn.Module] = ()
        self.placement: Callable[[], None] | None = None
        self._within: list[GroupedLayer] = []
        self._slots: dict[str, GroupedLayer] = {}
        for name in layers:
            self._slots[name] = GroupedLayer(model.get_submodule(name), name)
            self._place(name, self._slots[name])

    def run_unpadded(self, blocks: Sequence[nn.Module]) -> None:
        """Have these blocks, in the model's order, run on tokens side by side; none: on padded rows."""
        self.unpadded = tuple(blocks)
        self._within = [one for block in blocks for one in block.modules() if isinstance(one, GroupedLayer)]

    @contextmanager
    def placed(
        self,
        factors: Mapping[str, Factor | Replaced],
        layout: Layout,
        probe: LayerProbe | None = None,
        *,
        compiled: bool = True,
    ) -> Iterator[nn.Module]:
        """Put ``factors`` in place for one batch; the backward pass must run inside, too.

        Args:
            factors: What each wrapped layer computes, by name.
            layout: Which row belongs to which group.
            probe: Stands in for the layers' sum of base and update, to find out what is connected to what.
            compiled: Whether ``blocks`` run what they have in their place.
        """
        assert factors.keys() == self._slots.keys(), "factors for other layers than the wrapped ones"
        batch = layout.unpadded if probe is None else None
        before: dict[nn.Module, Any] = {}
        try:
            for name, slot in self._slots.items():
                slot.factor, slot.layout, slot.probe = factors[name], layout, probe
            if self.placement is not None:
                self.placement()
            for slot in self._slots.values():
                slot.settle()
            blocks = self.blocks if compiled and probe is None else {}
            if batch is not None:
                for slot in self._within:
                    slot.layout = batch.layout
                blocks = blocks_without_padding(batch, self.unpadded, blocks)
            for block, forward in blocks.items():
                before[block] = vars(block).get("forward")  # of a block on its own GPU: accelerate's
                block.forward = forward
            with without_cudnn(), nullcontext() if batch is None else rows_in_place(batch.rows):
                yield self.model
        finally:
            for block, hooked in before.items():
                del block.forward
                if hooked is not None:
                    block.forward = hooked
            for slot in self._slots.values():
                slot.factor, slot.layout, slot.probe = None, None, None
                slot.settle()  # nothing of the pass stays

    def magnitude(self, name: str, factor: WeightDecomposed) -> Tensor:
        """Return m of a wrapped layer that is weight-decomposed, [*, d_out]."""
        norms = self._slots[name].squares().sqrt()
        return norms + factor.magnitude.to(norms)

    @contextmanager
    def untouched(self) -> Iterator[nn.Module]:
        """Give the base model back as it was before its layers were wrapped; afterwards they are wrapped again.

        Whoever takes it may replace layers, and modules at its top, by others: they are put back, too.
        """
        top = dict(self.model.named_children())
        before = dict(vars(self.model))
        for name, slot in self._slots.items():
            self._place(name, slot.base)
        try:
            yield self.model
        finally:
            for attribute in vars(self.model).keys() - before.keys():
                delattr(self.model, attribute)
            for name, module in top.items():
                setattr(self.model, name, module)
            for name, slot in self._slots.items():
                self._place(name, slot)

    def _place(self, name: str, module: nn.Module) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(parent), attribute, module)
