"""What a client is given to do in a round, and what comes of it: plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import TrainConfig
from fedlora.seeded import Seeded
from fedlora.tasks import Rows

Arrays = Mapping[str, NDArray[np.floating]]


@final
@dataclass(frozen=True)
class ClientWork:
    """What one client does in one round.

    Attributes:
        client: Its number.
        examples: Its rows.
        num_examples: How many rows it trains on, its weight in an average by examples.
        batches: Row numbers of each step's batch, in order; only under DP may one be empty.
        start: Its trained tensors before the first step; of a smaller rank than others' if that is the client's.
        server_variate: SCAFFOLD's control variate of the server, by tensor; zero where there is none.
        own_variate: The client's own one, likewise.
        rows: All rows that it trains on; needed for SCAFFOLD's option 1 only.
        fixed: Tensors that it does not train, and that other clients of the pack have otherwise, as clients of another
            federation do, or those that train other ranks; all of a pack name the same.
    """

    client: int
    examples: Rows
    num_examples: int
    batches: Sequence[NDArray[np.int64]]
    start: Arrays
    server_variate: Arrays = field(default_factory=dict)
    own_variate: Arrays = field(default_factory=dict)
    rows: Sequence[int] | NDArray[np.int64] = ()
    fixed: Arrays = field(default_factory=dict)


@final
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
        own_variate: With SCAFFOLD its renewed control variate of the shared tensors; else empty.
    """

    client: int
    tensors: dict[str, NDArray[np.floating]]
    examples: int
    steps: int
    loss: float
    error: str
    diagnostics: dict[str, float] = field(default_factory=dict)
    own_variate: dict[str, NDArray[np.floating]] = field(default_factory=dict)


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
