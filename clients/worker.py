"""A trainer's process: a share of the machine, a resident base model, a job; it filters what errors say to the server.

What the server asks for (:meth:`Worker.describe`, :meth:`Worker.train`, :meth:`Worker.reduce`,
:meth:`Worker.report`) comes back without the text of an error that may quote a row. Everything else is for whoever
runs the site, and raises errors as they are.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from clients.accounts import Accounts
from clients.errors import WITHHELD, MemoryShortError, RefusedError, SiteError, TrainerDiffersError
from clients.evaluator import Evaluator, PersonalEvaluator
from clients.memory import memory_was_short
from clients.own_disk import check_folder
from clients.personal import PersonalStore
from clients.resident import LoadedModel, Resident
from clients.shared_rows import SharedRows
from clients.site import Description, Job, Speed
from clients.start import StartTensors
from clients.trainer import Trainer, TrainPack
from fedlora import plugins
from fedlora.engine.starts import computed_start
from fedlora.exchange import ClientReport, Instruction, Update
from fedlora.generated import Answer
from fedlora.messages import first_line
from fedlora.methods import tensors_digest
from fedlora.quantisation import base_bytes
from fedlora.reduce import Reduction, fold
from fedlora.shapes import cut

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedJob:
    """A job, ready to work on.

    Attributes:
        job: The job.
        model: Its model.
        store: What its clients keep between rounds.
        accounts: Their privacy accounts; None without DP.
        trainer: Trains its clients.
        evaluator: Evaluates and exports global tensors.
        personal: Evaluates and exports clients' own models.
    """

    job: Job
    model: LoadedModel
    store: PersonalStore
    accounts: Accounts | None
    trainer: Trainer
    evaluator: Evaluator
    personal: PersonalEvaluator


@final
class Worker:
    """Does a job's work, pack by pack.

    Args:
        job: Returns the job; called again after :meth:`renew`, and by a process that was restarted.
        threads: CPU threads to use.
        train: Trains a pack; None: the model does, on all threads.
        sync: Puts an open file of a ledger on the disk.
        shared: What the trainers of this machine have tokenized; None: nothing is shared.
        cards: GPUs that the base model is spread over; 1: it is on one, or on a machine without any on the CPU.
        resident: What loads the model, where it is another worker's, too; None: one of its own.
    """

    def __init__(
        self,
        job: Callable[[], Job],
        threads: int,
        train: TrainPack | None = None,
        sync: Callable[[int], None] = os.fsync,
        shared: SharedRows | None = None,
        cards: int = 1,
        resident: Resident | None = None,
    ) -> None:
        self._fetch = job
        self.threads = threads
        self._train = train
        self._sync = sync
        self._resident, self._shared = resident or Resident(threads, shared, cards), shared
        self._job: Job | None = None
        self._loaded: LoadedJob | None = None

    # -- for whoever runs the site ------------------------------------------------------------------------

    def renew(self) -> None:
        """Fetch the job anew before the next piece of work."""
        self._job = self._loaded = None

    def check_folder(self) -> None:
        """Check that the job's ledgers are on a disk that this process sees, before it loads anything.

        Raises:
            RefusedError: They are not.
        """
        job = self._fetch()
        check_folder(Path(job.limits.folder), job.folder_id)

    def leave(self) -> None:
        """Remove what this process has kept for others, before it is ended."""
        if self._shared is not None:
            self._shared.remove()

    def load(self) -> None:
        """Load the job now, if it is not loaded; what goes wrong is raised as it is."""
        _ = self.loaded

    @property
    def loaded(self) -> LoadedJob:
        """The job with its model.

        Loaded at the first call and not in the constructor, whose errors Ray would wrap in its own. What the job
        before has in common with this one stays: the base model, and tables that are already tokenized.
        """
        if self._loaded is None:
            job = self._job = self._fetch()
            config = plugins.read_config(job.flat, foreign=True)
            job.limits.check(config)
            check_folder(Path(job.limits.folder), job.folder_id)
            model = self._resident.load(config, job.data.corpus)
            job.limits.check_model(model.engine.base.digest)
            store = PersonalStore(Path(job.store or job.limits.folder))
            accounts = Accounts(job.limits, config, self._sync) if config.privacy.mode == "dp" else None
            trainer = Trainer(StartTensors(model, store), job.data, accounts, self._train)
            if job.agreed and job.agreed != self._description(model).agreed:
                raise TrainerDiffersError(
                    f"a trainer that was started again on {socket.gethostname()} runs other code, or has another base "
                    "model or other seeded tensors, than those with which the run began"
                )
            self._loaded = LoadedJob(job, model, store, accounts, trainer, Evaluator(model), PersonalEvaluator(trainer))
        return self._loaded

    def evaluate(
        self, tensors: Mapping[str, NDArray[np.floating]], split: str, rows: Sequence[int]
    ) -> dict[str, NDArray[np.float64]]:
        """Return facts of rows under the global model: :meth:`clients.evaluator.Evaluator.evaluate`."""
        return self.loaded.evaluator.evaluate(tensors, split, rows)

    def answers(self, tensors: Mapping[str, NDArray[np.floating]], split: str, rows: Sequence[int]) -> list[Answer]:
        """Return what the global model writes: :meth:`clients.evaluator.Evaluator.answers`."""
        return self.loaded.evaluator.answers(tensors, split, rows)

    def answers_personal(self, instruction: Instruction, counts: Sequence[int]) -> list[Answer]:
        """Return what clients' own models write: :meth:`clients.evaluator.PersonalEvaluator.answers`."""
        return self.loaded.personal.answers(instruction, counts)

    def export(self, tensors: Mapping[str, NDArray[np.floating]]) -> dict[str, bytes]:
        """Return a PEFT adapter's files: :meth:`clients.evaluator.Evaluator.export`."""
        return self.loaded.evaluator.export(tensors)

    def evaluate_personal(self, instruction: Instruction, split: str = "") -> list[ClientReport]:
        """Return sums over clients' own rows: :meth:`clients.evaluator.PersonalEvaluator.evaluate`."""
        return self.loaded.personal.evaluate(instruction, split)

    def export_personal(self, instruction: Instruction) -> list[dict[str, bytes]]:
        """Return PEFT adapters of clients: :meth:`clients.evaluator.PersonalEvaluator.export`."""
        return self.loaded.personal.export(instruction)

    def start(self) -> dict[str, NDArray[np.floating]]:
        """Return the tensors that a run starts with in place of the seed's, those that ``method.init`` computes.

        Raises:
            ConfigError: The public rows, or the weights, do not give them.
        """
        model = self.loaded.model
        return computed_start(model.engine, model.config, model.initial, model.examples.get("public"))

    def row_tokens(self) -> list[float]:
        """Return the mean tokens of each client's training rows; 0 where it has none."""
        cost, data = self.loaded.model.examples["train"].cost, self.loaded.job.data
        rows = map(data.training_rows, range(len(data.clients)))
        return [float(cost[own].mean()) if len(own) else 0.0 for own in rows]

    def probe(self, instruction: Instruction) -> Speed:
        """Measure how fast this process is: :meth:`clients.evaluator.PersonalEvaluator.probe`."""
        return self.loaded.personal.probe(instruction)

    # -- for the server -----------------------------------------------------------------------------------

    def describe(self) -> Description:
        """Return what the server may know of this process.

        Raises:
            SiteError: The job cannot be loaded, in words that may leave.
        """
        try:
            return self._description(self.loaded.model)
        except Exception as error:
            raise SiteError(self._reason(error)) from None

    def train(self, instruction: Instruction) -> list[Update]:
        """Train a pack for a round; one update a client, in order, also where it came to nothing.

        Raises:
            MemoryShortError: It takes more memory than there is; a smaller pack may not.
            TrainerDiffersError: It is for another trainer to do.
        """
        try:
            self._check(instruction)
            return self.loaded.trainer.train(instruction)
        except (MemoryShortError, TrainerDiffersError):
            raise
        except Exception as error:
            reason = self._reason(error)
            return [Update(ClientReport.failed(client, reason)) for client in instruction.clients]

    def reduce(self, instruction: Instruction) -> tuple[list[ClientReport], Reduction]:
        """Train a pack for a round; return its reports and its updates, reduced: one of them leaves for all.

        Raises:
            MemoryShortError: As :meth:`train` does; nothing is reduced then.
            TrainerDiffersError: The same.
        """
        updates = self.train(instruction)
        try:
            return fold(instruction, updates)
        except Exception as error:
            if not memory_was_short(error):
                raise
        raise MemoryShortError(f"there is too little memory to add up the updates of {len(updates)} client(s)")

    def report(self, instruction: Instruction) -> list[ClientReport]:
        """Return each client's evaluation of its own model; one report a client, in order.

        Under DP none of them evaluates itself: sums over their rows are not covered by the guarantee.
        """
        try:
            self._check(instruction)
            if self.loaded.accounts is not None:
                raise RefusedError("a client under DP does not report how its model does on its rows")
            return self.evaluate_personal(instruction)
        except TrainerDiffersError:
            raise
        except Exception as error:
            reason = self._reason(error)
            return [ClientReport.failed(client, reason) for client in instruction.clients]

    def _check(self, instruction: Instruction) -> None:
        """Refuse an instruction that the job's method or the site's limits do not allow."""
        model = self.loaded.model
        self.loaded.job.limits.check_instruction(instruction, model.specs, model.config)
        for name in (name for name, spec in model.specs.items() if spec.computed):
            sent, seeded = instruction.tensors.get(name), model.initial[name]
            if sent is None or np.array_equal(sent, cut(seeded, sent.shape)):
                raise RefusedError(f"{name} is not sent as method.init = {model.config.method.init!r} computes it")

    def _description(self, model: LoadedModel) -> Description:
        structure = model.engine.base.structure
        return Description(
            specs=model.specs,
            saved=model.saved,
            family=structure.family,
            num_parameters=structure.num_parameters,
            num_layers=len(structure.adapted),
            digest=model.engine.base.digest,
            initial_digest=tensors_digest(model.initial),
            constants_digest=tensors_digest(model.engine.method.constants()),
            fingerprint=plugins.fingerprint(model.config.run.plugins),
            device=", ".join(map(str, model.engine.cards)),
            threads=self.threads,
            host=socket.gethostname(),
            pid=os.getpid(),
            base_loads=self._resident.loads,
            base_bytes=base_bytes(
                structure.num_parameters,
                structure.num_quantisable,
                model.config.model.quantization,
                model.config.engine.dtype,
            ),
            remarks=model.remarks,
        )

    # -- the wall -----------------------------------------------------------------------------------------

    def _reason(self, error: Exception) -> str:
        """Return what the server may read of an error.

        An error may quote a row, and its kind alone may depend on one. What decides is this site's own mode, never what
        the server sent: only a site that has read its job, and found no privacy in it, gives reasons away.
        """
        if isinstance(error, RefusedError):
            return str(error)
        _logger.error("failed while answering the server", exc_info=error)
        return WITHHELD if self._withholds() else f"{type(error).__name__}: {first_line(error)}"

    def _withholds(self) -> bool:
        """Whether the text of an error must stay here: always, unless it is known that there is no privacy."""
        job = self._job
        try:
            return (
                job is None
                or job.limits.dp_required
                or plugins.read_config(job.flat, foreign=True).privacy.mode != "none"
            )
        except Exception:
            return True
