"""Grouped layers: one base layer for all rows of a batch, each row with its own client's factors.

Shapes: rows are sequences. `N` rows of a batch, `G` groups (clients of a pack), `S` row slots a group,
`T` positions, `d` features, `r` rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor, nn

from fedlora.methods import Dense, Factor, LowRank


@final
@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch sit among the groups of a pack.

    Attributes:
        groups: G.
        slots: S, the largest number of rows of a group.
        index_n: For each row its place ``group * S + slot``; None when rows are sorted by group and every
            group has exactly S (then places are row numbers).
    """

    groups: int
    slots: int
    index_n: Tensor | None

    @classmethod
    def of(cls, group_n: Tensor, groups: int) -> Layout:
        """Return the layout of rows that belong to the groups ``group_n`` ([N], int64)."""
        counts = torch.bincount(group_n, minlength=groups)
        slots = int(counts.max())
        order = torch.argsort(group_n, stable=True)
        starts = torch.cumsum(counts, 0) - counts
        slot_n = torch.empty_like(group_n)
        slot_n[order] = torch.arange(len(group_n), device=group_n.device) - starts[group_n[order]]
        index_n = group_n * slots + slot_n
        if len(index_n) == groups * slots and bool(
            (index_n == torch.arange(len(index_n), device=index_n.device)).all()
        ):
            return cls(groups, slots, None)
        return cls(groups, slots, index_n)

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
        x_n = x_g.reshape(self.groups * self.slots, *like.shape[1:-1], x_g.shape[-1])
        return x_n if self.index_n is None else x_n.index_select(0, self.index_n)


class LayerProbe(Protocol):
    """What may stand in for a layer's sum of base and update, see :mod:`fedlora.engine.probe`."""

    def output(self, x: Tensor, own: Callable[[Tensor], Tensor], fixed: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return the layer's output for ``x``; ``own`` is what its factor computes, ``fixed`` what it is added to."""


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
        self.factor: Factor | None = None
        self.layout: Layout | None = None
        self.probe: LayerProbe | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for ``x`` [N, ..., d_in]; without a factor, the base layer's.

        Raises:
            ValueError: The model calls the layer on something else than the batch's rows.
        """
        if self.factor is None:
            return self.base(x)  # type: ignore[no-any-return]
        assert self.layout is not None, "a factor without a layout"
        if x.shape[0] != self.layout.rows:
            raise ValueError(
                f"method.target-modules: the model calls {self.name} on {x.shape[0]} rows of its own, not on the "
                f"{self.layout.rows} of the batch, so clients cannot be kept apart there; name other layers."
            )
        if self.probe is not None:
            return self.probe.output(x, self._own, None if isinstance(self.factor, Dense) else self._fixed)
        own = self._own(x)  # before the base layer: the order in which x's gradients are added up depends on it
        return own if isinstance(self.factor, Dense) else self._fixed(x) + own

    def _fixed(self, x: Tensor) -> Tensor:
        """Return what the layer makes of ``x`` alike for all groups: the base layer's output and the residual's."""
        y: Tensor = self.base(x)
        residual = self.factor.residual if isinstance(self.factor, LowRank) else None
        if residual is None:
            return y
        assert residual.A.dim() == residual.B.dim() == 2, "a residual is common to all groups"
        return y + (x @ residual.A.to(x.dtype).mT) @ residual.scaled_b().to(x.dtype).mT

    def _own(self, x: Tensor) -> Tensor:
        """Return what the factor makes of ``x``: a low-rank one's update of the base layer, a dense one's output."""
        assert self.layout is not None, "a factor without a layout"
        x_g = self.layout.to_groups(x)
        if isinstance(self.factor, LowRank):
            y_g = (x_g @ self.factor.A.to(x.dtype).mT) @ self.factor.scaled_b().to(x.dtype).mT
        else:
            assert isinstance(self.factor, Dense), "a factor of a third kind"
            y_g = _dense(x_g, self.factor)
        return self.layout.to_rows(y_g, x)


def _dense(x_g: Tensor, factor: Dense) -> Tensor:
    y_g = x_g @ factor.weight.to(x_g.dtype).mT
    return y_g if factor.bias is None else y_g + factor.bias.to(x_g.dtype).unsqueeze(-2)


@final
class GroupedModel:
    """A base model whose adapted layers and head are grouped layers.

    Args:
        model: The base model; its layers are wrapped in place.
        layers: Names of the layers to wrap.
    """

    def __init__(self, model: nn.Module, layers: list[str]) -> None:
        self.model = model
        self._slots: dict[str, GroupedLayer] = {}
        for name in layers:
            parent_name, _, attribute = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            self._slots[name] = GroupedLayer(model.get_submodule(name), name)
            setattr(parent, attribute, self._slots[name])

    @contextmanager
    def placed(
        self, factors: Mapping[str, Factor], layout: Layout, probe: LayerProbe | None = None
    ) -> Iterator[nn.Module]:
        """Put ``factors`` in place for one batch; the backward pass must run inside, too.

        Args:
            factors: What each wrapped layer computes, by name.
            layout: Which row belongs to which group.
            probe: Stands in for the layers' sum of base and update, to find out what is connected to what.
        """
        assert factors.keys() == self._slots.keys(), "factors for other layers than the wrapped ones"
        for name, slot in self._slots.items():
            slot.factor, slot.layout, slot.probe = factors[name], layout, probe
        try:
            yield self.model
        finally:
            for slot in self._slots.values():
                slot.factor, slot.layout, slot.probe = None, None, None
