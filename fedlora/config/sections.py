"""Sections of the configuration that say what is run: the run folder, model, data, federation, strategy and method.

Frozen dataclasses, the one source of their keys' defaults, types and ranges.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import final

from fedlora.config.data_keys import corpus_of, read_names
from fedlora.config.fields import ConfigError, at_least, dotted, numbered, one_of, positive, require, share, unread
from fedlora.targets import is_pattern

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
"""What a deployed site may be called; the name is a folder's, a file's and a user's."""
SMALL_LLAMA = "small-llama"  # the model that a machine trains for itself, see fedlora.models.small_llama


def column_names(value: str) -> tuple[str, ...]:
    """Return the names in a key that names a column, or several with commas between."""
    return tuple(name.strip() for name in value.split(","))


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

    name: str = "minilm"
    """``minilm`` (bundled, offline), ``small-llama`` (a small language model that this machine trains once, on
    docstrings), a local folder, or a Hugging Face hub name."""
    revision: str = ""
    """Branch, tag or commit of the hub model; empty: its main branch."""
    trust_remote_code: bool = False
    """Whether a model that brings code of its own may run it, on the server and at every client."""

    def __post_init__(self) -> None:
        """Check the fields."""
        require(self.name.strip() != "", "model.name", self.name, "must name a model.")


@final
@dataclass(frozen=True)
class DataConfig:
    """The data and how they are partitioned among clients."""

    name: str = "auto"
    """The data set: ``docstrings`` is built in, ``file`` reads a file, ``hub`` a data set of the Hugging Face hub;
    ``auto``: what ``data.path`` is, or without one ``docstrings``. With ``sites`` the training rows are at deployed
    sites, and this machine never sees them."""
    path: str = ""
    """The training file (csv, tsv, json, jsonl, parquet), or with ``hub`` the data set's name or local folder, as the
    hub keeps it or as ``save_to_disk`` has written it."""
    test_path: str = ""
    """Test file of the same kind; empty: a fifth of the training file, drawn from the seed. With ``sites`` the server's
    own; empty: the server has none."""
    subset: str = ""
    """Configuration of the hub data set, where it has several."""
    train_split: str = "train"
    """Split of the hub data set that clients share among themselves."""
    test_split: str = ""
    """Split of the hub data set that the server tests on; empty: a fifth of the training split."""
    text_column: str = numbered("text")
    """Name of the text (or prompt) column; where the file has no header its number, from 0 (``text`` stands for 0). Two
    names with a comma between, such as ``premise,hypothesis``: sentence pairs, by the tokenizer's own pair encoding."""
    label_column: str = numbered("label")
    """Name of the label column; where the file has no header its number, from 0 (``label`` stands for 1). For
    ``regression`` a column of numbers; for ``multi-label`` a column of lists, or of names with
    ``multi-label.separator`` between, or several columns of 0 and 1, such as ``toxic,insult``. For ``causal-lm`` a
    category to partition by, read by ``dirichlet`` and ``shards`` only."""
    classes: str = ""
    """Names of the classes, with commas between, in the order of their numbers; one with a comma in double quotes, as
    in csv: ``'"yes, please",no'``. Empty: the labels that the training rows have, sorted. Under DP name them: that a
    label occurs at all is not protected otherwise."""
    answer_column: str = "answer"
    """Name of the column that the model learns to write, for ``causal-lm``."""
    prompt_template: str = ""
    """Prompt with columns in braces, such as ``{question} Answer:``, for ``causal-lm``; empty: the text column."""
    chat_template: bool = False
    """Whether the prompt is a user's message and the answer the assistant's, by the tokenizer's chat template. A
    column of messages (OpenAI's ``messages``, ShareGPT's ``conversations``) always goes through it."""
    learn: str = "last"
    """Which of the assistant's turns in a conversation are learned: the ``last``, or ``all``; for ``causal-lm``."""
    header: bool = True
    """Whether the first line of a csv or tsv names the columns."""
    partition: str = "dirichlet"
    """``iid``; ``dirichlet``: label shares drawn from Dirichlet(alpha); ``shards``: a few shards of rows sorted by
    label; ``quantity``: sizes drawn from Dirichlet(alpha); ``natural``: by partition-column."""
    alpha: float = 0.5
    """Concentration of the Dirichlet and quantity partitions; smaller is more uneven."""
    shards_per_client: int = 2
    """Shards that each client gets, with ``shards``."""
    partition_column: str = ""
    """Column that says whose a row is (a hospital, a user); ``natural`` goes by it, and no other partition may
    put rows of one owner on two clients."""
    min_size: int = 1
    """Rows that each client must have to train on; a partition that gives one fewer is refused."""
    holdout: float = 0.0
    """Share of its rows that each client holds out to be measured on; 0: none, or a fifth where a run needs it
    (personal tensors, ``eval.baselines``)."""
    dev_share: float = 0.0
    """Share of the training rows that nobody trains on and the curve is measured on; the test rows are then
    read once, after the last round. 0: none, and the curve is measured on the test rows."""

    def __post_init__(self) -> None:
        """Check the fields, and put what it stands for in the place of ``name = 'auto'``."""
        if self.name == "auto":
            object.__setattr__(self, "name", corpus_of(self.path))
        one_of("data.partition", self.partition, ("iid", "dirichlet", "shards", "quantity", "natural"))
        one_of("data.learn", self.learn, ("last", "all"))
        positive("data.alpha", self.alpha)
        at_least("data.shards-per-client", self.shards_per_client, 1)
        at_least("data.min-size", self.min_size, 1)
        share("data.holdout", self.holdout)
        share("data.dev-share", self.dev_share)
        require(
            self.partition != "natural" or self.partition_column != "",
            "data.partition-column",
            self.partition_column,
            "must name the column that says whose a row is, with data.partition = 'natural'.",
        )
        if self.name in ("file", "hub"):
            what = "a file" if self.name == "file" else "a data set of the hub or a local folder of one"
            require(self.path != "", "data.path", self.path, f"must name {what} with data.name = {self.name!r}.")
        readers = {
            "path": ("file", "hub"),
            "test_path": ("file", "sites"),
            "subset": ("hub",),
            "test_split": ("hub",),
            "classes": ("file", "hub", "sites"),
        }
        for name, own in readers.items():
            require(
                self.name in own or getattr(self, name) == "",
                dotted("data", name),
                getattr(self, name),
                f"is only read with data.name = {' or '.join(map(repr, own))}, not {self.name!r}.",
            )
        if self.classes:
            rule = "must be two names or more, each once, with commas between"
            try:
                names = self.class_names
            except ValueError as error:
                raise ConfigError(
                    f"data.classes = {self.classes!r}: {rule}, and those with a comma in double quotes ({error})."
                ) from error
            valid = len(names) > 1 and all(names) and len(set(names)) == len(names)
            require(valid, "data.classes", self.classes, f"{rule}.")
        if not self.header:
            for name, value in (("text", self.text_column), ("label", self.label_column)):
                require(
                    all(part.isdecimal() or part == name for part in column_names(value)),
                    f"data.{name}-column",
                    value,
                    "must be a column number from 0 with data.header = false.",
                )
        for name, value in (("text", self.text_column), ("label", self.label_column)):
            names = column_names(value)
            require(
                all(names) and len(set(names)) == len(names),
                f"data.{name}-column",
                value,
                "must name a column, or several, each once, with commas between.",
            )
        require(
            not set(column_names(self.text_column)) & set(column_names(self.label_column)),
            "data.label-column",
            self.label_column,
            "is the text column; name the column that holds the labels.",
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return read_names(self.classes)


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
    """Inner dimension r of each layer's update; of ``mos`` the active rank."""
    ranks: str = ""
    """Ranks by client, each at most ``rank``: one number a client with commas between, or ``uniform:2-16``, drawn from
    the seed; empty: all have ``rank``. Read by ``lora``. The scale stays alpha / ``rank``, one for all clients."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA); read by ``lora``."""
    target_modules: str = "auto"
    """Comma-separated module names as in PEFT, ``all-linear``, ``auto`` (the usual choice for the model's family), or a
    regular expression that full module names must match, such as ``.*[.][0-5][.].*query``."""
    head: str = "shared"
    """``shared``: trained and averaged; ``personal``: trained and kept by the client; ``frozen``: as it starts."""
    head_start: str = "auto"
    """``fresh``: the head starts from the seed; ``checkpoint``: as the checkpoint has trained it; ``auto``: the latter
    where the checkpoint has a head for these classes."""

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
