"""A site: where clients' rows are, what a server may ask of it, and what the site demands of the server.

Plain records and a protocol. Whoever talks to a site needs neither torch nor Ray for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clients.limits import SiteLimits
from fedlora import __version__
from fedlora.config import Config, Scalar
from fedlora.data import FederatedData
from fedlora.exchange import ClientReport, Instruction, Update
from fedlora.joining import JoinReport
from fedlora.methods import TensorSpec, initial_tensors
from fedlora.reduce import Reduction
from fedlora.seeded import Seeded


@dataclass(frozen=True)
class Job:
    """What a site's trainers work on until they are given another.

    Attributes:
        flat: The run's configuration, dotted: the server's part of it.
        data: The rows of the site's clients (in a simulation of all), and what is evaluated on.
        limits: What the site demands.
        store: Folder of what clients keep between rounds; empty: that of the limits, beside the ledgers.
        folder_id: What the limits' folder is known by (:mod:`clients.own_disk`); empty: it is not asked for.
        agreed: What trainers had in common when they were compared, :attr:`Description.agreed`; empty: they were not.
    """

    flat: Mapping[str, Scalar]
    data: FederatedData
    limits: SiteLimits
    store: str = ""
    folder_id: str = ""
    agreed: str = ""


@dataclass(frozen=True)
class Description:
    """What a trainer reports of itself, for the server to compare with its own and with others'.

    Attributes:
        specs: The method's tensors.
        saved: Those of them that start as they were saved, and not from the seed: the checkpoint's head, an adapter's.
        family: The base model's type.
        num_parameters: Parameters of the base model.
        num_layers: Its adapted layers.
        digest: Of the base model's weights and the tokenizer.
        initial_digest: Of the tensors that a run starts with, to compare with the server's.
        constants_digest: Of the method's constants, such as indices.
        fingerprint: Of the code it runs, with its folders.
        device: Where it computes.
        threads: CPU threads that it uses.
        host: Its machine.
        pid: Its process.
        base_loads: How often this process loaded the base model.
        remarks: What may surprise of the model: where the head starts, which rows may go through it together.
        base_bytes: What the base model's weights take; 0: it is not said.
    """

    specs: dict[str, TensorSpec]
    saved: dict[str, NDArray[np.floating]]
    family: str
    num_parameters: int
    num_layers: int
    digest: str
    initial_digest: str
    constants_digest: str
    fingerprint: tuple[str, str]
    device: str
    threads: int
    host: str
    pid: int
    base_loads: int
    remarks: tuple[str, ...] = ()
    base_bytes: int = 0

    @property
    def agreed(self) -> str:
        """What one that is started later must have in common with it: code, base model, seeded tensors, indices."""
        return "/".join((self.fingerprint[0], self.digest, self.initial_digest, self.constants_digest))

    @property
    def resumed(self) -> dict[str, str]:
        """What a run must find again to go on from its checkpoint: base model and tokenizer, start tensors."""
        return {"base": self.digest, "start": self.initial_digest}

    def initial(self, config: Config) -> dict[str, NDArray[np.floating]]:
        """Return the tensors that a run starts with, without a group axis: drawn here, but for saved ones."""
        return initial_tensors(self.specs, Seeded(config.seed), config.engine.tensor_dtype) | self.saved

    def join_report(self, site: str, rows: int = 0, trainers: int = 1) -> JoinReport:
        """Return what is said of it when a site joins, and what the coordinator holds against that."""
        return JoinReport(
            site,
            version=__version__,
            fingerprint=self.fingerprint[0],
            rows=rows,
            digest=self.digest,
            initial_digest=self.initial_digest,
            constants_digest=self.constants_digest,
            device=self.device,
            threads=self.threads,
            trainers=trainers,
        )


@dataclass(frozen=True)
class Speed:
    """What a short probe measured.

    Attributes:
        train_s: Seconds to train on one token.
        evaluate_s: Seconds to evaluate one token.
        row_tokens: Mean tokens of a training row.
        measured_tokens: Tokens that a round is measured on.
        memory_bytes: The most memory that the process has had by then, the base model included.
    """

    train_s: float
    evaluate_s: float
    row_tokens: float
    measured_tokens: int
    memory_bytes: int


class Site(Protocol):
    """What a server's instructions are carried out by: trainers on Ray, or a deployed site's daemon.

    All that comes back may leave the site. A client that could not take part has a report that says so, in words that
    hold nothing of a row.
    """

    def train(self, instruction: Instruction) -> Iterable[Update]:
        """Train the instruction's clients; yield each one's update as it is there, in order of the clients."""
        ...

    def reduce(self, instruction: Instruction) -> tuple[list[ClientReport], Reduction]:
        """Train the instruction's clients; return their reports, and the updates as the instruction has them reduced.

        What :func:`fedlora.reduce.fold` makes of :meth:`train`, as near to where updates are made as may be.
        """
        ...

    def evaluate(self, instruction: Instruction) -> Iterable[ClientReport]:
        """Evaluate each client's own model on the rows that it holds out; yield the sums over them."""
        ...


class LoadedSite(Site, Protocol):
    """A site whose trainers have a job."""

    def describe(self) -> Description:
        """Return the description of one of the site's trainers.

        Raises:
            SiteError: There is none, in words that may leave.
        """
        ...
