"""The audited site: clients whose rows are known, trained by a real worker with an observed engine and disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from clients.limits import SiteLimits
from clients.site import Job
from clients.trainer import TrainPack
from clients.worker import Worker
from fedlora.config import PLAIN_GRADIENT, Config, TrainConfig
from fedlora.data import FederatedData
from fedlora.engine import ClientResult, ClientWork, Engine
from fedlora.exchange import Instruction, Update
from fedlora.experts import ALL
from fedlora.methods import METHODS, TensorSpec, initial_tensors
from fedlora.privacy import Ledger, Mechanism
from fedlora.privacy.step import PrivateStep
from fedlora.roles import Role, with_role
from fedlora.seeded import Seeded
from fedlora.shapes import cut
from fedlora.strategy import Strategy
from strategies.build import build_strategy

NO_ROWS = np.zeros(0, dtype=np.int64)
_NO_NOISE = 1e-12

Arrays = dict[str, NDArray[np.floating]]
Batches = Sequence[NDArray[np.int64]]


def held_by(data: FederatedData, rows: Sequence[NDArray[np.int64]]) -> FederatedData:
    """Return the data with clients that train on these rows, and hold none out."""
    return replace(data, clients=tuple(rows), holdout=(NO_ROWS,) * len(rows), names=())


def unit_steps(train: TrainConfig, steps: int, batch: int) -> TrainConfig:
    """Return local training by plain SGD of rate 1: tensors move by what their optimizer is given."""
    return replace(
        train,
        local_steps=steps,
        local_epochs=1,
        batch_size=batch,
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.0,
        clip_norm=0.0,
        schedule="constant",
        **PLAIN_GRADIENT,
    )


@final
class Observed:
    """Trains packs as the engine does, and on request records their batches and trains on none of their rows.

    Args:
        train: What trains a pack.
    """

    def __init__(self, train: TrainPack) -> None:
        self._train = train
        self._seen: list[list[Batches]] | None = None

    def __call__(
        self,
        engine: Engine,
        works: Sequence[ClientWork],
        common: Mapping[str, NDArray[np.floating]],
        config: TrainConfig,
        private: PrivateStep | None = None,
        **local: Any,
    ) -> list[ClientResult]:
        """Train a pack; see :func:`fedlora.engine.train_pack`."""
        if self._seen is not None and private is not None:  # rows of nobody, on which all is tried first, are not
            self._seen.append([work.batches for work in works])
            works = [replace(work, batches=[NO_ROWS] * len(work.batches)) for work in works]
        return self._train(engine, works, common, config, private, **local)

    @contextmanager
    def recording(self) -> Iterator[list[list[Batches]]]:
        """Record the batches of each pack, and train on steps without rows, whose result is noise alone."""
        seen: list[list[Batches]] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None


@final
class Disk:
    """Puts files on the disk, until it is made to fail."""

    def __init__(self) -> None:
        self._fails = False

    def __call__(self, descriptor: int) -> None:
        """Put an open file on the disk; see :func:`os.fsync`."""
        if self._fails:
            raise OSError(28, "the audit lets the disk fail")
        os.fsync(descriptor)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Fail."""
        self._fails = True
        try:
            yield
        finally:
            self._fails = False


@final
class Audited:
    """The run that is audited, and the worker that all checks use.

    Args:
        config: Its configuration.
        data: Its data.
        folder: Where clients keep what is theirs, check by check.
        train: What trains a pack.
    """

    def __init__(self, config: Config, data: FederatedData, folder: Path, train: TrainPack) -> None:
        self.config = config
        self.data = data
        self.engine = Observed(train)
        self.disk = Disk()
        self._folder = folder
        self._job: Job | None = None
        self._worker = Worker(self._fetch, max(1, (os.cpu_count() or 1) // 2), self.engine, self.disk)

    def site(self, rows: Sequence[NDArray[np.int64]], steps: int = 2, batch: int = 0, **privacy: Any) -> KnownSite:
        """Give the worker clients with these rows; the clients before are gone.

        Args:
            rows: Training rows of each client.
            steps: Local steps of a round.
            batch: Expected batch size; 0: the run's.
            privacy: Changed ``privacy`` keys.
        """
        config = self.config
        config = replace(
            config,
            engine=replace(config.engine, dtype="float64"),
            train=unit_steps(config.train, steps, batch or config.train.batch_size),
            privacy=replace(config.privacy, **{"epsilon": 0.0, **privacy}),
        )
        config = METHODS[config.method.name].without_penalties(config)
        self._job = Job(config.to_flat(), held_by(self.data, rows), SiteLimits(mkdtemp(dir=self._folder)))
        self._worker.renew()
        return KnownSite(config, self._worker)

    def one_step(
        self, rows: Sequence[NDArray[np.int64]], batch: int, clip: float, noise_multiplier: float = 0.0
    ) -> KnownSite:
        """Give the worker clients that take one step, on all of their rows; the clients before are gone.

        Args:
            rows: Training rows of each client.
            batch: Expected batch size.
            clip: The clip.
            noise_multiplier: Of the step; 0: the least that is next to none.
        """
        noise = noise_multiplier or _NO_NOISE / max(1.0, clip)
        return self.site(rows, steps=1, batch=batch, client_size=batch, noise_multiplier=noise, max_grad_norm=clip)

    def turns(self) -> list[int]:
        """Return the first round of each set of roles that clients train with, over a cycle of rounds."""
        site = self.site([self.data.training_rows(0)])
        strategy = site.strategy
        seen: dict[tuple[object, ...], int] = {}
        for number in range(1, strategy.period + 1):
            seen.setdefault((*strategy.all_roles(number).items(), strategy.blocks(number)), number)
        return list(seen.values())

    def _fetch(self) -> Job:
        assert self._job is not None, "a check makes its site first"
        return self._job


@final
@dataclass(frozen=True)
class KnownSite:
    """Clients whose rows are known.

    Attributes:
        config: The configuration that they train with.
        worker: The worker, at work on them.
    """

    config: Config
    worker: Worker

    @property
    def mechanism(self) -> Mechanism:
        """What each client does in a round."""
        return Mechanism.of(self.config)

    @property
    def strategy(self) -> Strategy:
        """The run's strategy."""
        return build_strategy(self.config, self.worker.loaded.model.specs)

    def ledger(self, client: int) -> Ledger:
        """Return a client's ledger."""
        assert self.worker.loaded.accounts is not None, "audited under DP"
        return self.worker.loaded.accounts.ledger(client)

    def train(self, clients: Sequence[int], number: int = 1, roles_of: int = 1) -> list[Update]:
        """Train a pack for a round, with the roles of a round."""
        strategy = self.strategy
        sent = {name: self.start(spec, name) for name, spec in strategy.sent(roles_of).items()}
        heads = tuple(self.ledger(client).head() for client in clients)
        roles, blocks, experts = strategy.all_roles(roles_of), strategy.blocks(roles_of), strategy.experts(clients)
        return self.worker.train(
            Instruction(number, tuple(clients), roles, sent, blocks=blocks, experts=experts, ledger_heads=heads)
        )

    def start(self, spec: TensorSpec, name: str, number: int = 1) -> NDArray[np.floating]:
        """Return a tensor moved away from its start, where factors that are zero hide gradients."""
        if name + ALL in self.worker.loaded.model.specs:  # a copy of the first of the experts that are sent
            experts = self.start(self.worker.loaded.model.specs[name + ALL], name + ALL)
            return np.asarray(experts[0])
        if self.strategy.all_roles(1)[spec.kind] is Role.UPLOAD:  # the site draws it anew in every round
            return initial_tensors({name: spec}, Seeded(self.config.seed), "float64", number)[name]
        initial = cut(self.worker.loaded.model.initial[name], spec.shape)
        return initial + 0.1 * np.random.default_rng(0).standard_normal(spec.shape)

    def released(self, clients: Sequence[int], roles_of: int = 1, number: int = 1) -> list[Arrays]:
        """Return, for each client, what its optimizer was given over a round, times the expected batch size.

        Of all trained tensors: those that leave, and those that the site keeps.

        Raises:
            RuntimeError: A client did not train.
        """
        store = self.worker.loaded.store
        specs = {**self.worker.loaded.model.specs, **self.strategy.specs(roles_of)}  # of a round of fewer ranks
        own = with_role(specs, self.strategy.all_roles(roles_of), Role.PERSONAL)
        for client in clients:
            if own:
                store.save(client, number - 1, {name: self.start(spec, name) for name, spec in own.items()})
        found = []
        for update in self.train(clients, number, roles_of):
            if update.report.reason:
                raise RuntimeError(update.report.reason)
            kept = (store.load(update.client, number + 1) or {}) if own else {}
            after = {**update.tensors, **{name: kept[name] for name in own}}
            scale = self.mechanism.expected_batch_size
            found.append(
                {name: (self.start(specs[name], name, number) - value) * scale for name, value in after.items()}
            )
        return found
