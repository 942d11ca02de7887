"""A site: where clients' rows are, what a server may ask of it, and what the site demands of the server.

Plain records and a protocol. Whoever talks to a site needs neither torch nor Ray for it.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self, final

from fedlora.config import Config, Scalar
from fedlora.data import FederatedData
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.messages import closest
from fedlora.methods import TensorSpec

_logger = logging.getLogger(__name__)

WITHHELD = "it failed at the site; its own log says why"
"""All that a site under DP lets out of an error."""


class RefusedError(RuntimeError):
    """A site or client refuses; the message is written for the server, and holds nothing of a row.

    Args:
        message: Why.
        outcome: How the client's part in the round has ended by it.
    """

    def __init__(self, message: str, outcome: Outcome = Outcome.FAILED) -> None:
        super().__init__(message)
        self.outcome = outcome


class SiteError(RuntimeError):
    """What a site lets out of an error; the message is for the server."""


@final
@dataclass(frozen=True)
class SiteLimits:
    """What a site demands of every job, whatever a server sends; the defaults demand nothing.

    ``max_grad_norm`` has no limit here: the noise grows with it, so no guarantee depends on it.

    Attributes:
        folder: Where the site's clients keep their ledgers and personal tensors. Never a server's choice: in another
            folder every budget would start anew.
        dp_required: Whether a job must train with differential privacy, and with noise that nobody knows.
        max_epsilon: The most that a client of the site spends over all jobs in its ledger; 0: no limit of its own.
        max_delta: The largest delta that an epsilon may be stated at; 0: any.
        min_noise_multiplier: The least noise of a step in units of ``privacy.max-grad-norm``; 0: any.
        models: Names of the base models that the site loads (``model.name``); empty: any.
    """

    folder: str
    dp_required: bool = False
    max_epsilon: float = 0.0
    max_delta: float = 0.0
    min_noise_multiplier: float = 0.0
    models: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.folder:
            raise ValueError("folder: must name where the site's clients keep ledgers and personal tensors.")
        for name in ("max_epsilon", "max_delta", "min_noise_multiplier"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{_key(name)} = {value!r}: must be a finite number of at least 0.")
            if value and not self.dp_required:
                raise ValueError(
                    f"{_key(name)} = {value!r}: a job without differential privacy would pass it; set dp-required = "
                    "true."
                )
        if self.max_epsilon and not 0 < self.max_delta < 1:
            raise ValueError(
                f"max-epsilon = {self.max_epsilon!r}: says nothing without a delta; set max-delta, well below 1 / rows."
            )

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read the limits from a site's own file; a relative ``folder`` is beside the file.

        Raises:
            ValueError: It cannot be read, or a key is unknown or has a wrong value. Nothing is left out silently: a
                limit that is misspelt would be none.
        """
        try:
            values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"the limits of this site cannot be read from {path}: {error}") from error
        known = {_key(item.name): type(getattr(cls(folder="."), item.name)) for item in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"{path}: unknown key {key!r}.{closest(key, known)} Known: {', '.join(known)}.")
            if known[key] is float and type(value) is int:
                values[key] = float(value)
            elif known[key] is tuple and type(value) is list and all(type(one) is str for one in value):
                values[key] = tuple(value)
            elif type(value) is not known[key]:
                raise ValueError(f"{path}: {key} = {value!r}: must be {_KINDS[known[key]]}.")
        if "folder" not in values:
            raise ValueError(f"{path}: folder: must name where the site's clients keep ledgers and personal tensors.")
        values["folder"] = str(path.parent / values["folder"])
        try:
            return cls(**{key.replace("-", "_"): value for key, value in values.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check(self, config: Config) -> None:
        """Refuse a job that does not satisfy the limits, before anything of it is loaded.

        Raises:
            RefusedError: It does not, with the key and the limit; what the site's limit is does not leave.
        """
        privacy = config.privacy
        if self.models and config.model.name not in self.models:
            self._refuse("model.name", config.model.name, "models")
        if privacy.mode != "dp":
            if self.dp_required:
                self._refuse("privacy.mode", privacy.mode, "dp_required")
            return
        if self.dp_required and privacy.seed:
            self._refuse("privacy.seed", privacy.seed, "dp_required")  # who knows it can take the noise off again
        if self.max_epsilon and privacy.epsilon > self.max_epsilon:
            self._refuse("privacy.epsilon", privacy.epsilon, "max_epsilon")
        if self.max_delta and privacy.delta > self.max_delta:
            self._refuse("privacy.delta", privacy.delta, "max_delta")
        if privacy.noise_multiplier < self.min_noise_multiplier:
            self._refuse("privacy.noise-multiplier", privacy.noise_multiplier, "min_noise_multiplier")
        # A server resolves what is automatic before it sends a job; a site cannot keep books of what is not said.
        for key, given in (
            ("privacy.noise-multiplier", privacy.noise_multiplier > 0),
            ("privacy.delta", privacy.delta > 0),
            ("privacy.client-size", privacy.client_size >= config.train.batch_size),
        ):
            if not given:
                raise RefusedError(f"a site under DP needs {key}, and a value that can work")

    def budget(self, epsilon: float) -> float:
        """Return the stricter of a job's budget and the site's own; 0: there is none."""
        return min((one for one in (epsilon, self.max_epsilon) if one), default=0.0)

    def _refuse(self, key: str, value: Scalar, limit: str) -> None:
        _logger.error("refused a job: %s = %r, and %s = %r", key, value, _key(limit), getattr(self, limit))
        raise RefusedError(f"the site's own limits refuse the job: {key}, by {_key(limit)}")


_KINDS: dict[type, str] = {
    bool: "true or false",
    float: "a number",
    str: "a text in quotes",
    tuple: "a list of texts in quotes",
}


def _key(name: str) -> str:
    return name.replace("_", "-")


@dataclass(frozen=True)
class Job:
    """What a site's trainers work on until they are given another.

    Attributes:
        flat: The run's configuration, dotted: the server's part of it.
        data: The rows of the site's clients (in a simulation of all), and what is evaluated on.
        limits: What the site demands.
    """

    flat: Mapping[str, Scalar]
    data: FederatedData
    limits: SiteLimits


@dataclass(frozen=True)
class Description:
    """What a trainer reports of itself, for the server to compare with its own and with others'.

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


class Site(Protocol):
    """What a server's instructions are carried out by: trainers on Ray, or a deployed site's daemon.

    All that comes back may leave the site. A client that could not take part has a report that says so, in words that
    hold nothing of a row.
    """

    def describe(self) -> Description:
        """Return the description of one of the site's trainers.

        Raises:
            SiteError: There is none, in words that may leave.
        """
        ...

    def train(self, instruction: Instruction) -> Iterable[Update]:
        """Train the instruction's clients; yield each one's update as it is there, in order of the clients."""
        ...

    def evaluate(self, instruction: Instruction) -> Iterable[ClientReport]:
        """Evaluate each client's own model on the rows that it holds out; yield the sums over them."""
        ...
