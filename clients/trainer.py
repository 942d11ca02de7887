"""The trainer: owns one shard of the machine, a resident base model, and trains packs of clients.

It lives in a Ray actor of its own (see :mod:`clients.pool`), so that Flower's clients stay thin, a killed
trainer is restarted, and the base model is loaded once however many clients and rounds there are. torch is
imported when a trainer starts, not when this module is: Flower's processes never need it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clients.accounts import Accounts, RefusedError
from clients.personal import PersonalStore
from fedlora import plugins
from fedlora.config import Config, Scalar, TrainConfig
from fedlora.data import FederatedData
from fedlora.methods import TensorSpec, initial_tensors, tensors_digest
from fedlora.privacy import PrivateRandom
from fedlora.roles import Role, with_role
from fedlora.seeded import Seeded

if TYPE_CHECKING:
    from fedlora.engine import ClientResult, ClientWork, Engine
    from fedlora.privacy.step import PrivateStep
    from fedlora.tasks import Examples

_logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[np.floating]]

_PROBED = 8  # rows of a client that a probe takes, at most


@dataclass(frozen=True)
class Job:
    """What trainers work on until they are given another.

    Attributes:
        flat: The run's configuration, dotted.
        data: All clients' rows (in a simulation), and what the server evaluates on.
        site_folder: Where clients keep private tensors.
    """

    flat: Mapping[str, Scalar]
    data: FederatedData
    site_folder: str


@dataclass(frozen=True)
class Request:
    """A pack's work in one round.

    Attributes:
        round: The round, from 1.
        clients: The clients of the pack, ascending.
        roles: Role of each kind of tensor.
        tensors: Current values of the shared and broadcast tensors.
        ledger_heads: Under DP for each client the hash of the last ledger entry that the server was told.
    """

    round: int
    clients: tuple[int, ...]
    roles: Mapping[str, Role]
    tensors: Mapping[str, NDArray[np.floating]]
    ledger_heads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Update:
    """What a client lets out of a round.

    Attributes:
        client: Its number.
        tensors: Its shared tensors.
        examples: How many rows it trains on; 0 under DP.
        steps: Optimizer steps taken.
        loss: Mean training loss; None under DP.
        error: Why the update must not be used; empty when it may.
        ledger_head: Under DP the hash of the ledger entry that pays for it.
    """

    client: int
    tensors: Arrays
    examples: int = 0
    steps: int = 0
    loss: float | None = None
    error: str = ""
    ledger_head: str = ""


@dataclass(frozen=True)
class Description:
    """What a trainer tells the server about itself.

    Attributes:
        specs: The method's tensors.
        family: The base model's type.
        num_parameters: Parameters of the base model.
        num_layers: Its adapted layers.
        digest: Of the base model's weights and the tokenizer.
        initial_digest: Of the seeded tensors, to compare with the server's.
        constants_digest: Of the method's constants, such as indices.
        fingerprint: Of the code it runs, with its folders.
        device: Where it computes.
        threads: CPU threads that it uses.
        pid: Its process.
        base_loads: How often this process loaded the base model.
    """

    specs: dict[str, TensorSpec]
    family: str
    num_parameters: int
    num_layers: int
    digest: str
    initial_digest: str
    constants_digest: str
    fingerprint: tuple[str, str]
    device: str
    threads: int
    pid: int
    base_loads: int


@dataclass(frozen=True)
class Speed:
    """What a short probe measured.

    Attributes:
        train_s: Seconds to train on one token.
        evaluate_s: Seconds to evaluate one token.
        row_tokens: Mean tokens of a training row.
        measured_tokens: Tokens that a round is measured on.
    """

    train_s: float
    evaluate_s: float
    row_tokens: float
    measured_tokens: int


class Trainer:
    """Trains and evaluates packs.

    Args:
        job: Tells what to work on; asked again after :meth:`renew`, and by a trainer that was restarted.
        threads: CPU threads to use.
    """

    def __init__(self, job: Callable[[], Job], threads: int) -> None:
        self._ask = job
        self.threads = threads
        self._resident = _Resident()
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> _Loaded:
        """The job with its resident engine and tokenized rows.

        Loaded at the first call and not in the constructor, whose errors Ray would wrap in its own. What the job
        before has in common with this one stays: the base model, and tables that are already tokenized.
        """
        if self._loaded is None:
            self._loaded = _load(self._ask(), self.threads, self._resident)
        return self._loaded

    @property
    def initial(self) -> Arrays:
        """All of the method's tensors as the seed gives them."""
        return self.loaded.initial

    @property
    def data(self) -> FederatedData:
        """The job's data."""
        return self.loaded.job.data

    @property
    def personal(self) -> PersonalStore:
        """The clients' personal tensors."""
        return self.loaded.personal

    def renew(self) -> None:
        """Ask for the job anew before the next piece of work."""
        self._loaded = None

    def describe(self) -> Description:
        """Return the trainer's description."""
        engine = self.loaded.engine
        structure = engine.base.structure
        return Description(
            specs=self.loaded.specs,
            family=structure.family,
            num_parameters=structure.num_parameters,
            num_layers=len(structure.adapted),
            digest=engine.base.digest,
            initial_digest=tensors_digest(self.initial),
            constants_digest=tensors_digest(engine.method.constants()),
            fingerprint=plugins.fingerprint(self.loaded.config.run.plugins),
            device=str(engine.device),
            threads=self.threads,
            pid=os.getpid(),
            base_loads=self._resident.loads,
        )

    def train(self, request: Request) -> list[Update]:
        """Train a pack for a round and return what each client lets out; private tensors stay here."""
        from fedlora.engine import plan_batches, train_pack

        try:
            loaded = self.loaded
        except Exception:
            if not request.ledger_heads:
                raise
            _logger.exception("loading failed")  # its text may quote a row, so it stays in the site's log
            raise RuntimeError("loading failed at the site; its own log says why") from None
        if loaded.accounts is not None:
            return self._train_under_dp(request, loaded.accounts)
        seeded, config = Seeded(loaded.config.seed), loaded.config.train
        batches = [
            plan_batches(seeded, request.round, client, self.data.training_rows(client), config)
            for client in request.clients
        ]
        works, common = self._works(request, batches)
        results = train_pack(loaded.engine, works, common, config)
        for result in results:
            self._keep_personal(request, result)
        return [Update(r.client, r.tensors, r.examples, r.steps, r.loss, r.error) for r in results]

    def _train_under_dp(self, request: Request, accounts: Accounts) -> list[Update]:
        """Pay for the round, train those that may, and let out nothing that the guarantee does not cover.

        Raises:
            ValueError: What the server sent cannot train.
            RuntimeError: Something failed; the message is the same whatever it was.
        """
        if len(request.ledger_heads) != len(request.clients):
            raise ValueError("a client under DP trains only for a server that says what it last saw of its ledger")
        self._check_trains(request)
        updates, paid = [], {}
        for client, ledger_head in zip(request.clients, request.ledger_heads, strict=True):
            try:
                paid[client] = accounts.charge(client, request.round, ledger_head)
            except RefusedError as refused:
                updates.append(Update(client, {}, error=str(refused)))
        request = replace(request, clients=tuple(paid), ledger_heads=())
        try:
            results = self._private_results(request, accounts) if paid else []
        except Exception as error:  # its text may quote a row, and its kind may tell of one
            for client in paid:
                accounts.note(client, request.round, {"error": f"{type(error).__name__}: {error}"})
            raise RuntimeError("training failed at the site; its own diagnostics.jsonl says why") from None
        for result in results:
            # What the watch saw in rows' gradients stays here; of the tensors, noise included, all may know.
            finite = all(np.isfinite(value).all() for value in result.tensors.values())
            fault = "" if finite else "its tensors are not finite after the round; lower train.learning-rate"
            accounts.note(
                result.client,
                request.round,
                {"loss": result.loss, "steps": result.steps, **result.diagnostics, "error": result.error},
            )
            self._keep_personal(request, replace(result, error=fault))
            updates.append(
                Update(result.client, result.tensors, steps=result.steps, error=fault, ledger_head=paid[result.client])
            )
        return sorted(updates, key=lambda update: update.client)

    def _private_results(self, request: Request, accounts: Accounts) -> list[ClientResult]:
        from fedlora.engine import train_pack
        from fedlora.privacy.step import PrivateStep

        mechanism = accounts.mechanism
        randoms = [accounts.random(client, request.round) for client in request.clients]
        batches = [
            mechanism.batches(random, self.data.training_rows(client))
            for client, random in zip(request.clients, randoms, strict=True)
        ]
        works, common = self._works(request, batches)
        private = PrivateStep(mechanism, randoms)
        return train_pack(self.loaded.engine, works, common, self.loaded.config.train, private)

    def _check_trains(self, request: Request) -> None:
        """Have the watch see two steps on made-up rows: what it sees in real ones must not leave under DP."""
        from fedlora.engine import ClientWork, made_up_rows, train_pack

        trained = frozenset(with_role(self.loaded.specs, request.roles, Role.SHARED, Role.PERSONAL))
        if trained in self.loaded.seen_to_train:
            return
        tensors, examples = self._common(request), made_up_rows(self.loaded.engine)
        start = {name: value for name, value in tensors.items() if name in trained}
        common = {name: value for name, value in tensors.items() if name not in trained}
        work = ClientWork(0, examples, len(examples), [np.arange(len(examples))] * 2, start)
        error = train_pack(self.loaded.engine, [work], common, TrainConfig())[0].error
        if error:
            raise ValueError(error)
        self.loaded.seen_to_train.add(trained)

    def _keep_personal(self, request: Request, result: ClientResult) -> None:
        """Take the client's private tensors out of a result, and keep them if it may be used."""
        private = with_role(self.loaded.specs, request.roles, Role.PERSONAL)
        kept = {name: result.tensors.pop(name) for name in private}
        if kept and not result.error:
            self.loaded.personal.save(result.client, request.round, kept)

    def _works(
        self, request: Request, batches: Sequence[Sequence[NDArray[np.int64]]]
    ) -> tuple[list[ClientWork], Arrays]:
        """Return what each client does in the round, and the tensors that none of them trains."""
        from fedlora.engine import ClientWork

        loaded, works = self.loaded, []
        trained = with_role(loaded.specs, request.roles, Role.SHARED, Role.PERSONAL)
        for client, own in zip(request.clients, batches, strict=True):
            state = self._state(request, client)
            count = len(self.data.training_rows(client))
            start = {name: state[name] for name in trained}
            works.append(ClientWork(client, loaded.examples["train"], count, own, start))
        return works, {name: value for name, value in self._common(request).items() if name not in trained}

    def probe(self, request: Request) -> Speed:
        """Train and evaluate a few rows of each client, twice, and time the second; nothing is kept of it."""
        from fedlora.engine import evaluate, train_pack

        loaded = self.loaded
        size = min(_PROBED, loaded.config.train.batch_size)
        batches = [[self.data.training_rows(client)[:size]] for client in request.clients]
        works, common = self._works(request, batches)
        private = loaded.accounts and _throwaway(loaded.accounts, len(works))
        examples = loaded.examples["train"]
        rows = [int(row) for (batch,) in batches for row in batch]
        tokens = max(1, int(examples.lengths[rows].sum()))
        for _ in range(2):
            started = time.perf_counter()
            train_pack(loaded.engine, works, common, loaded.config.train, private)
            trained = time.perf_counter()
            evaluate(loaded.engine, self._common(request), examples, rows)
            evaluated = time.perf_counter()
        return Speed(
            train_s=(trained - started) / tokens,
            evaluate_s=(evaluated - trained) / tokens,
            row_tokens=float(examples.lengths.mean()),
            measured_tokens=int(loaded.examples[loaded.measured].lengths.sum()),
        )

    def evaluate(
        self, tensors: Mapping[str, NDArray[np.floating]], split: str, rows: Sequence[int]
    ) -> dict[str, NDArray[np.float64]]:
        """Return facts of each of these rows under the global model; ``tensors`` are what the server holds."""
        from fedlora.engine import evaluate

        loaded = self.loaded
        return evaluate(loaded.engine, {**loaded.initial, **tensors}, loaded.examples[split], rows)

    def evaluate_personal(self, request: Request, split: str = "") -> list[dict[str, float]]:
        """Return, for each client, the sums of its own model's facts over the rows that it held out.

        Args:
            request: The clients, and what they start the round with.
            split: Evaluate each client on all rows of this split instead.
        """
        from fedlora.engine import evaluate

        loaded = self.loaded
        private = with_role(loaded.specs, request.roles, Role.PERSONAL)
        common = {name: value for name, value in self._common(request).items() if name not in private}
        states = [self._state(request, client) for client in request.clients]
        if split:
            rows = [np.arange(len(loaded.examples[split]))] * len(states)
        else:
            rows = [self.data.holdout[client] for client in request.clients]
        group = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
        told = evaluate(
            loaded.engine,
            common,
            loaded.examples[split or "train"],
            np.concatenate(rows).tolist(),
            own=[{name: state[name] for name in private} for state in states],
            group=group,
        )
        return [
            {"examples": float(len(own)), **{name: float(values[group == g].sum()) for name, values in told.items()}}
            for g, own in enumerate(rows)
        ]

    def answer_evaluation(self, request: Request) -> list[dict[str, float]]:
        """Return what clients tell the server that asks them to evaluate themselves: see :meth:`evaluate_personal`.

        Raises:
            ValueError: They train under DP: sums over their rows are not covered by its guarantee.
        """
        if self.loaded.accounts is not None:
            raise ValueError("a client under DP does not tell how its model does on its rows")
        return self.evaluate_personal(request)

    def export(self, request: Request) -> list[dict[str, bytes]]:
        """Return the files of a PEFT adapter for the server's tensors, with each client's private ones in place."""
        from fedlora.runs.export import adapter_files

        loaded = self.loaded
        states = [self._state(request, client) for client in request.clients] or [self._common(request)]
        return [adapter_files(loaded.engine, state, loaded.config) for state in states]

    def _common(self, request: Request) -> Arrays:
        return {**self.initial, **request.tensors}

    def _state(self, request: Request, client: int) -> Arrays:
        """Return all tensors of a client as it starts a round."""
        private = with_role(self.loaded.specs, request.roles, Role.PERSONAL)
        kept = self.personal.load(client, request.round) if private else None
        return {**self._common(request), **(kept or {})}


@dataclass
class _Resident:
    """What outlives a job, where the next one has a use for it.

    Attributes:
        key: What the engine's base model was loaded by.
        engine: An engine on that base model.
        loads: How often a base model was loaded.
        examples: Tokenized rows by split, each with what they were tokenized from.
    """

    key: tuple[Any, ...] = ()
    engine: Engine | None = None
    loads: int = 0
    examples: dict[str, tuple[tuple[Any, ...], Examples]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Loaded:
    """A job, ready to work on.

    Attributes:
        job: The job.
        config: Its configuration.
        engine: The engine.
        specs: The method's tensors.
        initial: Their values from the seed.
        examples: The tokenized rows, by split.
        personal: The clients' personal tensors.
        accounts: The clients' privacy accounts; None without DP.
        seen_to_train: Sets of trained tensors that were seen to train on made-up rows.
    """

    job: Job
    config: Config
    engine: Engine
    specs: dict[str, TensorSpec]
    initial: Arrays
    examples: dict[str, Examples]
    personal: PersonalStore
    accounts: Accounts | None
    seen_to_train: set[frozenset[str]] = field(default_factory=set)

    @property
    def measured(self) -> str:
        """The split that a round is measured on."""
        return "dev" if "dev" in self.examples else "test"


def _throwaway(accounts: Accounts, clients: int) -> PrivateStep:
    """Return what steps under DP need whose result nobody sees."""
    from fedlora.privacy.step import PrivateStep

    return PrivateStep(accounts.mechanism, [PrivateRandom() for _ in range(clients)])


def _load(job: Job, threads: int, resident: _Resident) -> _Loaded:
    """Load the base model and tokenize the rows, but for what is resident already."""
    import torch

    from fedlora.engine import Engine, check_rows_apart
    from fedlora.methods import build_method
    from fedlora.models import check_length, load_base
    from fedlora.tasks import TASKS

    torch.set_num_threads(threads)
    config, corpus = plugins.read_config(job.flat, foreign=True), job.data.corpus
    task_class = TASKS[config.task]
    classes = len(corpus.classes) if task_class.has_head else 0
    key = (config.model.name, task_class, classes, config.method.target_modules)
    base = resident.engine.base if resident.engine and resident.key == (*key, config.engine.dtype) else None
    if base is None:
        resident.engine = None  # two base models might not fit
        base = load_base(
            *key,
            dtype=getattr(torch, config.engine.dtype),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        resident.key, resident.loads = (*key, config.engine.dtype), resident.loads + 1
    check_length(base.model.config, config.train.max_length)
    method = build_method(config, base.structure.adapted, base.structure.head)
    task = task_class(base.tokenizer.pad_token_id, config.data.chat_template)
    if resident.engine is None:
        resident.engine = Engine.build(base, method, task)
    engine = replace(resident.engine, method=method, task=task)
    for split, table in corpus.splits.items():
        source = (table, config.model.name, config.train.max_length, task_class, config.data.chat_template)
        if split not in resident.examples or resident.examples[split][0] != source:
            resident.examples[split] = (source, task.encode(table, base.tokenizer, config.train.max_length))
    specs = method.specs()
    initial = initial_tensors(specs, Seeded(config.seed), config.engine.tensor_dtype)
    if config.privacy.mode == "dp":
        check_rows_apart(engine, initial)
    return _Loaded(
        job=job,
        config=config,
        engine=engine,
        specs=specs,
        initial=initial,
        examples={split: resident.examples[split][1] for split in corpus.splits},
        personal=PersonalStore(Path(job.site_folder)),
        accounts=Accounts(Path(job.site_folder), config) if config.privacy.mode == "dp" else None,
    )
