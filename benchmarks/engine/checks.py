"""Equal loss: what a client comes to in a pack is what it comes to alone, in the run whose times are shown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.engine.jobs import Job
from benchmarks.engine.timing import Budget, attempt, free
from benchmarks.engine.ways import PRIVATE, Bench, Kind

# By how much mean losses may differ, and by what share of their change: in bfloat16 activations are rounded differently
# in batches of other sizes, and the baselines' adapters are bfloat16, too.
TOLERANCES = {torch.bfloat16: (5e-3, 0.1), torch.float32: (1e-5, 1e-3)}
STEPS = 4
CLIENTS = 3
# Large, because PEFT's adapters are bfloat16 here: of steps below a 256th of a number none arrives (at 1e-5 the losses
# of MiniLM in float32 agree to 1e-8, and in bfloat16 PEFT's do not move). A loss may rise by such steps, in both ways.
RATE = 1e-3
ALONE = "a pack of one, the plain way"


def check(bench: Bench, job: Job, kind: Kind, baselines: list[str], budget: Budget) -> list[dict[str, Any]]:
    """Compare clients' losses with those of the same clients one by one: PEFT's, Opacus's, else the engine's plain way.

    All steps of a client are on one batch, so that its loss goes where its steps lead, and a wrong one shows.

    Args:
        bench: The model.
        job: The round that is measured, for its shapes.
        kind: What is trained how; noise is left out.
        baselines: Those that are measured.
        budget: When to begin no more.

    Returns:
        An entry for each comparison; ``equal`` is not there where it could not be made.
    """
    job = replace(job, clients=min(CLIENTS, job.clients), steps=STEPS, repeated=True, rate=RATE)
    alike = [one for one in baselines if (one in PRIVATE) == kind.dp and kind.method == "lora" and not kind.ragged]
    found = []
    for name in alike or [ALONE]:
        entry: dict[str, Any] = {**kind._asdict(), "against": name, "error": "no time left"}
        if not budget.over:
            entry["error"] = attempt(lambda name=name, entry=entry: _compare(bench, job, kind, name, entry))  # type: ignore[misc]
        found.append(entry)
    free()
    return found


def _compare(bench: Bench, job: Job, kind: Kind, against: str, entry: dict[str, Any]) -> None:
    packed = bench.packed(kind)
    ours = packed.round(job, noisy=False)
    fell = float((packed.round(replace(job, steps=1), noisy=False) - ours).mean())
    theirs = _alone(bench, kind, job, against)
    least, share = TOLERANCES[bench.dtype]
    off, tolerance = float(np.abs(ours - theirs).max()), least + share * abs(fell)
    entry |= {"ours": ours.tolist(), "theirs": theirs.tolist(), "off": off, "fell": fell}
    entry |= {"tolerance": tolerance, "equal": off <= tolerance and abs(fell) > least}


def _alone(bench: Bench, kind: Kind, job: Job, against: str) -> NDArray[np.float64]:
    if against == ALONE:
        packed = bench.packed(kind, fast=False)
        return np.array([packed.round(job, only=client, noisy=False)[0] for client in range(job.clients)])
    way = bench.sequential(against, job)
    if against not in PRIVATE:
        losses: NDArray[np.float64] = way.round(job, job.clients)
        return losses
    noise, way.optimizer.noise_multiplier = way.optimizer.noise_multiplier, 0.0
    try:
        return way.round(job, job.clients)  # type: ignore[no-any-return]
    finally:
        way.optimizer.noise_multiplier = noise
