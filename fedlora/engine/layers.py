"""Grouped layers: one base layer for all rows of a batch, each row with its own client's factors.

Shapes: rows are sequences. `N` rows of a batch, `G` groups (clients of a pack), `S` row slots a group,
`T` positions, `d` features, `r` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedlora.engine.kernels import low_rank
from fedlora.methods import Dense, Factor, LowRank, Scale
from fedlora.transfer import Spans, to_device


@final
@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch sit among the groups of a pack.

    Attributes:
        groups: G.
        slots: S, the largest number of rows of a group.
        index_n: For each row its place ``group * S + slot``; None when rows are sorted by group and every
            group has exactly S (then places are row numbers).
        spans: For the low-rank kernel each row's group and each group's first row; None: it is not used.
    """

    groups: int
    slots: int
    index_n: Tensor | None
    spans: Spans | None = None

    @classmethod
    def of(cls, group_n: NDArray[np.int64], groups: int, device: torch.device, *, kernel: bool = False) -> Layout:
        """Return the layout of rows that belong to the groups ``group_n`` ([N]), made on the host.

        Args:
            group_n: The group of each row.
            groups: G.
            device: Where the rows are.
            kernel: Whether the low-rank kernel computes; rows are then sorted by group.
        """
        counts = np.bincount(group_n, minlength=groups)
        slots, starts = int(counts.max()), np.cumsum(counts) - counts
        order = np.argsort(group_n, kind="stable")
        slot_n = np.empty_like(group_n)
        slot_n[order] = np.arange(len(group_n)) - starts[group_n[order]]
        index_n = group_n * slots + slot_n
        even = len(index_n) == groups * slots and bool((index_n == np.arange(len(index_n))).all())
        spans = Spans.of(group_n, groups, device) if kernel else None
        return cls(groups, slots, None if even else to_device(index_n, device), spans)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return self.groups * self.slots if self.index_n is None else len(self.index_n)

    def to_groups(self, x_n: Tensor) -> Tensor:
        """Turn [N, ..., d] into [G, S * ..., d]; places without a row are zero."""
        if self.index_n is not None:
            empty = x_n.new_zeros((self.groups * self.slots, *x_n.shape[1:]))
            x_n = empty.index_copy(0, self.index_n, x_n)
        return x_n.reshape(self.groups, -1, x_n.shape[-1])

    def to_rows(self, x_g: Tensor, like: Tensor) -> Tensor:
        """Turn [G, S * ..., d] back into [N, ..., d], with the middle dimensions of ``like``."""
        x_n = x_g.reshape(-1, *like.shape[1:-1], x_g.shape[-1])
        return x_n if self.index_n is None else x_n.index_select(0, self.index_n)


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

    It calls the base layer and never reads its weight, so any kind of base layer works.

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
        if spans is not None and isinstance(self.factor, LowRank) and x.shape[0] == spans.group_n.shape[0]:
            a, b = self.factor.A.to(x.dtype), self.factor.scaled_b().to(x.dtype)
            return low_rank.added(self._fixed(x), x, a, b, spans)
        if self.layout.groups > 1 and x.shape[0] != self.layout.rows:
            raise NoRowsError(self.name)
        added = isinstance(self.factor, LowRank)
        if self.probe is not None:
            return self.probe.output(x, self._own, self._fixed if added else None)
        own = self._own(x)  # before the base layer: the order in which x's gradients are added up depends on it
        return self._fixed(x) + own if added else own

    def _fixed(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` alike for all groups: the base layer's output and the residual's."""
        y: Tensor = self.base(x)
        residual = self.factor.residual if isinstance(self.factor, LowRank) else None
        if residual is None:
            return y
        assert residual.A.dim() == residual.B.dim() == 2, "a residual is common to all groups"
        return y + (x @ residual.A.to(x.dtype).mT) @ residual.scaled_b().to(x.dtype).mT

    def _own(self, x: Tensor) -> Tensor:
        """Return what the factor makes of ``x``: a low-rank one's update of the base layer, or the whole output."""
        assert self.layout is not None, "a factor without a layout"
        if isinstance(self.factor, Scale):
            x_g = self.layout.to_groups(_normed(self.base, x))
            y_g = with_bias(x_g * self.factor.weight.to(x.dtype).unsqueeze(-2), self.factor.bias)
            return self.layout.to_rows(y_g, x)
        if isinstance(self.factor, LowRank):
            x_g = self.layout.to_groups(x)
            y_g = (x_g @ self.factor.A.to(x.dtype).mT) @ self.factor.scaled_b().to(x.dtype).mT
            return self.layout.to_rows(y_g, x)
        if isinstance(self.factor, Dense):
            x_g = self.layout.to_groups(x)
            y_g = with_bias(x_g @ self.factor.weight.to(x.dtype).mT, self.factor.bias)
            return self.layout.to_rows(y_g, x)
        assert self.factor is not None, "no factor"
        return self.factor.output(x)


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
        placement: Moves what a pass puts in place to where layers are (:mod:`fedlora.engine.cards`); None: it is there.
    """

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.model = model
        self.blocks: dict[nn.Module, Callable[..., Any]] = {}
        self.checkpointed = False
        self.placement: Callable[[], None] | None = None
        self._slots: dict[str, GroupedLayer] = {}
        for name in layers:
            self._slots[name] = GroupedLayer(model.get_submodule(name), name)
            self._place(name, self._slots[name])

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
        for name, slot in self._slots.items():
            slot.factor, slot.layout, slot.probe = factors[name], layout, probe
        if self.placement is not None:
            self.placement()
        blocks = self.blocks if compiled and probe is None else {}
        before = {block: vars(block).get("forward") for block in blocks}  # of a block on its own GPU: accelerate's
        for block, forward in blocks.items():
            block.forward = forward
        try:
            yield self.model
        finally:
            for block, hooked in before.items():
                del block.forward
                if hooked is not None:
                    block.forward = hooked
            for slot in self._slots.values():
                slot.factor, slot.layout, slot.probe = None, None, None

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
