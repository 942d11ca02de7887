"""The ways that tables compare, made on one set of base weights."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.engine import peers, resident
from benchmarks.engine.jobs import Arrays, Job
from benchmarks.engine.packed import Packed
from benchmarks.engine.resident import Resident
from benchmarks.engine.shapes import SHAPES, random_model, useful_flops
from benchmarks.engine.timing import Round, Way, attempt, free

BASELINES = ("as-shipped", "eager", "graph", "compile", "opacus-hooks", "opacus-ghost")
PRIVATE = ("opacus-hooks", "opacus-ghost")
# By how much mean losses may differ, and by what share of their fall: in bfloat16 activations are rounded differently
# in batches of other sizes, and the baselines' adapters are bfloat16, too.
_TOLERANCES = {torch.bfloat16: (5e-3, 0.1), torch.float32: (1e-5, 1e-3)}
_CHECKED_STEPS = 4
_CHECKED_CLIENTS = 3
_ALONE = "a pack of one"


@final
class Bench:
    """A model with random weights, and what trains it.

    Args:
        shape: The name of its shape.
        rank: Of the low-rank methods.
        device: Where it computes.
        visits: How many clients a baseline trains in a round, one after another: their number makes no difference.
        dtype: Of the base model; ``auto``: bfloat16 on a GPU, float32 on a CPU.
    """

    def __init__(self, shape: str, rank: int, device: torch.device, visits: int, dtype: str = "auto") -> None:
        self.shape = SHAPES[shape]
        self.rank = rank
        self.device = device
        self.visits = visits
        before = self._allocated()
        own = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, own if dtype == "auto" else dtype)
        self.model = random_model(self.shape, device, self.dtype)
        self.base_bytes = self._allocated() - before
        self.folder = tempfile.TemporaryDirectory()
        self._packed: dict[tuple[str, bool, bool], Packed] = {}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def job(self, clients: int, steps: int, rows: int, tokens: int) -> Job:
        """Return a round of this model."""
        return Job(self.shape, clients, steps, rows, tokens, int(self.model.config.vocab_size))

    def step_flops(self, job: Job) -> float:
        """Return the useful floating-point operations of a client-step."""
        return useful_flops(self.shape, self.model, job.tokens) * job.rows * job.tokens

    def packed(self, method: str = "lora", *, dp: bool = False, ragged: bool = False) -> Packed:
        """Return the engine for a method, once."""
        key = method, dp, ragged
        if key not in self._packed:
            noise = peers.NOISE if dp else None
            self._packed[key] = Packed(self.model, self.shape, method, self.rank, ragged=ragged, noise=noise)
        return self._packed[key]

    @property
    def start(self) -> Arrays:
        """Where clients of LoRA start."""
        return self.packed().starts[-1]

    @cached_property
    def adapted(self) -> tuple[Any, dict[str, nn.Parameter]]:
        """PEFT's model and its trained parameters."""
        model = resident.peft_model(self.model, self.shape, self.rank)
        return model, resident.named_parameters(model, self.start)

    def sequential(self, kind: str, job: Job) -> Resident:
        """Return a baseline with a resident model."""
        if kind in PRIVATE:
            mode = kind.removeprefix("opacus-")
            return peers.opacus(self.model, self.shape, job, self.rank, self.start, mode)
        if kind == "eager":
            return resident.eager(*self.adapted, job)
        if self.device.type != "cuda":
            raise ValueError(f"{kind}: CUDA graphs need a GPU")
        return resident.graphed(*self.adapted, job, compiled=kind == "compile")

    def baseline(self, kind: str, job: Job) -> Way:
        """Return a baseline as a way."""
        clients = min(self.visits, job.clients)

        def make() -> Round:
            if kind == "as-shipped":
                folder = Path(tempfile.mkdtemp(dir=self.folder.name))
                way: Any = peers.AsShipped(self.model, job, self.rank, self.start, folder)
            else:
                way = self.sequential(kind, job)
            return lambda: way.round(job, clients)

        facts = {"way": kind, "method": "lora", "clients": clients, "steps": job.steps, "dp": kind in PRIVATE}
        return Way(kind, make, clients * job.steps, {**facts, "rows": job.rows, "tokens": job.tokens})

    def ours(self, job: Job, method: str = "lora", *, dp: bool = False, ragged: bool = False) -> Way:
        """Return fedlora's packs as a way."""
        facts = {"way": "fedlora", "method": method, "clients": job.clients, "steps": job.steps, "dp": dp}
        facts = {**facts, "rows": job.rows, "tokens": job.tokens, "ragged": ragged}

        def make() -> Round:
            packed = self.packed(method, dp=dp, ragged=ragged)
            return lambda: packed.round(job)

        return Way("fedlora", make, job.clients * job.steps, facts)

    def check(self, job: Job, method: str, *, dp: bool, ragged: bool, others: list[str]) -> list[dict[str, Any]]:
        """Compare clients' losses with those of the same clients alone: by PEFT or Opacus, else in a pack of one.

        All steps of a client are on one batch, so that its loss falls, and a step in the wrong direction shows.

        Args:
            job: The round that is measured.
            method: The method.
            dp: Whether under DP; noise is left out.
            ragged: Whether ranks differ.
            others: Baselines to compare with, of those that do the same.
        """
        clients = min(_CHECKED_CLIENTS, job.clients)
        job = replace(job, clients=clients, steps=_CHECKED_STEPS, repeated=True)
        packed = self.packed(method, dp=dp, ragged=ragged)
        alike = [one for one in others if (one in PRIVATE) == dp and method == "lora" and not ragged]
        noise, packed.noise = packed.noise, 0.0 if dp else None
        found: list[dict[str, Any]] = []
        try:
            ours = packed.round(job)
            fell = float((packed.round(replace(job, steps=1)) - ours).mean())
            for name in alike or [_ALONE]:
                losses: list[Any] = []

                def act(name: str = name, losses: list[Any] = losses) -> None:
                    losses.append(self._alone(name, job, packed))

                error = attempt(act)
                entry = {"method": method, "dp": dp, "ragged": ragged, "against": name, "error": error}
                if not error:
                    off, (least, share) = float(np.abs(ours - losses[0]).max()), _TOLERANCES[self.dtype]
                    tolerance = least + share * abs(fell)
                    entry |= {"ours": ours.tolist(), "theirs": losses[0].tolist(), "off": off, "fell": fell}
                    entry |= {"tolerance": tolerance, "equal": off <= tolerance}
                found.append(entry)
        finally:
            packed.noise = noise
        free()
        return found

    def _alone(self, kind: str, job: Job, packed: Packed) -> NDArray[np.float64]:
        if kind == _ALONE:
            return np.array([packed.round(job, only=client)[0] for client in range(job.clients)])
        way = self.sequential(kind, job)
        if kind in PRIVATE:
            way.optimizer.noise_multiplier = 0.0
        return way.round(job, job.clients)
