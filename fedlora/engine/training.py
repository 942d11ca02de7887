"""Local training of a pack: K clients in one forward and backward pass, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlora.config import TrainConfig
from fedlora.engine.core import Engine
from fedlora.engine.local import NO_TERMS
from fedlora.engine.pack import Pack
from fedlora.engine.probe import probe
from fedlora.engine.watch import Watch, negligible
from fedlora.engine.work import Arrays, ClientResult, ClientWork
from fedlora.local_terms import LocalTerms
from fedlora.privacy.step import PrivateStep
from fedlora.transfer import to_places


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
    for turn in pack.turns:
        grads = pack.backward(turn)
        watch.observe(grads, to_places(turn.groups, engine.device))  # before what moves tensors that no row does
        pack.move(turn, grads)
    taken = [sum(len(batch) > 0 for batch in work.batches) for work in works]
    fixed = {**common, **works[0].fixed}
    tensors = {**fixed, **works[0].start}
    errors = watch.faults(
        engine.method,
        fixed,
        taken,
        negligible(engine),
        lambda: probe(engine, list(works[0].start), tensors, config, private),
    )
    steps, losses, ended = [len(work.batches) for work in works], pack.losses(), pack.stack.split(pack.stack.values)
    variates: list[dict[str, NDArray[np.floating]]] = [{} for _ in works]
    if terms.scaffold and pack.local is not None:
        variates = pack.stack.split(pack.local.renewed(pack.stack.values, pack.optimizer.rates_g, whole))
    diagnostics = pack.private_sum.diagnostics(steps) if pack.private_sum is not None else [{} for _ in works]
    return [
        ClientResult(
            client=work.client,
            tensors=ended[g],
            examples=work.num_examples,
            steps=steps[g],
            loss=float(losses[g]) / max(1, taken[g]),
            error=errors[g],
            diagnostics=diagnostics[g],
            own_variate={name: value for name, value in variates[g].items() if name in shared},
        )
        for g, work in enumerate(works)
    ]


def _whole_gradients(engine: Engine, works: Sequence[ClientWork], common: Arrays, config: TrainConfig) -> Tensor:
    """Return the gradients of the clients' objectives, over all their rows, at their start tensors, [G, P]."""
    assert all(len(work.rows) for work in works if work.batches), "SCAFFOLD's option 1 takes all rows of a client"
    once = [replace(work, batches=[np.asarray(work.rows)] if work.batches else []) for work in works]
    pack = Pack(engine, once, common, config)
    whole = torch.zeros_like(pack.stack.values)
    for turn in pack.turns:
        groups = to_places(turn.groups, engine.device)
        whole[groups] = pack.with_penalties(pack.backward(turn), groups).to(whole.dtype)
    return whole
