"""A deployed site on the tiny model, in a folder: its file, its rows, and what a coordinator asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clients.deployed import DeployedSite
from clients.limits import SiteLimits
from clients.ray_site import RaySite
from clients.site import Job, LoadedSite
from clients.site_file import SiteFile
from clients.trainer import TrainPack
from clients.worker import Worker
from fedlora.config import Config
from fedlora.data import FederatedData, load_corpus
from fedlora.engine import train_pack
from fedlora.exchange import Instruction, Update
from fedlora.headers import HeaderReader
from fedlora.joining import JoinRequest
from fedlora.methods import TensorSpec
from simulations.privacy import settle_privacy
from simulations.setup import resolve
from strategies.build import build_strategy
from tests.support.tiny import save_texts, save_tiny_model
from tests.support.trainers import InProcess

ROWS = 24
LIMITS = """
max-epsilon = 40.0
max-delta = 1e-2
min-noise-multiplier = 0.5
max-steps = 3
methods = ["lora"]
strategies = ["ffa-lora", "fedavg"]
heads = ["shared", "frozen"]
"""
RAW = """
raw-updates = true
max-steps = 3
"""


def site_file(folder: Path, limits: str = LIMITS, *, rows: int = ROWS, data: str = "", more: str = "") -> SiteFile:
    """Write a site's file, its model and its rows, and return the file as it is read."""
    save_tiny_model(folder / "model")
    save_texts(folder / "data.csv", rows, seed=3)
    text = f"""
name = "north"
[data]
path = "data.csv"
{data}
[public]
rows = {ROWS}
classes = "bad,good"
[models]
tiny = "model"
[limits]
{limits}
[trainers]
count = 1
threads = 1
{more}
"""
    (folder / "site.toml").write_text(text, encoding="utf-8")
    return SiteFile.read(folder / "site.toml")


def server_config(**changes: Any) -> Config:
    """The configuration of a coordinator with the sites north and south, under DP unless said otherwise."""
    raw = changes.get("privacy.mode") == "none"
    privacy = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-3}
    config = resolve(
        {
            "model.name": "tiny",
            "data.name": "sites",
            "data.classes": "bad,good",
            "federation.sites": "north,south",
            "federation.roster": "roster.json",
            "engine.dtype": "float64",
            "train.batch-size": 4,
            "train.local-steps": 3,
            "train.learning-rate": 0.01,
            "method.rank": 2,
            "run.name": "first",
            **({} if raw else {**privacy, "privacy.client-size": ROWS}),
            **changes,
        }
    )
    return settle_privacy(config, [config.privacy.client_size] * 2)


def request_of(config: Config, client: int = 0, **flat: Any) -> JoinRequest:
    """What arrives of what the coordinator asks of the site north, with keys changed behind its own checks."""
    sent = JoinRequest("north", client, 2, {**config.to_flat(), **flat})
    return JoinRequest.read(HeaderReader(sent.header(), "join"))


def instruction_of(
    config: Config,
    specs: Mapping[str, TensorSpec],
    initial: Mapping[str, Any],
    request: JoinRequest,
    number: int = 1,
    **changes: Any,
) -> Instruction:
    """What the coordinator's strategy sends to the site in a round."""
    strategy = build_strategy(config, specs)
    fields: dict[str, Any] = {
        "round": number,
        "clients": (request.client,),
        "roles": dict(strategy.all_roles(number)),
        "tensors": dict(strategy.initial(initial).tensors),
        "local": strategy.local(number),
        "ledger_heads": ("",) if config.privacy.mode == "dp" else (),
        "job": request.job,
        **changes,
    }
    return Instruction(**fields)


def coordinators_worker(folder: Path, config: Config) -> Worker:
    """The coordinator's own model, of which it has no rows; its folder has another name than the site's."""
    config = replace(config, model=replace(config.model, name=save_tiny_model(folder / "coordinator")))
    nobody = (np.zeros(0, dtype=np.int64),) * 2
    data = FederatedData(load_corpus(config), nobody, nobody, ("north", "south"))
    return Worker(lambda: Job(config.to_flat(), data, SiteLimits(str(folder / "unused"))), 1)


@dataclass
class Here:
    """A workplace in this process: a real worker, which is given one job after the other.

    Attributes:
        engine: What trains a pack.
        jobs: The jobs that it was given.
    """

    engine: TrainPack = train_pack
    jobs: list[Job] = field(default_factory=list)
    worker: Worker = field(init=False)

    def __post_init__(self) -> None:
        self.worker = Worker(lambda: self.jobs[-1], 1, self.engine)

    def assign(self, job: Job) -> tuple[LoadedSite, int]:
        self.jobs.append(job)
        self.worker.renew()
        return RaySite(InProcess([self.worker])), 1


@dataclass
class Deployment:
    """A deployed site of this process, and what it is asked.

    Attributes:
        file: The site's file.
        config: The coordinator's configuration.
        client: The site's number.
        place: Where it trains.
    """

    file: SiteFile
    config: Config = field(default_factory=server_config)
    client: int = 0
    place: Here = field(default_factory=Here)
    site: DeployedSite = field(init=False)

    def __post_init__(self) -> None:
        self.site = DeployedSite(self.file, self.place)

    @property
    def request(self) -> JoinRequest:
        return request_of(self.config, self.client)

    def joined(self) -> Deployment:
        assert not (reason := self.site.join(self.request).reason), reason
        return self

    def instruction(self, number: int = 1, **changes: Any) -> Instruction:
        model = self.place.worker.loaded.model
        return instruction_of(self.config, model.specs, model.initial, self.request, number, **changes)

    def train(self, number: int = 1, **changes: Any) -> Update:
        """Train for a round, and return the one update."""
        (update,) = self.site.train(self.instruction(number, **changes))
        return update
