"""A pack in training: the tensors of K clients, their gradients in one turn, and the optimizers that move them.

The loss is the sum over clients of the mean of that client's row losses, and every trained tensor carries a client
axis, so no gradient crosses from one client to another. Clients may differ in rows, batch sizes, lengths and numbers
of steps; which of them step together is planned on the host (:mod:`fedlora.engine.schedule`).

DP-SGD is the same computation with one row to a group: the gradients of the grouped tensors are then those of single
rows. Each is clipped, they are summed by client, and the noise comes on top (:mod:`fedlora.privacy.step`). A dense
layer that sees one vector a row needs no weight for each row: its gradient is an outer product
(:mod:`fedlora.engine.rowwise`).

Nothing here waits for the device: a round's work is queued, and its numbers are fetched at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.blocks import checkpoint_blocks
from fedlora.engine.core import Engine
from fedlora.engine.layers import LayerProbe
from fedlora.engine.local import NO_TERMS, LocalGradient
from fedlora.engine.optimizers import build_optimizer
from fedlora.engine.preconditioners import build_preconditioner
from fedlora.engine.rowwise import RowWise
from fedlora.engine.schedule import Turn, turns
from fedlora.engine.stack import Stack, common_shapes
from fedlora.engine.work import Arrays, ClientWork
from fedlora.local_terms import LocalTerms
from fedlora.methods import TensorSpec
from fedlora.methods.products import pairs
from fedlora.privacy.step import PrivateStep, PrivateSum
from fedlora.tasks import Batch
from fedlora.transfer import Places, to_device, to_places


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
        stack: The trained tensors.
        optimizer: The clients' optimizers.
        private_sum: The clipped sums under DP.
        local: The strategy's terms; None: there are none.
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
        specs, starts = engine.method.specs(), [work.start for work in works]
        self._fixed = {name: engine.tensor(value) for name, value in common.items()}
        self._fixed_here = {name: value.to(engine.compute) for name, value in self._fixed.items()}
        fixed = [work.fixed for work in works]
        shapes = common_shapes(specs, starts, common, *fixed)
        self._row_wise = RowWise(engine, shapes) if private is not None else None
        last = self._row_wise.replaced if self._row_wise is not None else set()
        self.stack = Stack(starts, shapes, engine.dtype, engine.device, last, remembered=True)
        self._own: Stack | None = None
        if any(fixed):
            self._own = Stack(fixed, common_shapes(specs, fixed, common, *starts), engine.dtype, engine.device)
        steps_g = to_device(np.array([len(work.batches) for work in works]), engine.device)
        l1 = {name: specs[name].l1 for name in self.stack.places if specs[name].l1}
        self.optimizer = build_optimizer(
            self.stack.values,
            config,
            steps_g,
            self.stack.spread(l1) if l1 else None,
            self._rate_ratio(config, specs),
            build_preconditioner(config, self.stack, engine.method.scaled_pairs(), self._exact_fixed),
        )
        self.private_sum = PrivateSum(private, self.stack.values, self.stack.real) if private is not None else None
        self.local: LocalGradient | None = None
        if terms.proximal or terms.scaffold or terms.penalty:
            server_g = self.stack.rows([work.server_variate for work in works])
            own_g = self.stack.rows([work.own_variate for work in works])
            both = [pair for pair in pairs(specs) if {pair.a, pair.b} <= set(shared)] if terms.penalty else []
            assert both or not terms.penalty, "a penalty on the ranks of factors that are not both shared"
            ranks = [len(work.start[both[0].a]) for work in works] if both else []
            self.local = LocalGradient(self.stack, terms, shared, server_g, own_g, both, ranks)
        self._losses: list[tuple[NDArray[np.int64], Tensor]] = []

    @property
    def turns(self) -> Iterator[Turn]:
        """The work, in order."""
        return turns(self._works, self._engine.max_cost)

    def backward(self, turn: Turn, probe: LayerProbe | None = None) -> Tensor:
        """Return the gradients of a turn [a, P]: of the mean row loss, or under DP sums of clipped rows.

        Where memory is short, forward passes are halved, those of one row checkpointed, and the turn is computed again.

        Args:
            turn: The turn.
            probe: See :meth:`fedlora.engine.layers.GroupedModel.placed`.
        """
        while True:
            try:
                return self._backward(turn, probe)
            except torch.OutOfMemoryError:
                engine = self._engine
                if not engine.halve(int(turn.cost_n.max(initial=0))) and not checkpoint_blocks(engine):
                    raise
            engine.recover()

    def _backward(self, turn: Turn, probe: LayerProbe | None) -> Tensor:
        engine, private = self._engine, self.private_sum
        groups = to_places(turn.groups, engine.device)
        here = self.stack.values[groups].to(engine.compute)
        real = None if self.stack.real is None else self.stack.real[groups]
        grads: Tensor | None = None
        share_n = (1.0 / np.maximum(turn.sizes, 1))[turn.slot_n]
        losses: list[tuple[NDArray[np.int64], Tensor]] = []
        if private is not None:
            private.begin(len(turn.groups))
        group_n = turn.slot_n if self._row_wise is None else np.arange(len(turn.rows))
        copied = 0 if self._row_wise is None else self._row_wise.copied + self._own_numbers
        for chosen in engine.passes(turn.cost_n, group_n, copied):
            slot_n = turn.slot_n[chosen]
            batch = self._batch(turn, chosen)
            share = to_device(share_n[chosen], engine.device).to(engine.dtype)
            if private is None or self._row_wise is None:
                grads, losses_n = self._together(grads, here, batch, turn, chosen, share, probe)
            else:
                fixed = self._fixed_of(to_device(turn.groups[slot_n], engine.device))
                losses_n, parts = self._row_wise.gradients(
                    self.stack, fixed, here, batch, slot_n, turn.cost_n[chosen], real, probe
                )
                grads = self.stack.values.new_zeros(here.shape) if grads is None else grads
                private.add(grads, parts, to_device(slot_n, engine.device))
            losses.append((turn.groups[slot_n], losses_n.detach() * share))
        self._losses += losses
        if grads is None:
            return self.stack.values.new_zeros(here.shape)
        return grads if real is None else grads.masked_fill(~real, 0.0)

    def _batch(self, turn: Turn, chosen: NDArray[np.int64]) -> Batch:
        """Return these rows of a turn as a batch on the device."""
        task, device = self._engine.task, self._engine.device
        owners, rows = turn.groups[turn.slot_n[chosen]].tolist(), turn.rows[chosen].tolist()
        first = self._works[owners[0]].examples
        if all(self._works[g].examples is first for g in set(owners)):  # as in a simulation, which has one table
            return task.collate(first, rows, device)
        joined = task.join([(self._works[g].examples, row) for g, row in zip(owners, rows, strict=True)])
        return task.collate(joined, range(len(rows)), device)

    def _together(
        self,
        grads: Tensor | None,
        here: Tensor,
        batch: Batch,
        turn: Turn,
        chosen: NDArray[np.int64],
        share: Tensor,
        probe: LayerProbe | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Return gradients [a, P] with those of a pass added, one for each client, and its rows' losses.

        Those of one pass that has all clients stay as they come, in the precision of the base model.
        """
        engine = self._engine
        present, group_n = np.unique(turn.slot_n[chosen], return_inverse=True)
        at = None if len(present) == len(here) else to_device(present, engine.device)
        own = (here if at is None else here[at]).detach().requires_grad_()
        factors = engine.method.factors(
            {**self._fixed_of(to_places(turn.groups[present], engine.device)), **self.stack.named(own)}
        )
        layout = engine.layout(group_n, len(present), turn.cost_n[chosen])
        with engine.grouped.placed(factors, layout, probe) as model:
            losses_n = engine.task.row_losses(model, batch)
            if losses_n.requires_grad:  # what does not is reported by the watch, with names
                (losses_n * share).sum().backward()  # type: ignore[no-untyped-call]
        if own.grad is None or (grads is None and at is None):
            return own.grad if grads is None else grads, losses_n
        total = self.stack.values.new_zeros(here.shape) if grads is None else grads.to(self.stack.values.dtype)
        more = own.grad.to(total.dtype)
        return total.add_(more) if at is None else total.index_add_(0, at, more), losses_n

    def _fixed_of(self, groups: Places) -> dict[str, Tensor]:
        """Return the tensors that these clients do not train, in the model's precision: common ones, and theirs."""
        if self._own is None:
            return self._fixed_here
        own = self._own.values[groups].to(self._engine.compute)
        return {**self._fixed_here, **self._own.named(own)}

    def _exact_fixed(self, groups: Places) -> dict[str, Tensor]:
        """Return the same in the precision of what is trained."""
        return self._fixed if self._own is None else {**self._fixed, **self._own.named(self._own.values[groups])}

    def _rate_ratio(self, config: TrainConfig, specs: Mapping[str, TensorSpec]) -> Tensor | None:
        """Return what the learning rate of each number is multiplied with, [P]; None: 1."""
        if config.b_rate_ratio == 1.0:
            return None
        of_b = {name: specs[name].kind.startswith("B") for name in self.stack.places}
        return self.stack.spread({name: config.b_rate_ratio if flag else 1.0 for name, flag in of_b.items()})

    @property
    def _own_numbers(self) -> int:
        """Numbers of what a client does not train and others have otherwise."""
        return 0 if self._own is None else self._own.values.shape[1]

    def move(self, turn: Turn, grads: Tensor) -> None:
        """Take a turn's steps along its gradients [a, P].

        Noise and denominator under DP, then what sees no data, then the optimizer.
        """
        groups = to_places(turn.groups, self._engine.device)
        if self.private_sum is not None:
            grads = self.private_sum.release(grads, turn.groups.tolist(), groups)
        grads = self.with_penalties(grads, groups)
        if self.local is not None:
            grads = grads.to(self.stack.values.dtype)
            self.local.add(grads, self.stack.values, groups)
        self.optimizer.step(grads, groups)

    def with_penalties(self, grads: Tensor, groups: Places) -> Tensor:
        """Return gradients [a, P] with those of what the method adds to these groups' loss whatever the data."""
        own = self.stack.values[groups].detach().requires_grad_()
        penalty_g = self._engine.method.penalty({**self._exact_fixed(groups), **self.stack.named(own)})
        if penalty_g is None or not penalty_g.requires_grad:
            return grads
        return grads.to(own.dtype) + torch.autograd.grad(penalty_g.sum(), own)[0]

    def losses(self) -> NDArray[np.float64]:
        """Return the sums over the steps of each client's mean row loss, [G]."""
        sums = np.zeros(len(self._works))
        if self._losses:
            values = torch.cat([losses_n for _, losses_n in self._losses]).double().cpu().numpy()
            np.add.at(sums, np.concatenate([groups for groups, _ in self._losses]), values)
        return sums
