"""Workers on the tiny model, in this process and without Ray; with and without DP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from clients.errors import MemoryShortError
from clients.limits import SiteLimits
from clients.pool import TrainerPool
from clients.shards import Pack
from clients.site import Job
from clients.worker import Worker
from fedlora.config import Config
from fedlora.data import load_federated
from fedlora.exchange import Instruction, Update
from fedlora.privacy import Ledger
from fedlora.tasks import Classification
from simulations.privacy import resolve_privacy
from simulations.setup import resolve
from strategies.build import build_strategy
from tests.support.tiny import save_texts, save_tiny_model

EQUAL_PARTS = {"data.partition": "iid"}


def tiny_flat(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model.name": save_tiny_model(folder / "model"),
        "data.name": "file",
        "data.path": save_texts(folder / "texts.csv"),
        "federation.num-clients": 4,
        "engine.dtype": "float64",
        "train.batch-size": 4,
        "train.local-steps": 3,
        "train.learning-rate": 0.01,
        "rounds": 2,
        "method.rank": 2,
        "mos.budget": 2,
        "mos.shards": 2,
        **changes,
    }


def tiny_job(config: Config, folder: Path, **limits: Any) -> Job:
    """The job of a configuration, with the site's limits."""
    return Job(config.to_flat(), load_federated(config, 4), SiteLimits(str(folder / "sites"), **limits))


def tiny_worker(folder: Path, **changes: Any) -> Worker:
    job = tiny_job(resolve(tiny_flat(folder, **changes)), folder)
    return Worker(lambda: job, 1)


def dp_config(folder: Path, **changes: Any) -> Config:
    keys = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, **EQUAL_PARTS, **changes}
    config = resolve(tiny_flat(folder, **keys))
    return resolve_privacy(config, load_federated(config, 4))


def dp_worker(folder: Path, engine: Any = None, **changes: Any) -> Worker:
    """A worker under DP; ``engine`` trains packs in place of the real one."""
    job = tiny_job(dp_config(folder, **changes), folder)
    return Worker(lambda: job, 1, *([engine] if engine else []))


def instruction(
    worker: Worker, clients: tuple[int, ...] = (0, 1, 2, 3), number: int = 1, ledger_heads: Any = None, **changes: Any
) -> Instruction:
    """What the run's own strategy sends in a round, with changed tensors."""
    model = worker.loaded.model
    strategy = build_strategy(model.config, model.specs)
    sent = {**strategy.initial(model.initial).tensors, **changes}
    heads = ("",) * len(clients) if ledger_heads is None else ledger_heads
    roles, blocks = strategy.all_roles(number), strategy.blocks(number)
    return Instruction(number, clients, roles, sent, blocks=blocks, ledger_heads=heads)


def ask(worker: Worker, *args: Any, **changes: Any) -> list[Update]:
    """Train on :func:`instruction`."""
    return worker.train(instruction(worker, *args, **changes))


def ledger(folder: Path, client: int) -> Ledger:
    return Ledger(folder / "sites" / f"client-{client}" / "ledger.jsonl", client)


def noted(folder: Path, client: int) -> str:
    return (folder / "sites" / f"client-{client}" / "diagnostics.jsonl").read_text()


class InProcess(TrainerPool):
    """Real workers in this process, called in turn."""

    def outcomes(
        self,
        work: Callable[[Any, Any], Any],
        items: Sequence[Any],
        *,
        packs: Sequence[Pack] = (),
        server_round: int = 0,
    ) -> Iterator[Any]:
        for number, item in enumerate(items):
            trainer = packs[number].trainer if packs else number % len(self.actors)
            try:
                yield work(self.actors[trainer], item)
            except MemoryShortError as error:
                yield error

    def everywhere(self, work: Callable[[Any, None], Any], *, timeout: float | None = None) -> list[Any]:
        return [work(worker, None) for worker in self.actors]


class TokenMean(Classification):  # type: ignore[misc]
    """A planted bug: one mean over the batch, as the losses of many models are."""

    def row_losses(self, model: Any, batch: Any) -> torch.Tensor:
        losses = super().row_losses(model, batch)
        share = batch["attention_mask"].sum(1) / batch["attention_mask"].sum()
        return losses * share * len(losses)


class BatchMean(Classification):  # type: ignore[misc]
    """A planted bug: each row's loss has a part of the others', as a norm or a capacity over the batch makes it."""

    def row_losses(self, model: Any, batch: Any) -> torch.Tensor:
        losses = super().row_losses(model, batch)
        return losses * (1 + losses.mean())
