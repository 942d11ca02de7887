"""The ways that tables compare, made on one set of base weights."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple, final

import torch

from benchmarks.engine import peers, resident
from benchmarks.engine.jobs import Arrays, Job
from benchmarks.engine.packed import Packed, engine_of, own_method
from benchmarks.engine.resident import Resident
from benchmarks.engine.shapes import SHAPES, random_model, twin, useful_flops
from benchmarks.engine.timing import Round, Way, free
from fedlora.engine import Engine

BASELINES = ("as-shipped", "eager", "graph", "compile", "opacus-hooks", "opacus-ghost")
PRIVATE = ("opacus-hooks", "opacus-ghost")


class Kind(NamedTuple):
    """What is trained how: the method, whether under DP-SGD, whether clients have unlike ranks."""

    method: str = "lora"
    dp: bool = False
    ragged: bool = False


LORA = Kind()


@final
class Bench:
    """A model with random weights, and what trains it.

    Args:
        shape: The name of its shape.
        rank: Of the low-rank methods.
        device: Where it computes.
        visits: How many clients a baseline trains in a round, one after another: their number makes no difference.
        dtype: Of the base model; ``auto``: bfloat16 on a GPU, float32 on a CPU.
        quantization: Of the base model: ``none``, ``nf4`` or ``int8``.
    """

    def __init__(
        self,
        shape: str,
        rank: int,
        device: torch.device,
        visits: int,
        dtype: str = "auto",
        quantization: str = "none",
    ) -> None:
        self.shape = SHAPES[shape]
        self.rank = rank
        self.device = device
        self.visits = visits
        before = self._allocated()
        own = "bfloat16" if device.type == "cuda" else "float32"
        self.dtype: torch.dtype = getattr(torch, own if dtype == "auto" else dtype)
        self.model = random_model(self.shape, device, self.dtype, quantization)
        self.base_bytes = self._allocated() - before
        self._engines: dict[tuple[str, bool], Engine] = {}
        self._packed: dict[tuple[Kind, bool], Packed] = {}
        self._sequential: dict[tuple[str, int, int, float], Any] = {}

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def job(self, clients: int, steps: int, rows: int, tokens: int) -> Job:
        """Return a round of this model."""
        return Job(self.shape, clients, steps, rows, tokens, int(self.model.config.vocab_size))

    def step_flops(self, job: Job) -> float:
        """Return the useful floating-point operations of a client-step."""
        return useful_flops(self.shape, self.model, job.tokens) * job.rows * job.tokens

    def packed(self, kind: Kind = LORA, *, fast: bool = True) -> Packed:
        """Return what trains packs, made once; what differs by roles, ranks and privacy alone shares its engine.

        Args:
            kind: What is trained how.
            fast: See :func:`benchmarks.engine.packed.engine_of`.
        """
        if (kind, fast) not in self._packed:
            method, noise = own_method(kind.method), peers.NOISE if kind.dp else None
            if (method, fast) not in self._engines:
                self._engines[method, fast] = engine_of(self.model, self.shape, method, self.rank, fast=fast)
            engine = self._engines[method, fast]
            self._packed[kind, fast] = Packed(engine, kind.method, self.rank, ragged=kind.ragged, noise=noise)
        return self._packed[kind, fast]

    @property
    def start(self) -> Arrays:
        """Where clients of LoRA start."""
        return self.packed().starts[-1]

    @cached_property
    def adapted(self) -> Any:
        """PEFT's model."""
        return resident.peft_model(twin(self.model), self.shape, self.rank)

    def sequential(self, kind: str, job: Job) -> Any:
        """Return a baseline, which trains clients one after another: made once for each shape of batch and rate."""
        key = (kind, job.rows, job.tokens, job.rate)
        if key not in self._sequential:
            self._sequential[key] = self._made(kind, job)
        return self._sequential[key]

    def forget(self) -> None:
        """Give back the memory of the baselines."""
        self._sequential.clear()
        free()

    def _made(self, kind: str, job: Job) -> peers.AsShipped | Resident:
        if kind == "as-shipped":
            return peers.AsShipped(self.model, job, self.rank, self.start)
        if kind in PRIVATE:
            mode = kind.removeprefix("opacus-")
            return peers.opacus(self.model, self.shape, job, self.rank, self.start, mode)
        named = resident.named_parameters(self.adapted, self.start)
        if kind == "eager":
            return resident.eager(self.adapted, named, job)
        if self.device.type != "cuda":
            raise ValueError(f"{kind}: CUDA graphs need a GPU")
        return resident.graphed(self.adapted, named, job, compiled=kind == "compile")

    def baseline(self, kind: str, job: Job) -> Way:
        """Return a baseline as a way."""
        clients = min(self.visits, job.clients)

        def make() -> Round:
            way = self.sequential(kind, job)
            return lambda: way.round(job, clients)

        facts = {"way": kind, "method": "lora", "clients": clients, "steps": job.steps, "dp": kind in PRIVATE}
        return Way(kind, make, clients * job.steps, {**facts, "rows": job.rows, "tokens": job.tokens})

    def ours(self, job: Job, kind: Kind = LORA) -> Way:
        """Return fedlora's packs as a way."""

        def make() -> Round:
            packed = self.packed(kind)
            return lambda: packed.round(job)

        facts = {"way": "fedlora", **kind._asdict(), "clients": job.clients, "steps": job.steps}
        return Way("fedlora", make, job.clients * job.steps, {**facts, "rows": job.rows, "tokens": job.tokens})
