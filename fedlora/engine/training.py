"""Local training of a pack: K clients in one forward and backward pass, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.core import Engine
from fedlora.engine.local import NO_TERMS
from fedlora.engine.pack import Pack
from fedlora.engine.probe import probe
from fedlora.engine.stack import Stack
from fedlora.engine.watch import Watch, negligible
from fedlora.engine.work import Arrays, ClientResult, ClientWork
from fedlora.local_terms import LocalTerms
from fedlora.privacy.step import PrivateStep


def train_pack(
    engine: Engine,
    works: Sequence[ClientWork],
    common: Arrays,
    config: TrainConfig,
    private: PrivateStep | None = None,
    *,
    terms: LocalTerms = NO_TERMS,
    shared: Set[str] = frozenset(),
) -> list[ClientResult]:
    """Train the clients of a pack together.

    Args:
        engine: The engine.
        works: One entry a client; all start with the same tensor names. A client without rows takes no step.
        common: The tensors that are not trained, the same for all clients.
        config: Local training.
        private: Mechanism and noise of DP-SGD; None: without privacy.
        terms: What the strategy adds to local training, see :mod:`fedlora.engine.local`.
        shared: Names of the tensors that proximal term and control variates apply to.

    Returns:
        One result for each entry of ``works``, in order. A client whose tensors did not train, or are not
        finite, has an ``error``.
    """
    assert not (terms.scaffold == 1 and private), "a gradient of all rows would leave without noise"
    config = replace(config, learning_rate=config.learning_rate * terms.learning_rate)
    names = [name for name in works[0].start if name in shared]
    pack = Pack(engine, works, common, config, private, terms, names)
    whole = _whole_gradients(engine, works, common, config) if terms.scaffold == 1 else None
    watch = Watch(pack.stack)
    for step in range(pack.steps):
        pack.backward(step)
        watch.observe()  # before noise and penalties: both move tensors that no row does
        pack.move(step)
    taken = [sum(len(batch) > 0 for batch in work.batches) for work in works]
    tensors = {**common, **works[0].start}
    errors = watch.faults(
        engine.method,
        common,
        taken,
        negligible(engine),
        lambda: probe(engine, list(works[0].start), tensors, config, private),
    )
    values = pack.stack.values.detach()
    ended = _arrays(pack.stack, values)
    variates: list[dict[str, NDArray[np.floating]]] = [{} for _ in works]
    if terms.scaffold and pack.local is not None:
        variates = _arrays(pack.stack, pack.local.renewed(values, pack.optimizer.rates_g, whole))
    return [
        ClientResult(
            client=work.client,
            tensors=ended[g],
            examples=work.num_examples,
            steps=len(work.batches),
            loss=float(pack.loss_g[g]) / max(1, taken[g]),
            error=errors[g],
            diagnostics=pack.private_sum.diagnostics(g, len(work.batches)) if pack.private_sum is not None else {},
            own_variate={name: value for name, value in variates[g].items() if name in shared},
        )
        for g, work in enumerate(works)
    ]


def _whole_gradients(engine: Engine, works: Sequence[ClientWork], common: Arrays, config: TrainConfig) -> Tensor:
    """Return the gradients of the clients' objectives, over all their rows, at their start tensors, [G, P]."""
    assert all(len(work.rows) for work in works if work.batches), "SCAFFOLD's option 1 takes all rows of a client"
    once = [replace(work, batches=[np.asarray(work.rows)] if work.batches else []) for work in works]
    pack = Pack(engine, once, common, config)
    pack.backward(0)
    pack.add_penalties()
    return pack.stack.grads


def _arrays(stack: Stack, rows: Tensor) -> list[dict[str, NDArray[np.floating]]]:
    """Return rows of numbers [G, P] as each client's arrays, at its own shapes."""
    split = stack.split(rows.cpu())
    return [{name: np.ascontiguousarray(value.numpy()) for name, value in one.items()} for one in split]
