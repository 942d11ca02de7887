"""The base model and tokenized rows that stay in memory from job to job, and a job's model made ready from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from clients.data_parallel import DataParallel
from clients.shared_rows import SharedRows
from fedlora.config import Config
from fedlora.data import Corpus, Table
from fedlora.engine import Batching, Engine, find_batching
from fedlora.engine.fast import like, reset, settle
from fedlora.engine.rehearsal import rehearse
from fedlora.methods import TensorSpec, build_method, initial_tensors
from fedlora.models import Base, Structure, adapter_start, check_length, head_words, keeps_head, load_base
from fedlora.quantisation import base_bytes
from fedlora.reports.format import human_bytes
from fedlora.seeded import Seeded
from fedlora.tasks import TASKS, Rows, Task


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to train and to evaluate, with the rows for both.

    Attributes:
        config: The configuration.
        engine: The engine.
        parallel: The engine on all of the trainer's threads.
        specs: The method's tensors.
        initial: Their values as every machine starts them: from the seed, or as they were saved.
        saved: Those of them that were saved: the head of the checkpoint, the tensors of ``method.start``.
        examples: The tokenized rows, by split.
        classes: Class names by class number.
    """

    config: Config
    engine: Engine
    parallel: DataParallel
    specs: dict[str, TensorSpec]
    initial: dict[str, NDArray[np.floating]]
    saved: dict[str, NDArray[np.floating]]
    examples: dict[str, Rows]
    classes: tuple[str, ...] = ()

    @property
    def measured(self) -> str:
        """The split that a round is measured on."""
        return "dev" if "dev" in self.examples else "test"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What may surprise of the model: where the head starts, which rows may go through it together."""
        base = self.engine.base
        return model_remarks(base.structure, base.head_labels, self.engine.batching, self.config, self.classes)


def model_remarks(
    structure: Structure, labels: Sequence[str], batching: Batching | None, config: Config, classes: Sequence[str]
) -> tuple[str, ...]:
    """Return in words what a model's own make decides: adapted layers, the head's start, batches, quantised layers."""
    lines = [f"adapted: {', '.join(structure.targets)}"]
    start = config.method.start
    if start:
        lines.append(f"start: the adapter {start}; the order of the classes of its head is taken on trust")
        if config.privacy.mode == "dp":
            lines.append("note: what the start adapter was trained on is not covered by the epsilon of this run")
    if config.method.reads_public_rows:
        where = f"the weights' gradient on the rows of {config.data.public_path}, which are taken to be public"
        lines.append(f"start: A and B are singular vectors of {where}; no epsilon covers those rows")
    elif config.method.computed:
        lines.append("start: A and B are of the leading singular triples of the base model's weights")
    if structure.head:
        own = "as the start adapter has it, or where it has none " if start else ""
        lines.append(f"head: starts {own}{head_words(config.method.head_start, labels, classes)}")
    if batching is not None and batching.words:
        lines.append(f"batches: {batching.words}")
    if config.model.quantization != "none":
        taken = (
            base_bytes(structure.num_parameters, structure.num_quantisable, kind, config.engine.dtype)
            for kind in (config.model.quantization, "none")
        )
        lines.append(
            f"quantised: {config.model.quantization}, {structure.num_quantisable:,} of "
            f"{structure.num_parameters:,} parameters; the base takes {' instead of '.join(map(human_bytes, taken))}"
        )
    if config.model.trust_remote_code:
        lines.append("model.trust-remote-code: the model may run code of its own, here and at every client")
    return tuple(lines)


@final
class Resident:
    """Loads models, and keeps what the next one may have in common with the last.

    Args:
        threads: CPU threads to use.
        shared: What other processes of this machine have tokenized; None: nothing is shared.
        cards: GPUs that the base model is spread over.

    Attributes:
        loads: How often a base model was loaded.
    """

    def __init__(self, threads: int, shared: SharedRows | None = None, cards: int = 1) -> None:
        torch.set_num_threads(threads)
        self._threads, self._shared, self._cards = threads, shared, cards
        self.loads = 0
        self._key: tuple[Any, ...] = ()
        self._engine: Engine | None = None
        self._examples: dict[str, tuple[tuple[Any, ...], Rows]] = {}
        self._settled: dict[tuple[Any, ...], Engine] = {}  # of the resident base model, by what was tried

    def load(self, config: Config, corpus: Corpus) -> LoadedModel:
        """Load the base model and tokenize the rows, but for what is resident already.

        Raises:
            ValueError: They cannot be loaded, or not work together; the message may quote a row.
        """
        if not config.train.learning_rate:
            raise ValueError("train.learning-rate = 0: whoever starts the run has to say which; nothing would train.")
        task_class = TASKS[config.task]
        outputs = len(corpus.classes) if task_class.has_head else 0
        base = self._base(config, outputs)
        check_length(base.structure, config.train.max_length)
        method = build_method(config, base.structure.adapted, base.structure.head)
        task = task_class.build(base.tokenizer, config)
        options = TASKS.options_of(config.task)
        own = (task_class, config.data.chat_template, config.options(options) if options else None)
        if self._engine is None:
            self._engine = Engine.build(base, method, task)
        engine = replace(self._engine, method=method, task=task)
        for split, table in corpus.splits.items():
            source = (table, config.model, config.train.max_length, *own)
            if split not in self._examples or self._examples[split][0] != source:
                self._examples[split] = (source, self._encoded(table, task, base, config, own))
        specs = method.specs()
        seeded = initial_tensors(specs, Seeded(config.seed), config.engine.tensor_dtype)
        saved = _head_start(base, config, corpus.classes) | adapter_start(config, base.structure, seeded)
        initial = seeded | saved
        # Of the base model, the method and the task, with the rows that it makes up: nothing else is tried.
        tried = (config.method, config.plugin_options, *own, config.train.max_length, config.engine.compile)
        if tried not in self._settled:
            self._settled = {tried: self._settle(engine, initial, config, outputs)}  # it changes the modules
        ready = like(engine, self._settled[tried])
        return LoadedModel(
            config=config,
            engine=ready,
            # Packs of a size that was asked for stay whole, so that they are the same with any number of threads.
            parallel=DataParallel(ready, 1 if config.engine.pack else self._threads),
            specs=specs,
            initial=initial,
            saved=saved,
            examples={split: self._examples[split][1] for split in corpus.splits},
            classes=corpus.classes,
        )

    def _encoded(self, table: Table, task: Task, base: Base, config: Config, own: tuple[Any, ...]) -> Rows:
        """Return a table's rows, tokenized here or by another process of this machine."""

        def encode() -> Rows:
            return task.encode(table, base.tokenizer, config.train.max_length)

        if self._shared is None:
            return encode()
        return self._shared.get(table, (base.digest, config.train.max_length, *own), encode)

    @staticmethod
    def _settle(engine: Engine, initial: dict[str, NDArray[np.floating]], config: Config, outputs: int) -> Engine:
        """Return the engine with what was found by trying: which rows may go together, and its fast ways.

        What 16 bits hide in their rounding, a rehearsal in float32 finds.
        """
        reset(engine)
        batching, unpadded, base = find_batching(engine, initial), False, engine.base
        if engine.compute not in (torch.float64, torch.float32):
            on_gpu = engine.device.type == "cuda"
            tried = rehearse(config, base.structure, engine.task, base.tokenizer, outputs, unpadded=on_gpu)
            if tried is not None:
                batching, unpadded = batching | tried.batching, bool(tried.grouped.unpadded)
        engine = replace(engine, batching=batching)
        return settle(engine, initial, compiled=config.engine.compile, unpadded=unpadded)

    def _base(self, config: Config, outputs: int) -> Base:
        """Return the base model: the resident one, or another in its place."""
        key = (config.model, TASKS[config.task], outputs, config.method.target_modules)
        if self._engine is not None and self._key == (*key, config.engine.dtype):
            return self._engine.base
        self._engine, self._settled = None, {}  # two base models might not fit
        base = load_base(
            *key,
            dtype=getattr(torch, config.engine.dtype),
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            cards=self._cards,
        )
        self._key = (*key, config.engine.dtype)
        self.loads += 1
        return base


def _head_start(base: Base, config: Config, classes: Sequence[str]) -> dict[str, NDArray[np.floating]]:
    """Return the head's tensors that start as the checkpoint has them.

    Raises:
        ValueError: It was saved with a head, and lacks a part of it.
    """
    if not base.structure.head or not keeps_head(config.method.head_start, base.head_labels, classes):
        return {}
    if not base.head:
        raise ValueError(
            f"model.name = {config.model.name!r}: the checkpoint was saved with a head for {len(base.head_labels)} "
            "classes, and its weights are not all there; set method.head-start = 'fresh'."
        )
    dtype = config.engine.tensor_dtype
    return {name: value.detach().to("cpu", torch.float64).numpy().astype(dtype) for name, value in base.head.items()}
