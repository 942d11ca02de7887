"""Local training of a pack: K clients in one forward and backward pass, each as if it were alone.

The loss is the sum over clients of the mean of that client's row losses, and every trained tensor carries
a client axis, so no gradient crosses from one client to another. Clients may differ in rows, batch sizes,
lengths and numbers of steps; one that has finished drops out of the batches and is not moved any more.

DP-SGD is the same computation with one row to a group: the gradients of the grouped tensors are then those of single
rows. Each is clipped, they are summed by client, and the noise comes on top (:mod:`fedlora.privacy.step`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.core import Arrays, Engine
from fedlora.engine.layers import Layout
from fedlora.engine.optimizers import build_optimizer
from fedlora.engine.stack import Stack
from fedlora.methods import TensorSpec
from fedlora.privacy.step import PrivateStep, PrivateSum
from fedlora.seeded import Seeded
from fedlora.tasks import Examples


@dataclass(frozen=True)
class ClientWork:
    """What one client does in one round.

    Attributes:
        client: Its number.
        examples: Its rows.
        num_examples: How many rows it trains on, its weight in an average by examples.
        batches: Row numbers of each step's batch, in order; only under DP may one be empty.
        start: Its trained tensors before the first step.
    """

    client: int
    examples: Examples
    num_examples: int
    batches: Sequence[NDArray[np.int64]]
    start: Arrays


@dataclass(frozen=True)
class ClientResult:
    """What came of it.

    Attributes:
        client: Its number.
        tensors: Its trained tensors after the last step.
        examples: Its ``num_examples``.
        steps: Optimizer steps taken.
        loss: Mean over the steps of the batch's mean loss, each before its step.
        error: Why the result must not be used; empty when it may.
        diagnostics: Under DP what was measured on single rows; like ``loss`` and ``examples``, it is not covered by
            the guarantee and must not leave the client.
    """

    client: int
    tensors: dict[str, NDArray[np.floating]]
    examples: int
    steps: int
    loss: float
    error: str
    diagnostics: dict[str, float] = field(default_factory=dict)


def plan_batches(
    seeded: Seeded, round_number: int, client: int, rows: NDArray[np.int64], config: TrainConfig
) -> list[NDArray[np.int64]]:
    """Return the batches of a client's round: epoch after epoch in a fresh order, the last batch short.

    The order is keyed by seed, round, client and epoch: nothing else can change it.
    """
    batches: list[NDArray[np.int64]] = []
    per_epoch = -(-len(rows) // config.batch_size)
    steps = config.local_steps or config.local_epochs * per_epoch
    while len(rows) and len(batches) < steps:
        epoch = len(batches) // per_epoch
        order = rows[seeded.permutation("batches", round_number, client, epoch, size=len(rows))]
        batches += [order[at : at + config.batch_size] for at in range(0, len(order), config.batch_size)]
    return batches[:steps]


def train_pack(
    engine: Engine,
    works: Sequence[ClientWork],
    common: Arrays,
    config: TrainConfig,
    private: PrivateStep | None = None,
) -> list[ClientResult]:
    """Train the clients of a pack together.

    Args:
        engine: The engine.
        works: One entry a client; all start with the same tensor names. A client without rows takes no step.
        common: The tensors that are not trained, the same for all clients.
        config: Local training.
        private: Mechanism and noise of DP-SGD; None: without privacy.

    Returns:
        One result for each entry of ``works``, in order. A client whose tensors did not train, or are not
        finite, has an ``error``.
    """
    stack = Stack([{name: engine.tensor(array) for name, array in work.start.items()} for work in works])
    fixed = {name: engine.tensor(array) for name, array in common.items()}
    steps_g = torch.tensor([len(work.batches) for work in works], device=engine.device)
    specs = engine.method.specs()
    l1 = {name: specs[name].l1 for name in stack.places if specs[name].l1}
    optimizer = build_optimizer(stack.values, config, steps_g, stack.spread(l1) if l1 else None)
    loss_g = torch.zeros(len(works), dtype=torch.float64, device=engine.device)
    private_sum = PrivateSum(stack.grads, private) if private is not None else None
    watch = _Watch(stack)
    for step in range(int(steps_g.max())):
        stack.grads.zero_()
        loss_g += _backward(engine, works, step, stack, fixed, private_sum)
        watch.look()
        if private_sum is not None:
            private_sum.release()
        # After the watch has looked: a penalty has a gradient also where the data's loss has none. And after the noise,
        # because it sees no data.
        penalty_g = engine.method.penalty({**fixed, **stack.tensors()})
        if penalty_g is not None and penalty_g.requires_grad:
            penalty_g.sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            optimizer.step(stack.grads, step < steps_g)
    taken = [sum(len(batch) > 0 for batch in work.batches) for work in works]
    errors = watch.errors(specs, taken)
    arrays = {name: value.detach().cpu().numpy() for name, value in stack.tensors().items()}
    return [
        ClientResult(
            client=work.client,
            tensors={name: value[g] for name, value in arrays.items()},
            examples=work.num_examples,
            steps=len(work.batches),
            loss=float(loss_g[g]) / max(1, taken[g]),
            error=errors[g],
            diagnostics=private_sum.diagnostics(g, len(work.batches)) if private_sum is not None else {},
        )
        for g, work in enumerate(works)
    ]


def _backward(
    engine: Engine,
    works: Sequence[ClientWork],
    step: int,
    stack: Stack,
    fixed: Mapping[str, Tensor],
    private: PrivateSum | None,
) -> Tensor:
    """Add the gradients of one step to the stack's and return each client's mean row loss, [G].

    Under DP they are sums of clipped gradients of rows, else gradients of the mean.
    """
    places = [(g, int(row)) for g, work in enumerate(works) if step < len(work.batches) for row in work.batches[step]]
    lengths = np.array([len(works[g].examples.tokens[row]) for g, row in places], dtype=np.int64)
    size_g = np.array([len(work.batches[step]) if step < len(work.batches) else 1 for work in works])
    loss_g = torch.zeros(len(works), dtype=torch.float64, device=engine.device)
    for chosen in engine.micro_batches(lengths, stack.values.shape[1] if private else 0):
        here = sorted((places[at] for at in chosen), key=lambda place: place[0])
        rows = Examples(
            tuple(works[g].examples.tokens[row] for g, row in here),
            np.array([works[g].examples.targets[row] for g, row in here], dtype=np.int64),
        )
        batch = engine.task.collate(rows, range(len(here)), engine.device)
        owner_n = torch.tensor([g for g, _ in here], device=engine.device)
        weight_n = torch.tensor([1.0 / size_g[g] for g, _ in here], dtype=engine.dtype, device=engine.device)
        if private is None:
            # Only the clients of this batch take part in it: late in a round they may be few of many.
            present, group_n = torch.unique(owner_n, return_inverse=True)
            own = stack.tensors(None if len(present) == len(works) else present)
            layout = Layout.of(group_n, len(present))
        else:
            copies = stack.values.detach()[owner_n].requires_grad_()
            own = stack.named(copies)
            layout = Layout.of(torch.arange(len(here), device=engine.device), len(here))
        factors = engine.method.factors({**fixed, **own})
        with engine.grouped.placed(factors, layout) as model:
            losses_n = engine.task.row_losses(model, batch)
            weighted_n = losses_n * weight_n
            if losses_n.requires_grad:  # what does not is reported by the watch, with names
                (weighted_n if private is None else losses_n).sum().backward()  # type: ignore[no-untyped-call]
        if private is not None and copies.grad is not None:
            private.add(owner_n, copies.grad)
        loss_g.index_add_(0, owner_n, weighted_n.detach().double())
    return loss_g


class _Watch:
    """Sees to it that what should train does.

    An adapter that is detached, or whose optimizer holds stale tensors, still gives a falling loss (the head
    learns) and a well-formed update. Two facts are recorded for every client and trained tensor: whether a
    gradient other than zero ever came, and whether the tensor moved.
    """

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._before = stack.values.detach().clone()
        self._seen = torch.zeros_like(self._before, dtype=torch.bool)

    def look(self) -> None:
        """Record which numbers have a gradient."""
        self._seen |= self._stack.grads != 0

    def errors(self, specs: Mapping[str, TensorSpec], steps: Sequence[int]) -> list[str]:
        """Return, for each group, what is wrong with it, or ``""``."""
        values = self._stack.values.detach()
        finite, still, zero = torch.isfinite(values), values == self._before, values == 0

        def all_of(flags: Tensor) -> dict[str, list[bool]]:
            return {name: flags[:, place].all(1).tolist() for name, place in self._stack.places.items()}

        facts = [all_of(flags) for flags in (finite, ~self._seen, still, zero)]
        return [
            self._error(specs, n, *({name: flags[g] for name, flags in fact.items()} for fact in facts)) if n else ""
            for g, n in enumerate(steps)
        ]

    @staticmethod
    def _error(
        specs: Mapping[str, TensorSpec],
        n: int,
        finite: Mapping[str, bool],
        unseen: Mapping[str, bool],
        still: Mapping[str, bool],
        zero: Mapping[str, bool],
    ) -> str:
        for name in finite:
            if not finite[name]:
                return f"{name} is not finite after {n} steps; lower train.learning-rate or set train.clip-norm"
        for name in still:
            if not unseen[name] and specs[name].l1 and zero[name]:
                return (
                    f"the proximal step set all of {name} to zero in {n} steps, so nothing is left to train; lower the "
                    f"weight of its L1 penalty, {specs[name].l1} (s2.sparsity)"
                )
            if not unseen[name] and still[name]:
                return f"{name} has a gradient but did not move in {n} steps: train.learning-rate is too small for it"
        for name in unseen:
            # In a first step the tensor it is multiplied with may still be zero and hide its gradient.
            partners = [p for p in unseen if p != name and set(specs[p].factors) & set(specs[name].factors)]
            if unseen[name] and (n > 1 or all(unseen[partner] for partner in partners)):
                return (
                    f"{name} never had a gradient in {n} steps: it is not connected to the loss, or all that it is "
                    "multiplied with is zero (with s2-lora where s2.sparsity is too large)"
                )
        return ""
