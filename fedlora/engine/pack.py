"""A pack in training: the tensors of K clients, their gradients in one step, and the optimizers that move them.

The loss is the sum over clients of the mean of that client's row losses, and every trained tensor carries a client
axis, so no gradient crosses from one client to another. Clients may differ in rows, batch sizes, lengths and numbers
of steps; one that has finished drops out of the batches and is not moved any more.

DP-SGD is the same computation with one row to a group: the gradients of the grouped tensors are then those of single
rows. Each is clipped, they are summed by client, and the noise comes on top (:mod:`fedlora.privacy.step`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.core import Engine
from fedlora.engine.layers import LayerProbe, Layout
from fedlora.engine.local import NO_TERMS, LocalGradient
from fedlora.engine.optimizers import build_optimizer
from fedlora.engine.stack import Stack, common_shapes
from fedlora.engine.work import Arrays, ClientWork
from fedlora.local_terms import LocalTerms
from fedlora.privacy.step import PrivateStep, PrivateSum


@final
class Pack:
    """Clients that train together for a round.

    Args:
        engine: The engine.
        works: One entry a client; all start with the same tensor names.
        common: The tensors that are not trained, the same for all clients.
        config: Local training.
        private: Mechanism and noise of DP-SGD; None: without privacy.
        terms: What the strategy adds to local training.
        shared: Names of the tensors that the terms apply to.

    Attributes:
        stack: The trained tensors and their gradients.
        optimizer: The clients' optimizers.
        private_sum: The clipped sums under DP.
        local: The strategy's terms; None: there are none.
        loss_g: Sum over the steps of each client's mean row loss, float64 [G].
    """

    def __init__(
        self,
        engine: Engine,
        works: Sequence[ClientWork],
        common: Arrays,
        config: TrainConfig,
        private: PrivateStep | None = None,
        terms: LocalTerms = NO_TERMS,
        shared: Sequence[str] = (),
    ) -> None:
        self._engine = engine
        self._works = works
        specs = engine.method.specs()
        self._fixed = _tensors(engine, common)
        starts = [_tensors(engine, work.start) for work in works]
        self.stack = Stack(starts, common_shapes(specs, starts, self._fixed))
        self._steps_g = torch.tensor([len(work.batches) for work in works], device=engine.device)
        l1 = {name: specs[name].l1 for name in self.stack.places if specs[name].l1}
        spread = self.stack.spread(l1) if l1 else None
        self.optimizer = build_optimizer(self.stack.values, config, self._steps_g, spread)
        self.private_sum = PrivateSum(self.stack.grads, private, self.stack.real) if private is not None else None
        self.local: LocalGradient | None = None
        if terms.proximal or terms.scaffold:
            variates = [[_tensors(engine, one) for one in (work.server_variate, work.own_variate)] for work in works]
            server_g, own_g = (self.stack.rows(one) for one in zip(*variates, strict=True))
            self.local = LocalGradient(self.stack, terms, shared, server_g, own_g)
        self.loss_g = torch.zeros(len(works), dtype=torch.float64, device=engine.device)

    @property
    def steps(self) -> int:
        """Steps of the client that takes most."""
        return int(self._steps_g.max())

    def backward(self, step: int, probe: LayerProbe | None = None) -> None:
        """Set the stack's gradients to those of one step: of the mean row loss, or under DP sums of clipped rows.

        Args:
            step: The step, from 0.
            probe: See :meth:`fedlora.engine.layers.GroupedModel.placed`.
        """
        self.stack.grads.zero_()
        engine, works, private = self._engine, self._works, self.private_sum
        places = [
            (g, int(row)) for g, work in enumerate(works) if step < len(work.batches) for row in work.batches[step]
        ]
        cost = np.array([works[g].examples.cost[row] for g, row in places], dtype=np.int64)
        size_g = np.array([len(work.batches[step]) if step < len(work.batches) else 1 for work in works])
        loss_g = torch.zeros_like(self.loss_g)
        group = np.arange(len(places)) if private else np.array([g for g, _ in places], dtype=np.int64)
        for chosen in engine.micro_batches(cost, group, self.stack.values.shape[1] if private else 0):
            here = sorted((places[at] for at in chosen), key=lambda place: place[0])
            rows = engine.task.join([(works[g].examples, row) for g, row in here])
            batch = engine.task.collate(rows, range(len(here)), engine.device)
            owner_n = torch.tensor([g for g, _ in here], device=engine.device)
            weight_n = torch.tensor([1.0 / size_g[g] for g, _ in here], dtype=engine.dtype, device=engine.device)
            if private is None:
                # Only the clients of this batch take part in it: late in a round they may be few of many.
                present, group_n = torch.unique(owner_n, return_inverse=True)
                own = self.stack.tensors(None if len(present) == len(works) else present)
                layout = Layout.of(group_n, len(present))
            else:
                copies = self.stack.values.detach()[owner_n].requires_grad_()
                own = self.stack.named(copies)
                layout = Layout.of(torch.arange(len(here), device=engine.device), len(here))
            factors = engine.method.factors({**self._fixed, **own})
            with engine.grouped.placed(factors, layout, probe) as model:
                losses_n = engine.task.row_losses(model, batch)
                weighted_n = losses_n * weight_n
                if losses_n.requires_grad:  # what does not is reported by the watch, with names
                    (weighted_n if private is None else losses_n).sum().backward()  # type: ignore[no-untyped-call]
            if private is not None and copies.grad is not None:
                private.add(owner_n, copies.grad)
            loss_g.index_add_(0, owner_n, weighted_n.detach().double())
        if self.stack.real is not None:
            self.stack.grads.masked_fill_(~self.stack.real, 0.0)
        self.loss_g += loss_g

    def add_penalties(self) -> None:
        """Add the gradients of what the method adds to the loss whatever the data."""
        penalty_g = self._engine.method.penalty({**self._fixed, **self.stack.tensors()})
        if penalty_g is not None and penalty_g.requires_grad:
            penalty_g.sum().backward()  # type: ignore[no-untyped-call]

    def move(self, step: int) -> None:
        """Take a step along the stack's gradients: noise and denominator under DP, what sees no data, the optimizer."""
        if self.private_sum is not None:
            self.private_sum.release()
        self.add_penalties()
        with torch.no_grad():
            if self.local is not None:
                self.local.add(self.stack.grads, self.stack.values)
            self.optimizer.step(self.stack.grads, step < self._steps_g)


def _tensors(engine: Engine, arrays: Arrays) -> dict[str, Tensor]:
    return {name: engine.tensor(array) for name, array in arrays.items()}
