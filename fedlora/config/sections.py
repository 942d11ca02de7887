"""Sections of the configuration that say what is run: the run folder, model, federation, strategy and method.

Frozen dataclasses, the one source of their keys' defaults, types and ranges.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import final

from fedlora.config.fields import at_least, one_of, positive, require, share, unread

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""What a deployed site may be called; the name is a folder's, a file's and a user's."""
_PATTERN = re.compile(r"[\\*+?()\[\]^$|{}]")  # no module's name has any of these
BUNDLED = "minilm"  # the model that comes in a package of its own
SMALL_LLAMA = "small-llama"  # the model that a machine trains for itself, see fedlora.models.small_llama


def is_pattern(target_modules: str) -> bool:
    """Return whether ``method.target-modules`` is a regular expression, which full module names must match whole."""
    return _PATTERN.search(target_modules) is not None


@final
@dataclass(frozen=True)
class RunConfig:
    """Where the run's folder goes."""

    dir: str = "runs"
    """Parent folder of run folders."""
    name: str = ""
    """Name of this run's folder; empty: a time stamp."""
    resume: bool = False
    """Continue the run of this name from its last checkpoint; give its own ``config.toml`` and this."""
    sweep: str = ""
    """A sweep's file: this run goes through its cells, one after the other (``fedlora sweep`` sets it)."""
    share: str = "1/1"
    """Which share of a sweep's groups this process runs (``fedlora sweep --workers`` sets it)."""
    plugins: str = ""
    """Modules, or paths of ``.py`` files, with commas between, that register methods, strategies, tasks, data sets or
    trackers of your own; every process of the run imports them."""
    trackers: str = ""
    """Where the run's numbers go beside its folder, with commas between: ``tensorboard``, ``mlflow``, ``wandb``. Each
    needs its package, such as ``pip install 'fedlora[tensorboard]'``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.dir != "", "run.dir", self.dir, "must name a folder.")
        require(
            re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.share) is not None,
            "run.share",
            self.share,
            "must be a number and how many there are, such as 2/4.",
        )
        require(not self.resume or self.name != "", "run.resume", self.resume, "needs run.name, the run to continue.")
        require(
            "/" not in self.name and "\\" not in self.name and self.name not in (".", ".."),
            "run.name",
            self.name,
            "must be a plain folder name; set run.dir for the path.",
        )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The names in ``trackers``."""
        return tuple(filter(None, (name.strip() for name in self.trackers.split(","))))


@final
@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = BUNDLED
    """``minilm`` (bundled, offline), ``small-llama`` (a small language model that this machine trains once, on
    docstrings), a local folder, or a Hugging Face hub name."""
    revision: str = ""
    """Branch, tag or commit of the hub model; empty: its main branch."""
    trust_remote_code: bool = False
    """Whether a model that brings code of its own may run it, on the server and at every client."""
    quantization: str = "none"
    """``none``; ``nf4`` (4 bits) or ``int8`` (8 bits): the base's linear layers, but for head and output layer, are
    quantised when it is loaded, which saves memory. Needs ``pip install 'fedlora[quantization]'``."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.name.strip() != "", "model.name", self.name, "must name a model.")
        one_of("model.quantization", self.quantization, ("none", "nf4", "int8"))


@final
@dataclass(frozen=True)
class FederationConfig:
    """Who takes part."""

    num_clients: int = 10
    """Number of clients; 0: one per SuperNode, or with ``data.partition = 'natural'`` one for each owner of rows."""
    clients_per_round: int = 0
    """Clients sampled each round; 0: all."""
    failure_threshold: float = 0.5
    """The run stops when more than this share of a round's clients fails or is refused."""
    timeout: float = 3600.0
    """Seconds that a round waits for its clients."""
    sites: str = ""
    """Names of the deployed sites, with commas between: a site's place is its client number. Empty: a simulation."""
    roster: str = ""
    """File with each site's SuperNode, which the coordinator's SuperLink writes; read with ``federation.sites``."""
    min_replies: int = 0
    """Updates with which a round of deployed sites may close; 0: it waits for all that are present."""
    grace: float = 30.0
    """Seconds that a round goes on waiting for the others once it has ``federation.min-replies``."""
    wait: float = 600.0
    """Seconds to wait for ``federation.min-replies`` sites (0: for all) before a round starts."""
    max_change: float = 0.0
    """Largest L2 norm by which one site may change the tensors that it was sent; a larger update is refused. 0: any."""

    def __post_init__(self) -> None:
        """Check the fields."""
        names = self.site_names
        require(
            all(SITE_NAME.fullmatch(name) for name in names) and len(set(names)) == len(names),
            "federation.sites",
            self.sites,
            "must be different names of small letters, digits and hyphens, with commas between.",
        )
        for name in ("roster", "min_replies", "max_change"):
            if not names:
                unread(self, "federation", name, "is read with federation.sites only, the names of deployed sites.")
        require(
            not names or self.roster != "",
            "federation.roster",
            self.roster,
            "must name the file that `fedlora deploy superlink` writes, with federation.sites.",
        )
        at_least("federation.min-replies", self.min_replies, 0)
        require(
            not names or self.min_replies <= len(names),
            "federation.min-replies",
            self.min_replies,
            f"must be at most {len(names)}, the number of federation.sites.",
        )
        require(
            not self.clients_per_round or self.min_replies <= self.clients_per_round,
            "federation.min-replies",
            self.min_replies,
            f"must be at most federation.clients-per-round = {self.clients_per_round}.",
        )
        at_least("federation.grace", self.grace, 0)
        at_least("federation.max-change", self.max_change, 0)
        positive("federation.wait", self.wait)
        at_least("federation.num-clients", self.num_clients, 0)
        at_least("federation.clients-per-round", self.clients_per_round, 0)
        require(
            self.num_clients == 0 or self.clients_per_round <= self.num_clients,
            "federation.clients-per-round",
            self.clients_per_round,
            f"must be at most federation.num-clients = {self.num_clients}.",
        )
        share("federation.failure-threshold", self.failure_threshold)
        positive("federation.timeout", self.timeout)

    @property
    def site_names(self) -> tuple[str, ...]:
        """The names in ``sites``."""
        return tuple(name.strip() for name in self.sites.split(",")) if self.sites else ()


@final
@dataclass(frozen=True)
class StrategyConfig:
    """How the server combines what clients send."""

    name: str = "ffa-lora"
    """Aggregation strategy."""
    weights: str = "examples"
    """``examples``: a client counts by its number of training examples; ``equal``: all alike."""

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("strategy.weights", self.weights, ("examples", "equal"))


@final
@dataclass(frozen=True)
class MethodConfig:
    """The low-rank method and the head."""

    name: str = "auto"
    """Low-rank method; ``auto``: the strategy's own."""
    rank: int = 8
    """Inner dimension r of each layer's update; of ``mos`` the active rank, of ``mora`` that of LoRA of its size."""
    ranks: str = ""
    """Ranks by client, each at most ``rank`` (of ``ravan``: ``ravan.heads``): one number a client with commas between,
    or ``uniform:2-16``, drawn from the seed; empty: all have ``rank``. Read by ``lora`` and ``sora``, and by strategy
    ``ravan``, whose clients train so many of ``ravan.heads`` heads. The scale stays alpha / ``rank``, one for all
    clients."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r; ``vera``, ``uni-lora`` and ``mora`` have no scale."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA); read by ``lora``."""
    target_modules: str = "auto"
    """Comma-separated module names as in PEFT, ``all-linear``, ``auto`` (the usual choice for the model's family), or a
    regular expression that full module names must match, such as ``.*[.][0-5][.].*query``."""
    init: str = "auto"
    """How factors start. ``auto``: as the method's own file says; ``orthonormal``: A of ``lora``, and the fixed A and B
    of ``lora-sb`` and ``ravan``, with orthonormal rows and columns; ``gradient``: those of ``lora-sb`` as the singular
    vectors of the weights' gradient on the rows of ``data.public-path``; ``pissa``: A and B of ``lora`` from the
    leading singular triples of the weights; ``lora-ga``: from those of the gradient on ``data.public-path``."""
    head: str = "shared"
    """``shared``: trained and averaged; ``personal``: trained and kept by the client; ``frozen``: as it starts."""
    head_start: str = "auto"
    """``fresh``: the head starts from the seed; ``checkpoint``: as the checkpoint has trained it; ``auto``: the latter
    where the checkpoint has a head for these classes."""
    start: str = ""
    """Folder of a PEFT adapter, such as another run's ``adapter/``, whose A, B and head a run on ``lora`` starts from;
    empty: from the seed."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.head == "private":
            warnings.warn("method.head = 'private' is now called 'personal'.", FutureWarning, stacklevel=4)
            object.__setattr__(self, "head", "personal")
        at_least("method.rank", self.rank, 1)
        positive("method.alpha", self.alpha)
        one_of("method.head", self.head, ("shared", "personal", "frozen"))
        one_of("method.head-start", self.head_start, ("auto", "checkpoint", "fresh"))
        require(
            is_pattern(self.target_modules) or all(part.strip() for part in self.target_modules.split(",")),
            "method.target-modules",
            self.target_modules,
            "must be module names separated by commas.",
        )

    @property
    def computed(self) -> bool:
        """Whether the server computes how factors start, from the base model, and sends them."""
        return self.init == "pissa" or self.reads_public_rows

    @property
    def reads_public_rows(self) -> bool:
        """Whether factors start from a gradient on the rows of ``data.public-path``."""
        return self.init in ("gradient", "lora-ga")
