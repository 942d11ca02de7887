"""The trainer: owns one shard of the machine, a resident base model, and trains packs of clients.

It lives in a Ray actor of its own (see :mod:`clients.pool`), so that Flower's clients stay thin, a killed
trainer is restarted, and the base model is loaded once however many clients and rounds there are. torch is
imported when a trainer starts, not when this module is: Flower's processes never need it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clients.private import PrivateStore
from fedlora.config import Config, Scalar
from fedlora.data import FederatedData
from fedlora.fingerprint import code_fingerprint
from fedlora.methods import TensorSpec, initial_tensors, tensors_digest
from fedlora.roles import Role, with_role
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from fedlora.engine import ClientResult, Engine
    from fedlora.tasks import Examples

Arrays = dict[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Request:
    """A pack's work in one round.

    Attributes:
        round: The round, from 1.
        clients: The clients of the pack, ascending.
        roles: Role of each kind of tensor.
        tensors: Current values of the shared and broadcast tensors.
    """

    round: int
    clients: tuple[int, ...]
    roles: Mapping[str, Role]
    tensors: Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Description:
    """What a trainer tells the server about itself.

    Attributes:
        specs: The method's tensors.
        family: The base model's type.
        num_parameters: Parameters of the base model.
        digest: Of the base model's weights and the tokenizer.
        initial_digest: Of the seeded tensors, to compare with the server's.
        fingerprint: Of the code it runs, with its folders.
        device: Where it computes.
        threads: CPU threads that it uses.
        pid: Its process.
        base_loads: How often this process loaded the base model.
    """

    specs: dict[str, TensorSpec]
    family: str
    num_parameters: int
    digest: str
    initial_digest: str
    fingerprint: tuple[str, str]
    device: str
    threads: int
    pid: int
    base_loads: int


class Trainer:
    """Trains and evaluates packs.

    Args:
        flat: The run's configuration, dotted.
        data: All clients' rows (in a simulation) and the test rows.
        threads: CPU threads to use.
        private_folder: Where clients keep private tensors.
    """

    def __init__(self, flat: Mapping[str, Scalar], data: FederatedData, threads: int, private_folder: str) -> None:
        self.config = Config.from_flat(flat)
        self.data = data
        self.threads = threads
        self.private = PrivateStore(Path(private_folder))
        self.initial: Arrays = {}
        self.base_loads = 0
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> _Loaded:
        """The resident engine and the tokenized rows.

        Loaded at the first call and not in the constructor, whose errors Ray would wrap in its own.
        """
        if self._loaded is None:
            self._loaded = _load(self.config, self.data, self.threads)
            self.base_loads += 1
            self.initial = initial_tensors(
                self._loaded.engine.method.specs(), Seeded(self.config.seed), self.config.engine.tensor_dtype
            )
        return self._loaded

    def describe(self) -> Description:
        """Return the trainer's description."""
        engine = self.loaded.engine
        structure = engine.base.structure
        return Description(
            specs=engine.method.specs(),
            family=structure.family,
            num_parameters=structure.num_parameters,
            digest=engine.base.digest,
            initial_digest=tensors_digest(self.initial),
            fingerprint=code_fingerprint(),
            device=str(engine.device),
            threads=self.threads,
            pid=os.getpid(),
            base_loads=self.base_loads,
        )

    def train(self, request: Request) -> list[ClientResult]:
        """Train a pack for a round and return each client's shared tensors; private ones stay here."""
        from fedlora.engine import ClientWork, plan_batches, train_pack

        engine, examples = self.loaded.engine, self.loaded.train_examples
        specs = engine.method.specs()
        trained = with_role(specs, request.roles, Role.SHARED, Role.PRIVATE)
        private = with_role(specs, request.roles, Role.PRIVATE)
        seeded = Seeded(self.config.seed)
        works = []
        for client in request.clients:
            state = self._state(request, client)
            rows = self.data.training_rows(client)
            batches = plan_batches(seeded, request.round, client, rows, self.config.train)
            works.append(ClientWork(client, examples, len(rows), batches, {name: state[name] for name in trained}))
        common = {name: value for name, value in self._common(request).items() if name not in trained}
        results = train_pack(engine, works, common, self.config.train)
        for result in results:
            kept = {name: result.tensors.pop(name) for name in private}
            if kept and not result.error:
                self.private.save(result.client, request.round, kept)
        return results

    def evaluate(self, tensors: Mapping[str, NDArray[np.floating]], rows: Sequence[int]) -> dict[str, float]:
        """Return metric sums of the global model over test rows; ``tensors`` are what the server holds."""
        from fedlora.engine import evaluate

        loaded = self.loaded
        return evaluate(loaded.engine, {**self.initial, **tensors}, loaded.test_examples, rows)

    def evaluate_personal(self, request: Request) -> list[dict[str, float]]:
        """Return, for each client, metric sums of its own model over the rows that it held out."""
        from fedlora.engine import evaluate

        engine, examples = self.loaded.engine, self.loaded.train_examples
        return [
            evaluate(engine, self._state(request, client), examples, self.data.holdout[client].tolist())
            for client in request.clients
        ]

    def export(self, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, bytes]:
        """Return the files of a PEFT adapter for the tensors that the server holds."""
        from fedlora.runs.export import adapter_files

        engine = self.loaded.engine
        return adapter_files(engine, {**self.initial, **tensors}, self.config)

    def _common(self, request: Request) -> Arrays:
        return {**self.initial, **request.tensors}

    def _state(self, request: Request, client: int) -> Arrays:
        """Return all tensors of a client as it starts a round."""
        private = with_role(self.loaded.engine.method.specs(), request.roles, Role.PRIVATE)
        kept = self.private.load(client, request.round) if private else None
        return {**self._common(request), **(kept or {})}


@dataclass(frozen=True)
class _Loaded:
    """What a trainer keeps resident."""

    engine: Engine
    train_examples: Examples
    test_examples: Examples


def _load(config: Config, data: FederatedData, threads: int) -> _Loaded:
    """Load the base model and tokenize the rows."""
    import torch

    from fedlora.engine import Engine
    from fedlora.methods import build_method
    from fedlora.models import load_base
    from fedlora.tasks import TASKS

    torch.set_num_threads(threads)
    base = load_base(
        config.model.name,
        len(data.corpus.classes),
        config.method.target_modules,
        dtype=getattr(torch, config.engine.dtype),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    method = build_method(config.method, base.structure.adapted, base.structure.head)
    task = TASKS[config.task](base.tokenizer.pad_token_id)
    longest = config.train.max_length
    _check_length(base.model, longest)
    return _Loaded(
        Engine.build(base, method, task),
        task.encode(data.corpus.train, base.tokenizer, longest),
        task.encode(data.corpus.test, base.tokenizer, longest),
    )


def _check_length(model: Any, wanted: int) -> None:
    """Refuse texts longer than the model has positions for."""
    limit = int(getattr(model.config, "max_position_embeddings", wanted))
    if model.config.model_type in ("roberta", "xlm-roberta", "camembert"):  # positions start after the padding's
        limit -= 2
    if wanted > limit:
        raise ValueError(f"train.max-length = {wanted}: the model takes {limit} tokens at most; lower it to that.")
