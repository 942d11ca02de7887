"""Local training of a pack: K clients in one forward and backward pass, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import TrainConfig
from fedlora.engine.core import Arrays, Engine
from fedlora.engine.pack import Pack
from fedlora.engine.probe import probe
from fedlora.engine.watch import Watch, negligible
from fedlora.engine.work import ClientResult, ClientWork
from fedlora.privacy.step import PrivateStep


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
    pack = Pack(engine, works, common, config, private)
    watch = Watch(pack.stack)
    for step in range(pack.steps):
        pack.backward(step)
        watch.observe()  # before noise and penalties: both move tensors that no row does
        pack.move(step)
    taken = [sum(len(batch) > 0 for batch in work.batches) for work in works]
    names = list(works[0].start)
    shapes = {**common, **works[0].start}
    errors = watch.faults(
        engine.method.specs(),
        common,
        taken,
        negligible(engine),
        lambda: probe(engine, names, shapes, config, private),
    )
    arrays = {name: value.cpu().numpy() for name, value in pack.tensors().items()}
    return [
        ClientResult(
            client=work.client,
            tensors={name: value[g] for name, value in arrays.items()},
            examples=work.num_examples,
            steps=len(work.batches),
            loss=float(pack.loss_g[g]) / max(1, taken[g]),
            error=errors[g],
            diagnostics=pack.private_sum.diagnostics(g, len(work.batches)) if pack.private_sum is not None else {},
        )
        for g, work in enumerate(works)
    ]
