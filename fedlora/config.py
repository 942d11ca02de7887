"""The run configuration: frozen dataclasses, the one source of defaults, types and ranges.

Flower hands over flat, untyped values (``train.batch-size = 16``); :meth:`Config.from_flat` turns them into a
:class:`Config` or raises a :class:`ConfigError` that names the dotted key. The table
``[tool.flwr.app.config]`` in ``pyproject.toml`` is generated from the defaults here.
"""

from __future__ import annotations

import math
import re
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, get_type_hints

from fedlora.messages import closest

Scalar = bool | int | float | str


class ConfigError(ValueError):
    """The configuration cannot work; the message names the key, the value and the cure."""


def _require(condition: bool, key: str, value: Scalar, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {rule}")


def _at_least(key: str, value: float, low: float) -> None:
    _require(value >= low, key, value, f"must be at least {low}.")


def _positive(key: str, value: float) -> None:
    _require(value > 0, key, value, "must be greater than 0.")


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, key, value, f"must be one of {', '.join(known)}.{closest(value, known)}")


SMALL_LLAMA = "small-llama"  # the model that a machine trains for itself, see fedlora.small_llama
_DEFAULT_COLUMNS = {"data.text-column": "text", "data.label-column": "label"}


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

    def __post_init__(self) -> None:
        """Check the fields."""
        _require(self.dir != "", "run.dir", self.dir, "must name a folder.")
        _require(
            re.fullmatch(r"[1-9]\d*/[1-9]\d*", self.share) is not None,
            "run.share",
            self.share,
            "must be a number and how many there are, such as 2/4.",
        )
        _require(not self.resume or self.name != "", "run.resume", self.resume, "needs run.name, the run to continue.")
        _require(
            "/" not in self.name and "\\" not in self.name and self.name not in (".", ".."),
            "run.name",
            self.name,
            "must be a plain folder name; set run.dir for the path.",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model."""

    name: str = "minilm"
    """``minilm`` (bundled, offline), ``small-llama`` (a small language model that this machine trains once, on
    docstrings), a local folder, or a Hugging Face hub name."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _require(self.name.strip() != "", "model.name", self.name, "must name a model.")


@dataclass(frozen=True)
class DataConfig:
    """The data and how they are dealt to clients."""

    name: str = "docstrings"
    """``docstrings`` (built in), ``file`` for a file, or ``hub`` for a Hugging Face data set."""
    path: str = ""
    """With ``file`` the training file (csv, tsv, jsonl, parquet); with ``hub`` the data set's name or local folder."""
    test_path: str = ""
    """Test file of the same kind; empty: a fifth of the training file, drawn from the seed."""
    subset: str = ""
    """Configuration of the hub data set, where it has several."""
    train_split: str = "train"
    """Split of the hub data set that clients share among themselves."""
    test_split: str = ""
    """Split of the hub data set that the server tests on; empty: a fifth of the training split."""
    text_column: str = "text"
    """Name of the text (or prompt) column; where the file has no header its number, from 0 (``text`` stands for 0)."""
    label_column: str = "label"
    """Name of the label column; where the file has no header its number, from 0 (``label`` stands for 1). For
    ``causal-lm`` a category to deal by, read by ``dirichlet`` and ``shards`` only."""
    classes: str = ""
    """Names of the classes, with commas between, in the order of their numbers; empty: the labels that the training
    rows have, sorted. Under DP name them: that a label occurs at all is not protected otherwise."""
    answer_column: str = "answer"
    """Name of the column that the model learns to write, for ``causal-lm``."""
    prompt_template: str = ""
    """Prompt with columns in braces, such as ``{question} Answer:``, for ``causal-lm``; empty: the text column."""
    chat_template: bool = False
    """Whether the prompt is a user's message and the answer the assistant's, by the tokenizer's chat template."""
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
    """Column that says whose a row is (a hospital, a user); ``natural`` deals by it, and no other partition may
    put rows of one owner on two clients."""
    min_size: int = 1
    """Rows that each client must have to train on; a partition that gives one fewer is refused."""
    holdout: float = 0.0
    """Share of its rows that each client holds out to be measured on; 0: none, or a fifth where a run needs it
    (private tensors, ``eval.baselines``)."""
    dev_share: float = 0.0
    """Share of the training rows that nobody trains on and the curve is measured on; the test rows are then
    read once, after the last round. 0: none, and the curve is measured on the test rows."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("data.partition", self.partition, ("iid", "dirichlet", "shards", "quantity", "natural"))
        _positive("data.alpha", self.alpha)
        _at_least("data.shards-per-client", self.shards_per_client, 1)
        _at_least("data.min-size", self.min_size, 1)
        for key, share in (("data.holdout", self.holdout), ("data.dev-share", self.dev_share)):
            _require(0.0 <= share < 1.0, key, share, "must be at least 0 and below 1.")
        _require(
            self.partition != "natural" or self.partition_column != "",
            "data.partition-column",
            self.partition_column,
            "must name the column that says whose a row is, with data.partition = 'natural'.",
        )
        if self.name in ("file", "hub"):
            what = "a file" if self.name == "file" else "a data set of the hub or a local folder of one"
            _require(self.path != "", "data.path", self.path, f"must name {what} with data.name = {self.name!r}.")
        readers = {
            "path": ("file", "hub"),
            "test_path": ("file",),
            "subset": ("hub",),
            "test_split": ("hub",),
            "classes": ("file", "hub"),
        }
        for name, own in readers.items():
            _require(
                self.name in own or getattr(self, name) == "",
                _key("data", name),
                getattr(self, name),
                f"is only read with data.name = {' or '.join(map(repr, own))}, not {self.name!r}.",
            )
        if self.classes:
            names = self.class_names
            _require(
                len(names) > 1 and all(names) and len(set(names)) == len(names),
                "data.classes",
                self.classes,
                "must be two names or more, each once, with commas between.",
            )
        if not self.header:
            for key, value in (("data.text-column", self.text_column), ("data.label-column", self.label_column)):
                _require(
                    value.isdecimal() or value == _DEFAULT_COLUMNS[key],
                    key,
                    value,
                    "must be a column number from 0 with data.header = false.",
                )
        _require(
            self.text_column != self.label_column,
            "data.label-column",
            self.label_column,
            "is the text column; name the column that holds the labels.",
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()


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

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("federation.num-clients", self.num_clients, 0)
        _at_least("federation.clients-per-round", self.clients_per_round, 0)
        _require(
            self.num_clients == 0 or self.clients_per_round <= self.num_clients,
            "federation.clients-per-round",
            self.clients_per_round,
            f"must be at most federation.num-clients = {self.num_clients}.",
        )
        _require(
            0.0 <= self.failure_threshold < 1.0,
            "federation.failure-threshold",
            self.failure_threshold,
            "must be at least 0 and below 1.",
        )
        _positive("federation.timeout", self.timeout)


@dataclass(frozen=True)
class StrategyConfig:
    """How the server combines what clients send."""

    name: str = "ffa-lora"
    """Aggregation strategy: ``fedavg``, ``ffa-lora``, ``rolora``, ``fedsvd``, ``fedsa-lora``, ``local``, ``mos``,
    ``mos-private``, ``s2-lora``, ``s2-frozen``, ``s2-cyclic``, ``s2-private``."""
    weights: str = "examples"
    """``examples``: a client counts by its number of training examples; ``equal``: all alike."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("strategy.weights", self.weights, ("examples", "equal"))


@dataclass(frozen=True)
class MethodConfig:
    """The low-rank method and the head."""

    name: str = "auto"
    """Low-rank method: ``lora``, ``mos``, ``s2-lora``; ``auto``: the strategy's own."""
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
    """Comma-separated module names as in PEFT, ``all-linear``, or ``auto``: PEFT's choice for the model."""
    head: str = "shared"
    """``shared``: trained and averaged; ``personal``: trained and kept by the client; ``frozen``: as seeded."""

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.head == "private":
            warnings.warn("method.head = 'private' is now called 'personal'.", FutureWarning, stacklevel=4)
            object.__setattr__(self, "head", "personal")
        _at_least("method.rank", self.rank, 1)
        _positive("method.alpha", self.alpha)
        _one_of("method.head", self.head, ("shared", "personal", "frozen"))
        _require(
            all(part.strip() for part in self.target_modules.split(",")),
            "method.target-modules",
            self.target_modules,
            "must be module names separated by commas.",
        )


@dataclass(frozen=True)
class MosConfig:
    """Mixture of Shards; read by ``method.name = 'mos'`` only."""

    budget: int = 4
    """Rank e of the LoRA that has as many parameters: each pool holds budget x layers ranks."""
    shards: int = 4
    """Shards l that a row of A or a column of B is put together from; 1 switches vector sharding off."""
    private: int = 1
    """Ranks p of the budget that each layer has to itself; 0 switches shard privatisation off."""
    subset: bool = True
    """Whether each layer takes its own random subset of the shared shards; without, each takes all of them."""
    dissociation: bool = True
    """Whether A and B take shards independently of each other."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("mos.budget", self.budget, 1)
        _at_least("mos.shards", self.shards, 1)
        _at_least("mos.private", self.private, 0)
        _require(
            self.private <= self.budget,
            "mos.private",
            self.private,
            f"must be at most mos.budget = {self.budget}, of which it is a part.",
        )


@dataclass(frozen=True)
class S2Config:
    """S2-LoRA; read by ``method.name = 's2-lora'`` only."""

    sparsity: float = 0.1
    """Weight of the L1 penalty on the rank coefficients, applied as a proximal step after each optimizer step."""
    orthogonality: float = 0.0
    """Weight of the penalty that keeps the rows of A and the columns of B orthonormal; 0: none."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("s2.sparsity", self.sparsity, 0)
        _at_least("s2.orthogonality", self.orthogonality, 0)


@dataclass(frozen=True)
class TrainConfig:
    """Local training of one client in one round. The optimizer starts anew each round."""

    batch_size: int = 8
    """Examples a step."""
    local_steps: int = 0
    """Optimizer steps a round; 0: by epochs."""
    local_epochs: int = 1
    """Passes over the client's examples a round, where local-steps is 0."""
    learning_rate: float = 0.01
    """Peak learning rate."""
    optimizer: str = "adamw"
    """``adamw`` or ``sgd``."""
    weight_decay: float = 0.0
    """Decoupled with adamw, L2 with sgd, as in PyTorch."""
    momentum: float = 0.0
    """Momentum of sgd."""
    schedule: str = "constant"
    """``constant``, or ``linear``: down to 0 over the client's own steps of the round."""
    round_schedule: str = "constant"
    """Learning rate over the rounds of the run: ``constant``, ``linear`` or ``cosine``, both down to 0 after the last
    round. It multiplies what ``schedule`` makes of the steps of one round."""
    warmup_rounds: int = 0
    """Rounds over which the learning rate rises linearly to its peak."""
    clip_norm: float = 0.0
    """Bound on the L2 norm of each client's gradient; 0: none."""
    max_length: int = 48
    """Tokens a text is cut to."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("train.batch-size", self.batch_size, 1)
        _at_least("train.local-steps", self.local_steps, 0)
        _at_least("train.local-epochs", self.local_epochs, 1)
        _require(
            self.local_steps == 0 or self.local_epochs == 1,
            "train.local-epochs",
            self.local_epochs,
            f"is only read with train.local-steps = 0, not {self.local_steps}; set one of the two.",
        )
        _positive("train.learning-rate", self.learning_rate)
        _one_of("train.optimizer", self.optimizer, ("adamw", "sgd"))
        _at_least("train.weight-decay", self.weight_decay, 0)
        _require(0.0 <= self.momentum < 1.0, "train.momentum", self.momentum, "must be at least 0 and below 1.")
        _require(
            self.momentum == 0.0 or self.optimizer == "sgd",
            "train.momentum",
            self.momentum,
            "is read by train.optimizer = 'sgd' only.",
        )
        _one_of("train.schedule", self.schedule, ("constant", "linear"))
        _one_of("train.round-schedule", self.round_schedule, ("constant", "linear", "cosine"))
        _at_least("train.warmup-rounds", self.warmup_rounds, 0)
        _at_least("train.clip-norm", self.clip_norm, 0)
        _at_least("train.max-length", self.max_length, 4)


@dataclass(frozen=True)
class LocalConfig:
    """What is added to the clients' gradients."""

    term: str = "none"
    """``none``; ``prox``: FedProx's pull towards the server's tensors; ``scaffold``: SCAFFOLD's control variates."""
    mu: float = 0.01
    """Weight of FedProx's term; read with ``local.term = 'prox'``."""
    option: int = 2
    """How clients renew their control variates, with ``scaffold``: 1 by a gradient of all their rows at the server's
    tensors, 2 by the steps that they took."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("local.term", self.term, ("none", "prox", "scaffold"))
        _at_least("local.mu", self.mu, 0)
        _require(self.option in (1, 2), "local.option", self.option, "must be 1 or 2.")


@dataclass(frozen=True)
class ServerConfig:
    """The server's optimizer: what it makes of the averaged update, whatever the strategy."""

    optimizer: str = "none"
    """``none``: the mean is the new value; ``momentum`` (FedAvgM), ``adam``, ``yogi``, ``adagrad`` (FedOpt)."""
    learning_rate: float = 0.0
    """Of the server's step; 0: the one that leaves a small averaged update as it is in the first round."""
    momentum: float = 0.9
    """Of ``momentum``."""
    beta1: float = 0.9
    """Decay of the first moment, of ``adam`` and ``yogi``."""
    beta2: float = 0.99
    """Decay of the second moment, of ``adam`` and ``yogi``."""
    tau: float = 0.001
    """Added to the root of the second moment: updates far below it are scaled alike, those far above adaptively."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("server.optimizer", self.optimizer, ("none", "momentum", "adam", "yogi", "adagrad"))
        _at_least("server.learning-rate", self.learning_rate, 0)
        for key, value in (("momentum", self.momentum), ("beta1", self.beta1), ("beta2", self.beta2)):
            _require(0.0 <= value < 1.0, f"server.{key}", value, "must be at least 0 and below 1.")
        _positive("server.tau", self.tau)


@dataclass(frozen=True)
class EngineConfig:
    """How training is computed; changes the result by rounding only."""

    dtype: str = "float32"
    """``float32``, ``bfloat16`` (base model; adapters stay float32) or ``float64``."""
    pack: int = 0
    """Clients trained together; 0: automatic."""
    trainers: int = 0
    """Trainer processes; 0: chosen from the machine."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("engine.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        _at_least("engine.pack", self.pack, 0)
        _at_least("engine.trainers", self.trainers, 0)

    @property
    def tensor_dtype(self) -> str:
        """The dtype in which adapters are trained and sent."""
        return "float64" if self.dtype == "float64" else "float32"


@dataclass(frozen=True)
class EvalConfig:
    """What is measured beside the curve."""

    test: bool = True
    """Whether the test rows are read at all; a search for hyper-parameters measures on ``data.dev-share`` only."""
    target: float = 0.0
    """What the measure has to reach for its rounds and bytes to be noted in ``result.json``; 0: nothing is noted."""
    baselines: bool = False
    """Whether to run what the curve is compared with: each client alone, and all data in one place. Costs about
    twice the run again."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("eval.target", self.target, 0)


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy; read with ``privacy.mode = 'dp'`` only."""

    mode: str = "none"
    """``none``: no formal guarantee; ``dp``: clients train with DP-SGD."""
    unit: str = "record"
    """What is protected: ``record``, one training row of a client."""
    trust: str = "local"
    """Who need not be trusted: ``local``, anybody but the client itself, the server included."""
    epsilon: float = 0.0
    """Each client's budget over the whole run; 0: none is enforced, and noise-multiplier must be given."""
    delta: float = 0.0
    """Probability with which the guarantee may fail; 0: the power of ten at or below a tenth of 1 / client-size."""
    noise_multiplier: float = 0.0
    """Standard deviation of the noise in units of max-grad-norm; 0: the least that keeps to epsilon."""
    max_grad_norm: float = 1.0
    """L2 norm that each row's gradient, all trained tensors together, is clipped to."""
    client_size: int = 0
    """Training rows of a client as publicly declared: sample rate and denominators come from it, never from the actual
    number. 0: in a simulation the mean over clients, taken as public."""
    accountant: str = "pld"
    """What certifies epsilon: ``pld`` (dp-accounting) or ``prv`` (Opacus); RDP's is reported beside it."""
    seed: int = 0
    """For reproducing an experiment: sampling and noise from this number, and so no privacy at all. 0: from each
    client's operating system."""

    def __post_init__(self) -> None:
        """Check the fields."""
        _one_of("privacy.mode", self.mode, ("none", "dp"))
        rooms = {
            "unit": ("record", "client", "a whole client as the protected unit does not exist yet"),
            "trust": (
                "local",
                ("central", "distributed"),
                "noise added by the server, or in shares, does not exist yet",
            ),
        }
        for name, (here, later, why) in rooms.items():
            value = getattr(self, name)
            _require(value not in later or value == here, f"privacy.{name}", value, f"{why}; use {here!r}.")
            _one_of(f"privacy.{name}", value, (here,))
        why_not = {
            "gdp": "reports less than was spent (its central-limit approximation is no bound); use 'pld' or 'prv'.",
            "rdp": "is a looser bound, reported beside the certified one as epsilon_rdp; use 'pld' or 'prv'.",
        }
        _require(
            self.accountant not in why_not, "privacy.accountant", self.accountant, why_not.get(self.accountant, "")
        )
        _one_of("privacy.accountant", self.accountant, ("pld", "prv"))
        _at_least("privacy.epsilon", self.epsilon, 0)
        _require(0.0 <= self.delta < 1.0, "privacy.delta", self.delta, "must be at least 0 and below 1.")
        _at_least("privacy.noise-multiplier", self.noise_multiplier, 0)
        _positive("privacy.max-grad-norm", self.max_grad_norm)
        _at_least("privacy.client-size", self.client_size, 0)
        _at_least("privacy.seed", self.seed, 0)
        if self.mode == "dp":
            _require(
                self.epsilon > 0 or self.noise_multiplier > 0,
                "privacy.mode",
                self.mode,
                "needs privacy.epsilon, the budget of each client, or privacy.noise-multiplier.",
            )
            return
        for item in fields(self):
            value = getattr(self, item.name)
            _require(
                value == item.default,
                _key("privacy", item.name),
                value,
                f"is read with privacy.mode = 'dp' only, and this run has {self.mode!r}: it would have no privacy.",
            )


@dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0
    """Seed of everything but privacy."""
    rounds: int = 3
    """Communication rounds."""
    task: str = "classification"
    """What is learned: ``classification`` of texts, or ``causal-lm``: to write an answer to a prompt."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    mos: MosConfig = field(default_factory=MosConfig)
    s2: S2Config = field(default_factory=S2Config)
    train: TrainConfig = field(default_factory=TrainConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    def __post_init__(self) -> None:
        """Check the fields."""
        _at_least("seed", self.seed, 0)
        _at_least("rounds", self.rounds, 1)
        if self.task != "causal-lm":
            for key, value in (
                ("data.prompt-template", self.data.prompt_template),
                ("data.chat-template", self.data.chat_template),
            ):
                _require(not value, key, value, f"is read with task = 'causal-lm', not {self.task!r}.")
        else:
            _require(
                self.method.head == "shared",
                "method.head",
                self.method.head,
                "a language model has no head of the task's own; leave it at 'shared'.",
            )
            _require(
                self.data.classes == "",
                "data.classes",
                self.data.classes,
                "is read with task = 'classification', not 'causal-lm'.",
            )
        _require(
            self.privacy.mode == "none" or self.train.clip_norm == 0,
            "train.clip-norm",
            self.train.clip_norm,
            "each row's gradient is clipped to privacy.max-grad-norm here; leave it at 0.",
        )
        _require(
            self.eval.test or self.data.dev_share > 0,
            "eval.test",
            self.eval.test,
            "without test rows the run needs others to be measured on: set data.dev-share.",
        )

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """Build a configuration from dotted keys; keys left out keep their defaults.

        Raises:
            ConfigError: An unknown key, a value of the wrong type or out of range, or values that cannot
                work together.
        """
        known = dict(_leaves(cls))
        for key in flat:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}.{closest(str(key), known)} Known: {', '.join(sorted(known))}.")
        grouped: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            section, _, name = key.rpartition(".")
            grouped.setdefault(section, {})[name.replace("-", "_")] = _coerce(key, value, known[key])
        hints = get_type_hints(cls)
        sections = {name: hints[name](**values) for name, values in grouped.items() if name}
        return cls(**grouped.get("", {}), **sections)

    def to_flat(self) -> dict[str, Scalar]:
        """Return every key with its value, in the order of declaration."""
        flat: dict[str, Scalar] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in _SCALARS:
                flat[item.name] = value
            else:
                flat |= {_key(item.name, leaf.name): getattr(value, leaf.name) for leaf in fields(value)}
        return flat


_SCALARS = ("seed", "rounds", "task")


def _key(section: str, name: str) -> str:
    return f"{section}.{name.replace('_', '-')}"


def _leaves(cls: type) -> list[tuple[str, type]]:
    """Return (dotted key, type) of every scalar of a configuration."""
    leaves: list[tuple[str, type]] = []
    for name, hint in get_type_hints(cls).items():
        if name in _SCALARS:
            leaves.append((name, hint))
        else:
            leaves += [(_key(name, leaf), kind) for leaf, kind in get_type_hints(hint).items()]
    return leaves


def _coerce(key: str, value: Any, kind: type) -> Scalar:
    """Return ``value`` as ``kind``; only a whole number may stand for a float."""
    if key in _DEFAULT_COLUMNS and type(value) is int:
        value = str(value)  # the number of a column
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind or not isinstance(value, Scalar):
        raise ConfigError(f"{key} = {value!r}: must be {_KINDS[kind]}, not {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r}: must be a finite number.")
    if isinstance(value, int) and abs(value) >= 2**53:
        raise ConfigError(f"{key} = {value!r}: is too large.")
    return value


_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}


def to_toml(flat: Mapping[str, Scalar | list[Scalar]]) -> str:
    """Return dotted keys as TOML lines that ``--run-config`` reads (lists are for sweeps)."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in flat.items())


def from_toml(text: str) -> dict[str, Any]:
    """Return the dotted keys of a TOML text, the inverse of :func:`to_toml`.

    Raises:
        tomllib.TOMLDecodeError: The text is not TOML.
    """
    return _flatten(tomllib.loads(text))


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _toml_value(value: Scalar | list[Scalar]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else {"\\": "\\\\", '"': '\\"'}.get(char, char)
            for char in value
        )
        return f'"{escaped}"'
    return repr(value)
