"""Evaluation and export: of the server's tensors, and of each client's own model."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from clients.answers import write_answers
from clients.resident import LoadedModel
from clients.site import Speed
from clients.start import StartTensors
from clients.trainer import Trainer
from fedlora.exchange import ClientReport, Instruction
from fedlora.generated import Answer
from fedlora.privacy import PrivateRandom
from fedlora.privacy.step import PrivateStep
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import check_adapter

_PROBED = 8  # rows of a client that a probe takes, at most
_PROBED_ON_CPU = 4  # clients of a pack that it takes there


def _peak_memory(cards: Sequence[torch.device]) -> int:
    """Return the most memory that this process has had: on its GPUs, or on a machine without one in all."""
    if cards[0].type == "cuda":
        return sum(torch.cuda.max_memory_allocated(card) for card in cards)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@final
class Evaluator:
    """Evaluates and exports global tensors; needs no client, so a server may have one of its own.

    Args:
        model: The model, with the rows that it is evaluated on.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def evaluate(
        self, tensors: Mapping[str, NDArray[np.floating]], split: str, rows: Sequence[int]
    ) -> dict[str, NDArray[np.float64]]:
        """Return facts of each of these rows under the global model; ``tensors`` are what the server holds."""
        return self.model.parallel.evaluate({**self.model.initial, **tensors}, self.model.examples[split], rows)

    def answers(self, tensors: Mapping[str, NDArray[np.floating]], split: str, rows: Sequence[int]) -> list[Answer]:
        """Return what the global model writes for each of these rows."""
        return write_answers(self.model, {**self.model.initial, **tensors}, split, rows)

    def export(self, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, bytes]:
        """Return the files of a PEFT adapter for the server's tensors, tried out in PEFT."""
        return _exported(self.model, {**self.model.initial, **tensors})


def _exported(model: LoadedModel, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, bytes]:
    files = adapter_files(model.engine, tensors, model.config)
    check_adapter(model.engine, tensors, files)
    return files


@final
class PersonalEvaluator:
    """Evaluates and exports each client's own model: the server's tensors with the client's personal ones in place.

    Args:
        trainer: Trains the same clients.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.model: LoadedModel = trainer.model
        self._trainer = trainer
        self._start: StartTensors = trainer.start

    def evaluate(self, instruction: Instruction, split: str = "") -> list[ClientReport]:
        """Return, for each client, the sums of its own model's facts over the rows that it held out.

        Args:
            instruction: The clients, and what they start the round with.
            split: Evaluate each client on all rows of this split instead.
        """
        common = self._start.common(instruction)
        own = [self._start.personal_of(instruction, client, common) for client in instruction.clients]
        if split:
            rows = [np.arange(len(self.model.examples[split]))] * len(own)
        else:
            rows = [self._trainer.data.holdout[client] for client in instruction.clients]
        group = np.repeat(np.arange(len(rows)), [len(held) for held in rows])
        facts = self.model.parallel.evaluate(
            {name: value for name, value in common.items() if name not in own[0]},
            self.model.examples[split or "train"],
            np.concatenate(rows).tolist(),
            own=own,
            group=group,
        )
        return [
            ClientReport(
                client,
                examples=len(held),
                metrics=self.model.engine.task.sums({name: values[group == g] for name, values in facts.items()}),
            )
            for g, (client, held) in enumerate(zip(instruction.clients, rows, strict=True))
        ]

    def answers(self, instruction: Instruction, counts: Sequence[int]) -> list[Answer]:
        """Return what clients' own models write for the first rows that each holds out, so many of each client."""
        common = self._start.common(instruction)
        own = [self._start.personal_of(instruction, client, common) for client in instruction.clients]
        held = [self._trainer.data.holdout[client] for client in instruction.clients]
        rows = [rows[:count] for rows, count in zip(held, counts, strict=True)]
        return write_answers(
            self.model,
            {name: value for name, value in common.items() if name not in own[0]},
            "train",
            np.concatenate(rows).tolist(),
            own=own,
            group=np.repeat(np.arange(len(rows)), [len(chosen) for chosen in rows]),
        )

    def export(self, instruction: Instruction) -> list[dict[str, bytes]]:
        """Return, for each client, the files of a PEFT adapter of its own, tried out in PEFT."""
        common = self._start.common(instruction)
        own = [self._start.personal_of(instruction, client, common) for client in instruction.clients]
        return [_exported(self.model, {**common, **one}) for one in own]

    def probe(self, instruction: Instruction) -> Speed:
        """Train and evaluate a few rows of each client, and time it; nothing is kept of it.

        What only the first pass pays for is paid for before, by the same clients: on a GPU shapes count, and how many
        train together. On a CPU neither does, so a few clients are enough there, and one of them to begin with.
        """
        model, trainer = self.model, self._trainer
        first = instruction
        if model.engine.device.type == "cpu":
            instruction = instruction.part(instruction.clients[:_PROBED_ON_CPU])
            first = instruction.part(instruction.clients[:1])
        size = min(_PROBED, model.config.train.batch_size)
        batches = [[trainer.data.training_rows(client)[:size]] for client in instruction.clients]
        private: PrivateStep | None = None
        if trainer.accounts is not None:  # what steps under DP take, with a result that nobody sees
            private = PrivateStep(trainer.accounts.mechanism, [PrivateRandom() for _ in batches])
        examples = model.examples["train"]
        rows = [int(row) for (batch,) in batches for row in batch]
        tokens = max(1, int(examples.cost[rows].sum()))
        for asked in (first, instruction):
            some = batches[: len(asked.clients)]
            noise = replace(private, randoms=private.randoms[: len(some)]) if private is not None else None
            started = time.perf_counter()
            trainer.run(asked, some, noise)
            trained = time.perf_counter()
            some_rows = rows[: sum(len(batch) for (batch,) in some)]
            model.parallel.evaluate(self._start.common(asked), examples, some_rows)
            evaluated = time.perf_counter()
        return Speed(
            train_s=(trained - started) / tokens,
            evaluate_s=(evaluated - trained) / tokens,
            row_tokens=float(examples.cost.mean()),
            measured_tokens=int(model.examples[model.measured].cost.sum()),
            memory_bytes=_peak_memory(model.engine.cards),
        )
