"""Gradients of single rows, for DP-SGD: what a pass gives in place of one gradient a client.

One row is one group, so the gradient of the grouped tensors is that of single rows. It has every trained number for
every row, which is too much for a head: of RoBERTa-large a million. But a dense layer that sees one vector x a row has
the gradient dy x^T there, an outer product: its norm is |dy| |x|, and a client's sum of them one matrix product
(Goodfellow 2015, arXiv 1510.01799). So the head's dense layers keep one weight a client, and give x and dy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.engine.core import Engine
from fedlora.engine.kernels import row_sums
from fedlora.engine.layers import LayerProbe, Replaced, with_bias
from fedlora.engine.layout import Layout
from fedlora.engine.stack import Shape, Stack
from fedlora.methods import Dense, Factor
from fedlora.privacy.step import RowGradients
from fedlora.tasks import Batch
from fedlora.transfer import Spans, to_device


@final
@dataclass(frozen=True)
class Flat:
    """Gradients of rows as they are, [N, p]; rows are sorted by client."""

    place: slice
    grads: Tensor
    spans: Spans

    def squares(self) -> Tensor:
        """See :class:`fedlora.privacy.step.RowGradients`."""
        wide = torch.promote_types(self.grads.dtype, torch.float32)
        norms: Tensor = torch.linalg.vector_norm(self.grads, dim=1, dtype=wide)
        return norms.square()

    def add(self, sums: Tensor, factor_n: Tensor) -> None:
        """See :class:`fedlora.privacy.step.RowGradients`."""
        row_sums.add(sums[:, self.place], self.grads, factor_n, self.spans)


@final
@dataclass(frozen=True)
class Outer:
    """Gradients of rows that are outer products ``dy x^T``, and dy for a bias.

    Attributes:
        place: Where in a row of trained numbers the weight is.
        bias: Where the bias is; None: it is not trained.
        x: What the layer saw, [N, d_in].
        dy: The gradient at its output, [N, d_out].
        layout: Which row is whose.
    """

    place: slice
    bias: slice | None
    x: Tensor
    dy: Tensor
    layout: Layout

    def squares(self) -> Tensor:
        """See :class:`fedlora.privacy.step.RowGradients`."""
        x, dy = (value.square().sum(1) for value in self._wide())
        return dy * (x + 1.0 if self.bias is not None else x)

    def add(self, sums: Tensor, factor_n: Tensor) -> None:
        """See :class:`fedlora.privacy.step.RowGradients`."""
        keep = factor_n[:, None] > 0  # a row that is dropped may be NaN
        x, dy = (torch.where(keep, value, 0.0) for value in self._wide())
        dy_g = self.layout.to_groups(dy * factor_n[:, None].to(dy.dtype))
        sums[:, self.place] += (dy_g.mT @ self.layout.to_groups(x)).flatten(1)
        if self.bias is not None:
            sums[:, self.bias] += dy_g.sum(1)

    def _wide(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.x.dtype, torch.float32)
        return self.x.to(wide), self.dy.to(wide)


@final
@dataclass
class _RowDense:
    """A dense layer of the head in a pass whose groups are rows: each client's weight, and what its gradient is of."""

    own: Dense
    layout: Layout
    spans: Spans
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def output(self, x: Tensor) -> Tensor:
        """See :class:`fedlora.engine.layers.Replaced`."""
        leaf = x.new_zeros((), requires_grad=torch.is_grad_enabled())  # x alone may have no gradient
        y: Tensor = _DenseRows.apply(x, leaf, self)  # type: ignore[no-untyped-call]
        return y


@final
class _DenseRows(torch.autograd.Function):
    """``y = weight x + bias``, each row with its client's; the backward pass notes x and dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, dense: _RowDense) -> Tensor:
        ctx.save_for_backward(x)
        ctx.dense = dense
        weight_g, layout = dense.own.weight.to(x.dtype), dense.layout
        return layout.to_rows(with_bias(layout.to_groups(x) @ weight_g.mT, dense.own.bias), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        (x,) = ctx.saved_tensors
        dense: _RowDense = ctx.dense
        dense.seen.append((x.detach(), dy))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight_g, layout = dense.own.weight.to(dy.dtype), dense.layout
        return layout.to_rows(layout.to_groups(dy) @ weight_g, dy), None, None


@final
class RowWise:
    """Takes the gradients of rows.

    Args:
        engine: The engine.
        names: The trained tensors' shapes.

    Attributes:
        replaced: Names of the tensors that no row has a copy of: dense layers of the head.
        copied: Numbers that each row has a copy of.
    """

    def __init__(self, engine: Engine, names: Mapping[str, Shape]) -> None:
        self._engine = engine
        self._layers = {
            layer.name: (f"{layer.name}.weight", f"{layer.name}.bias")
            for layer in engine.base.structure.head
            if not layer.norm and f"{layer.name}.weight" in names
        }
        self.replaced = {name for pair in self._layers.values() for name in pair if name in names}
        self.copied = sum(math.prod(shape) for name, shape in names.items() if name not in self.replaced)

    def gradients(
        self,
        stack: Stack,
        fixed: Mapping[str, Tensor],
        here: Tensor,
        batch: Batch,
        slot_n: NDArray[np.int64],
        cost_n: NDArray[np.int64],
        real: Tensor | None = None,
        probe: LayerProbe | None = None,
    ) -> tuple[Tensor, Sequence[RowGradients]]:
        """Return the losses of a pass's rows [N], and their gradients in parts.

        Args:
            stack: The pack's tensors.
            fixed: The tensors that are not trained.
            here: Numbers of the turn's clients, [a, P].
            batch: The rows, sorted by client.
            slot_n: For each row its client's place in ``here``, [N].
            cost_n: The cost of each row, [N].
            real: Which numbers of ``here`` are a client's own, bool [a, P]; None: all. Padding takes no part in norms.
            probe: See :meth:`fedlora.engine.layers.GroupedModel.placed`.
        """
        engine, device = self._engine, self._engine.device
        flat = [name for name in stack.places if name not in self.replaced]
        replaced = [name for name in stack.places if name in self.replaced]
        cut = stack.places[flat[-1]].stop if flat else 0
        slot = to_device(slot_n, device)
        rows = here[:, :cut][slot].requires_grad_()
        factors: dict[str, Factor | Replaced] = dict(
            engine.method.factors({**fixed, **stack.named(rows, flat), **stack.named(here[:, cut:], replaced)})
        )
        layout, spans = Layout.of(slot_n, len(here), device), Spans.of(slot_n, len(here), device)
        dense: dict[str, _RowDense] = {}
        for name in self._layers:
            own = factors[name]
            assert isinstance(own, Dense), "a dense layer of the head"
            factors[name] = dense[name] = _RowDense(own, layout, spans)
        each = engine.layout(np.arange(len(slot_n)), len(slot_n), cost_n)
        with engine.grouped.placed(factors, each, probe) as model:
            losses_n = engine.task.row_losses(model, batch)
            if losses_n.requires_grad:  # what does not is reported by the watch, with names
                losses_n.sum().backward()  # type: ignore[no-untyped-call]
        found: list[RowGradients] = []
        if rows.grad is not None:
            grads = rows.grad if real is None else torch.where(real[:, :cut][slot], rows.grad, 0.0)
            found.append(Flat(slice(0, cut), grads, spans))
        for name, one in dense.items():
            found += self._parts(stack, name, one)
        return losses_n, found

    def _parts(self, stack: Stack, layer: str, dense: _RowDense) -> list[RowGradients]:
        weight, bias = self._layers[layer]
        place, at = stack.places[weight], stack.places.get(bias)
        if not dense.seen:
            return []
        if len(dense.seen) == 1 and dense.seen[0][0].dim() == 2:
            ((x, dy),) = dense.seen
            return [Outer(place, at, x, dy, dense.layout)]
        # Several vectors a row: the gradient is a sum of outer products, and its norm not that of its parts.
        pairs = [(x.flatten(1, -2), dy.flatten(1, -2)) for x, dy in (_with_axis(*pair) for pair in dense.seen)]
        x, dy = (torch.cat(values, 1) for values in zip(*pairs, strict=True))
        parts: list[RowGradients] = [Flat(place, (dy.mT @ x).flatten(1), dense.spans)]
        return [*parts, Flat(at, dy.sum(1), dense.spans)] if at is not None else parts


def _with_axis(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    return (x[:, None], dy[:, None]) if x.dim() == 2 else (x, dy)
