"""The check before a run: data, model, method and rows tried together, before Flower, Ray or a trainer start.

What it lets pass, the run itself must not refuse. What is quick to be wrong comes first: that a model is not there, or
that there are more clients than rows, is found before torch and transformers are imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config
from fedlora.data import Corpus, FederatedData, load_corpus, partitioned
from fedlora.data.partition import check_enough
from fedlora.hub import check_model
from fedlora.methods import build_method, initial_tensors
from fedlora.quantisation import base_bytes
from fedlora.seeded import Seeded
from fedlora.tasks import TASKS
from simulations.cluster import machines_of_a_run, shards_of_a_run
from simulations.plan import Plan
from simulations.setup import asked_clients, federation_of, settle
from strategies.build import build_strategy

if TYPE_CHECKING:
    from fedlora.engine import Batching
    from fedlora.models import Structure

T = TypeVar("T")


def preflight(config: Config, nodes: int, *, rows: int | None = None) -> tuple[Plan, Structure]:
    """Return the plan of a run and the structure of its model, having tried what can be tried without its weights.

    Args:
        config: The resolved configuration.
        nodes: SuperNodes that the run will have.
        rows: Rows of each split that are tokenized; None: all.

    Raises:
        ValueError: Data, model, method or strategy cannot work, or not together.
    """
    return Preflight(nodes, rows=rows).plan(config)


def what_is_read(config: Config) -> tuple[object, ...]:
    """Return the parts of a configuration that decide which rows there are."""
    return config.task, config.seed, config.data, config.eval.test, config.plugin_options


@final
class Preflight:
    """Tries one configuration after another, and what several of them have in common only once.

    Args:
        nodes: SuperNodes that the runs will have.
        rows: Rows of each split that are tokenized; None: all.
    """

    def __init__(self, nodes: int, *, rows: int | None = None) -> None:
        self._nodes, self._rows = nodes, rows
        self._made: dict[tuple[object, ...], Any] = {}
        self._read: tuple[object, ...] = ()
        self._data: dict[int | None, Any] = {}  # the corpus that was read last, and how it was partitioned

    def plan(self, config: Config) -> tuple[Plan, Structure]:
        """Return the plan of a run and the structure of its model, as :func:`preflight` does."""
        data = self._dealt(config)
        corpus = data.corpus
        structure, labels = self._model(config, corpus)
        specs = build_method(config, structure.adapted, structure.head).specs()
        if config.method.start:
            from fedlora.models import adapter_start

            adapter_start(config, structure, initial_tensors(specs, Seeded(config.seed)))
        config, data = settle(config, self._nodes, data)
        remarks, cost = self._tried(config, structure, corpus, labels)
        shards = tuple(shards_of_a_run(config, self._once("machines", make=machines_of_a_run)))
        plan = Plan(
            config=config,
            data=data,
            strategy=build_strategy(config, specs),
            federation=federation_of(config),
            family=structure.family,
            num_parameters=structure.num_parameters,
            num_layers=len(structure.adapted),
            nodes=self._nodes,
            trainers=len(shards),
            remarks=remarks,
            shards=shards,
            base_bytes=base_bytes(
                structure.num_parameters, structure.num_quantisable, config.model.quantization, config.engine.dtype
            ),
            row_tokens=self._row_tokens(data, cost),
        )
        return plan, structure

    def deal(self, config: Config) -> None:
        """Try what another seed changes: what :meth:`quick` tries, how rows are dealt, what depends on their number.

        Raises:
            ValueError: They cannot be dealt as they are to be, or a client is too small for its batches or its privacy.
        """
        settle(config, self._nodes, self._dealt(config))

    def quick(self, config: Config) -> Corpus:
        """Try what takes no seconds, and return the rows: whether the model is there, and rows enough for all clients.

        Raises:
            ValueError: It is not, or they are not.
        """
        self._once("there", config.model, make=lambda: check_model(config.model))
        corpus = self._corpus(config)
        check_enough(corpus, config.data, asked_clients(config, self._nodes))
        return corpus

    def _once(self, *key: object, make: Callable[[], T]) -> T:
        """Return what was made of equal parts of a configuration before, or make it now."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def _dealt(self, config: Config) -> FederatedData:
        """Return the rows of each client."""
        corpus, clients = self.quick(config), asked_clients(config, self._nodes)
        if clients not in self._data:
            self._data[clients] = partitioned(corpus, config, clients)
        data: FederatedData = self._data[clients]
        return data

    def _corpus(self, config: Config) -> Corpus:
        """Return the rows, of which there may be many: those of one configuration are kept, and no others."""
        read = what_is_read(config)
        if self._read != read:
            self._read, self._data = (), {}
            self._data[None] = load_corpus(config)
            self._read = read
        corpus: Corpus = self._data[None]
        return corpus

    def _model(self, config: Config, corpus: Corpus) -> tuple[Structure, tuple[str, ...]]:
        """Return the structure of the model, and the class names of the head that its checkpoint has."""
        from fedlora.models import check_length, inspect_by_name, own_config, trained_labels

        task, targets = TASKS[config.task], config.method.target_modules
        outputs = _outputs(config, corpus)
        labels = self._once("labels", config.model, task, make=lambda: trained_labels(own_config(config.model), task))
        structure = self._once(
            *("structure", config.model, task, outputs, targets),
            make=lambda: inspect_by_name(config.model, task, outputs, targets),
        )
        check_length(structure, config.train.max_length)
        return structure, labels

    def _row_tokens(self, data: FederatedData, cost: NDArray[np.int64]) -> tuple[float, ...]:
        """Return the mean tokens of each client's training rows; nothing where not all rows were tokenized."""
        if self._rows is not None and len(data.corpus.train) > self._rows:
            return ()
        rows = map(data.training_rows, range(len(data.clients)))
        return tuple(float(cost[own].mean()) if len(own) else 0.0 for own in rows)

    def _tried(
        self, config: Config, structure: Structure, corpus: Corpus, labels: tuple[str, ...]
    ) -> tuple[tuple[str, ...], NDArray[np.int64]]:
        """Tokenize the rows and rehearse the model; return what may surprise, and the tokens of training rows."""
        from clients.resident import model_remarks
        from fedlora.engine.rehearsal import rehearse
        from fedlora.models import load_tokenizer

        outputs, length = _outputs(config, corpus), config.train.max_length
        tokenizer = self._once("tokenizer", config.model, make=lambda: load_tokenizer(config.model))
        inputs = (config.model, config.task, config.data.chat_template, config.plugin_options, length)
        task: Any = self._once("task", *inputs, make=lambda: TASKS[config.task].build(tokenizer, config))

        def encode() -> Any:
            return {
                split: task.encode(table.first(self._rows), tokenizer, length).cost
                for split, table in corpus.splits.items()
            }

        def batching() -> Batching | None:
            engine = rehearse(config, structure, task, tokenizer, outputs)
            return engine.batching if engine else None

        cost = self._once("rows", *inputs, self._read, make=encode)["train"]
        found = self._once("batching", *inputs, outputs, config.method.target_modules, make=batching)
        remarks = model_remarks(structure, labels, found, config, corpus.classes)
        untried = "note: whether rows can be kept apart in this model is found out when it is loaded"
        return (remarks if found is not None else (*remarks, untried)), cost


def _outputs(config: Config, corpus: Corpus) -> int:
    """Return the outputs of the head that the task adds to the model; 0 where it adds none."""
    return len(corpus.classes) if TASKS[config.task].has_head else 0
