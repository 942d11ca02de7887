"""A deployed site's own file, ``site.toml``: its data, its limits, and what it says of itself."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, final

from clients.limits import SiteLimits
from fedlora.config import Scalar
from fedlora.config.data_keys import read_names
from fedlora.config.sections import SITE_NAME
from fedlora.config.tables import read_table, read_tables


@final
@dataclass(frozen=True)
class DataTable:
    """Where a site's rows are; the keys mean what ``data.*`` means in a run's configuration."""

    path: str
    text_column: str = "text"
    label_column: str = "label"
    answer_column: str = "answer"
    header: bool = True
    holdout: float = 0.0
    """Share of the rows that the site never trains on, and measures the model with."""
    task: str = ""
    """What the rows are for, as a job's ``task`` must say; empty: any that a job names."""
    label_separator: str = ""
    """What stands between the labels of a row in one column of text, in place of a job's ``multi-label.separator``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout = {self.holdout!r}: must be at least 0 and below 1.")

    @property
    def flat(self) -> dict[str, Scalar]:
        """The rows as a run's configuration names them: what a job says of these keys is never used."""
        return {
            "data.name": "file",
            "data.path": self.path,
            "data.text-column": self.text_column,
            "data.label-column": self.label_column,
            "data.answer-column": self.answer_column,
            "data.header": self.header,
            "data.partition": "iid",
            "data.holdout": self.holdout,
            **({"multi-label.separator": self.label_separator} if self.label_separator else {}),
        }


@final
@dataclass(frozen=True)
class PublicTable:
    """What a site tells the coordinator of itself."""

    rows: int
    """Nominal number of rows: what the site may count for in an average, at most. Not the exact number."""
    classes: str = ""
    """Names of the classes, with commas between, in the order of their numbers; as in ``data.classes``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.rows < 1:
            raise ValueError(f"rows = {self.rows!r}: must be at least 1.")
        try:
            read_names(self.classes)
        except ValueError as error:
            raise ValueError(f"classes = {self.classes!r}: a double quote is not closed ({error}).") from error


@final
@dataclass(frozen=True)
class LimitsTable:
    """The limits as the file has them: as in :class:`clients.limits.SiteLimits`."""

    raw_updates: bool = False
    """Whether updates may leave without differential privacy. They can then be turned back into rows."""
    max_epsilon: float = 0.0
    max_delta: float = 0.0
    min_noise_multiplier: float = 0.0
    max_steps: int = 0
    max_rounds_per_day: int = 0
    max_bytes: int = 0
    methods: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    model_digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.raw_updates and not self.max_epsilon:
            raise ValueError(
                "max-epsilon: must be given, the budget of the site's rows over all jobs; or raw-updates = true, and "
                "updates leave without differential privacy."
            )


@final
@dataclass(frozen=True)
class TrainersTable:
    """Where a site trains."""

    count: int = 0
    """Trainers; 0: one for each GPU, or one for every four cores."""
    gpus: int = 1
    """GPUs of each trainer, over which it spreads a base model that is too large for one."""
    threads: int = 0
    """CPU threads of all trainers together; 0: all cores."""
    ray_address: str = ""
    """A Ray cluster of the site's own; empty: one on this machine, for the time that the daemon runs."""

    def __post_init__(self) -> None:
        """Check the fields."""
        for key, value, least in (("count", self.count, 0), ("gpus", self.gpus, 1), ("threads", self.threads, 0)):
            if value < least:
                raise ValueError(f"{key} = {value!r}: must be at least {least}.")


@final
@dataclass(frozen=True)
class AccessTable:
    """Who may talk to the daemon."""

    users: tuple[str, ...] = ()
    """Operating-system users, by name or number, beside the daemon's own."""
    max_message_bytes: int = 1 << 32
    """The most bytes of tensors in one message from the server."""

    @property
    def ids(self) -> frozenset[int]:
        """The users' numbers, the daemon's own among them.

        Raises:
            ValueError: There is no such user.
        """
        return frozenset({os.getuid(), *map(_user_id, self.users)})


@final
@dataclass(frozen=True)
class SuperNodeTable:
    """How the site's SuperNode reaches the coordinator."""

    superlink: str
    """Host and port of the coordinator."""
    ca: str = "tls/ca.crt"
    key: str = "keys/supernode"
    port: int = 9300
    """Of Flower's own interface between SuperNode and ClientApp, on loopback."""


@final
@dataclass(frozen=True)
class SiteFile:
    """A site's own file.

    Attributes:
        path: The file.
        name: The site's name in the federation.
        state: Folder of its ledger, its personal tensors and its log of what left.
        socket: The daemon's Unix socket.
        plugins: The plug-ins that a job may use, and must, as in ``run.plugins``.
        data: Where its rows are.
        public: What it tells the coordinator.
        models: The folder or name to load for each name that a job may ask for (``model.name``).
        limits: What it demands of every job.
        trainers: Where it trains.
        access: Who may talk to the daemon.
        supernode: How it reaches the coordinator.
    """

    path: Path
    name: str
    state: Path
    socket: Path
    plugins: str
    data: DataTable
    public: PublicTable
    models: Mapping[str, str]
    limits: SiteLimits
    trainers: TrainersTable = field(default_factory=TrainersTable)
    access: AccessTable = field(default_factory=AccessTable)
    supernode: SuperNodeTable | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file; relative paths are beside it.

        Raises:
            ValueError: It cannot be read, or a key is unknown, missing or wrong.
        """
        path = path.expanduser().resolve()
        values = read_tables(path, "this site's file")
        kinds: dict[str, Any] = {
            "data": DataTable,
            "public": PublicTable,
            "limits": LimitsTable,
            "trainers": TrainersTable,
            "access": AccessTable,
            "supernode": SuperNodeTable,
        }
        tables = {
            name: read_table(kind, values.pop(name, {}), f"{path} [{name}]")
            for name, kind in kinds.items()
            if name in values or name in ("data", "public", "limits")
        }
        models = read_table(_Models, {"models": values.pop("models", {})}, f"{path} [models]").models
        top = read_table(_Top, values, str(path))
        if not models:
            raise ValueError(f"{path} [models]: must name a model that this site loads, such as minilm = 'minilm'.")
        folder = path.parent
        data: DataTable = tables["data"]
        tables["data"] = DataTable(**{**vars(data), "path": str(folder / Path(data.path).expanduser())})
        limits: LimitsTable = tables.pop("limits")
        own = {name: value for name, value in vars(limits).items() if name != "raw_updates"}
        state = folder / Path(top.state).expanduser()
        try:
            demanded = SiteLimits(str(state), top.name, dp_required=not limits.raw_updates, models=tuple(models), **own)
        except ValueError as error:
            raise ValueError(f"{path} [limits]: {error}") from error
        return cls(
            path=path,
            name=top.name,
            state=state,
            socket=folder / Path(top.socket).expanduser(),
            plugins=top.plugins,
            models={name: _local(value, folder) for name, value in models.items()},
            limits=demanded,
            **tables,
        )

    def beside(self, name: str) -> Path:
        """Return a path that the file gives, relative to the file."""
        return self.path.parent / Path(name).expanduser()


@final
@dataclass(frozen=True)
class _Top:
    name: str
    state: str = "state"
    socket: str = "run/site.sock"
    plugins: str = ""

    def __post_init__(self) -> None:
        if not SITE_NAME.fullmatch(self.name):
            raise ValueError(f"name = {self.name!r}: must be small letters, digits and hyphens.")


@final
@dataclass(frozen=True)
class _Models:
    models: dict[str, str]


def _local(name: str, folder: Path) -> str:
    """Return a model's folder beside the file, or the name as it is where there is no such folder."""
    place = folder / Path(name).expanduser()
    return str(place) if place.is_dir() else name


def _user_id(name: str) -> int:
    if name.isdecimal():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"[access] users: there is no user {name!r} on this machine.") from None
