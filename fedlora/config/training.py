"""Sections of the configuration that say how is trained: locally, at the server, by which engine, under which privacy.

Frozen dataclasses, the one source of their keys' defaults, types and ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, final

from fedlora.config.fields import at_least, one_of, positive, require, share, unread


@final
@dataclass(frozen=True)
class TrainConfig:
    """Local training of one client in one round. The optimizer starts anew each round."""

    batch_size: int = 8
    """Examples a step."""
    local_steps: int = 0
    """Optimizer steps a round; 0: by epochs."""
    local_epochs: int = 1
    """Passes over the client's examples a round, where local-steps is 0."""
    learning_rate: float = 0.0
    """Peak learning rate; 0: what was found for the strategy, method, optimizer and kind of task."""
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
    b_rate_ratio: float = 1.0
    """Learning rate of the tensors whose kind begins with B, by that of all others (LoRA+)."""
    gradient: str = "plain"
    """What the optimizer takes for the gradient, after its clip or clip and noise: ``plain``; ``lora-pro``, A's and B's
    so that B A moves like a whole weight would; ``allora``, rows of B's by the root of their norms. Read by ``lora``,
    ``dora`` and ``block-lora``."""
    damping: float = 0.1
    """Of ``lora-pro``: what is added to A A^T and B^T B before they are inverted, by the mean square of A's rows."""
    eta: float = 2.0
    """Of ``allora``: what the gradient of a row of B that is zero is multiplied with."""
    max_length: int = 48
    """Tokens a text is cut to."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("train.batch-size", self.batch_size, 1)
        at_least("train.local-steps", self.local_steps, 0)
        at_least("train.local-epochs", self.local_epochs, 1)
        require(
            self.local_steps == 0 or self.local_epochs == 1,
            "train.local-epochs",
            self.local_epochs,
            f"is only read with train.local-steps = 0, not {self.local_steps}; set one of the two.",
        )
        at_least("train.learning-rate", self.learning_rate, 0)
        one_of("train.optimizer", self.optimizer, ("adamw", "sgd"))
        at_least("train.weight-decay", self.weight_decay, 0)
        share("train.momentum", self.momentum)
        require(
            self.momentum == 0.0 or self.optimizer == "sgd",
            "train.momentum",
            self.momentum,
            "is read by train.optimizer = 'sgd' only.",
        )
        one_of("train.schedule", self.schedule, ("constant", "linear"))
        one_of("train.round-schedule", self.round_schedule, ("constant", "linear", "cosine"))
        at_least("train.warmup-rounds", self.warmup_rounds, 0)
        at_least("train.clip-norm", self.clip_norm, 0)
        positive("train.b-rate-ratio", self.b_rate_ratio)
        one_of("train.gradient", self.gradient, ("plain", "lora-pro", "allora"))
        rule = "must be between 1e-4, below which inverses in float32 are rounding, and 1."
        require(1e-4 <= self.damping <= 1, "train.damping", self.damping, rule)
        positive("train.eta", self.eta)
        for name, reader in (("damping", "lora-pro"), ("eta", "allora")):
            if self.gradient != reader:
                unread(self, "train", name, f"is read with train.gradient = {reader!r} only, not {self.gradient!r}.")
        at_least("train.max-length", self.max_length, 4)


PLAIN_GRADIENT: dict[str, Any] = {
    name: getattr(TrainConfig, name) for name in ("b_rate_ratio", "gradient", "damping", "eta")
}
"""Fields of :class:`TrainConfig` with which the optimizer takes the gradient as it is, at one rate for all tensors."""


@final
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
        one_of("local.term", self.term, ("none", "prox", "scaffold"))
        at_least("local.mu", self.mu, 0)
        require(self.option in (1, 2), "local.option", self.option, "must be 1 or 2.")
        for name, term in (("mu", "prox"), ("option", "scaffold")):
            if self.term != term:
                unread(self, "local", name, f"is read with local.term = {term!r} only, not {self.term!r}.")


_ADAPTIVE = ("adam", "yogi", "adagrad")
_READERS = {  # which optimizers read a key
    "learning_rate": ("momentum", *_ADAPTIVE),
    "momentum": ("momentum",),
    "beta1": ("adam", "yogi"),
    "beta2": ("adam", "yogi"),
    "tau": _ADAPTIVE,
}


@final
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
        one_of("server.optimizer", self.optimizer, ("none", "momentum", "adam", "yogi", "adagrad"))
        at_least("server.learning-rate", self.learning_rate, 0)
        for name in ("momentum", "beta1", "beta2"):
            share(f"server.{name}", getattr(self, name))
        positive("server.tau", self.tau)
        for name, readers in _READERS.items():
            if self.optimizer not in readers:
                known = " or ".join(map(repr, readers))
                unread(self, "server", name, f"is read with server.optimizer = {known} only, not {self.optimizer!r}.")


@final
@dataclass(frozen=True)
class EngineConfig:
    """How training is computed; changes the result by rounding only."""

    dtype: str = "float32"
    """``float32``, ``bfloat16`` (base model; adapters stay float32) or ``float64``."""
    pack: int = 0
    """Clients trained together; 0: automatic."""
    trainers: int = 0
    """Trainers on all machines together; 0: one for every ``engine.gpus`` GPUs, or for every four cores where there is
    none."""
    gpus: int = 0
    """GPUs of one trainer, over which it spreads the base model; 0: one where the model's weights fit into it with a
    fifth to spare, else as few as do."""
    compile: bool = True
    """Whether a GPU runs the model's repeated blocks compiled (torch.compile): steps are up to twice as fast, the first
    load of a model takes up to a minute longer. Not read on a CPU."""

    def __post_init__(self) -> None:
        """Check the fields."""
        one_of("engine.dtype", self.dtype, ("float32", "bfloat16", "float64"))
        at_least("engine.pack", self.pack, 0)
        at_least("engine.trainers", self.trainers, 0)
        at_least("engine.gpus", self.gpus, 0)

    @property
    def tensor_dtype(self) -> str:
        """The dtype in which adapters are trained and sent."""
        return "float64" if self.dtype == "float64" else "float32"


@final
@dataclass(frozen=True)
class EvalConfig:
    """What is measured beside the curve."""

    test: bool = True
    """Whether the test rows are read at all; a search for hyper-parameters measures on ``data.dev-share`` only."""
    target: float = 0.0
    """What the measure has to reach for its rounds and bytes to be noted in ``result.json``; 0: nothing is noted."""
    generate: int = 0
    """Rows, drawn from the seed, for which a language model writes answers after the last round, greedily: ROUGE-L and
    exact match of the text. 0: none. Needs ``pip install 'fedlora[rouge]'``."""
    baselines: bool = False
    """Whether to run what the curve is compared with: each client alone, and all data in one place. Costs about
    twice the run again."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("eval.target", self.target, 0)
        at_least("eval.generate", self.generate, 0)


@final
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
        one_of("privacy.mode", self.mode, ("none", "dp"))
        planned = {
            "unit": ("record", ("client",), "a whole client as the protected unit does not exist yet"),
            "trust": (
                "local",
                ("central", "distributed"),
                "noise added by the server, or in shares, does not exist yet",
            ),
        }
        for name, (here, later, why) in planned.items():
            value = getattr(self, name)
            require(value not in later, f"privacy.{name}", value, f"{why}; use {here!r}.")
            one_of(f"privacy.{name}", value, (here,))
        why_not = {
            "gdp": "reports less than was spent (its central-limit approximation is no bound); use 'pld' or 'prv'.",
            "rdp": "is a looser bound, reported beside the certified one as epsilon_rdp; use 'pld' or 'prv'.",
        }
        require(self.accountant not in why_not, "privacy.accountant", self.accountant, why_not.get(self.accountant, ""))
        one_of("privacy.accountant", self.accountant, ("pld", "prv"))
        at_least("privacy.epsilon", self.epsilon, 0)
        share("privacy.delta", self.delta)
        at_least("privacy.noise-multiplier", self.noise_multiplier, 0)
        positive("privacy.max-grad-norm", self.max_grad_norm)
        at_least("privacy.client-size", self.client_size, 0)
        at_least("privacy.seed", self.seed, 0)
        if self.mode == "dp":
            require(
                self.epsilon > 0 or self.noise_multiplier > 0,
                "privacy.mode",
                self.mode,
                "needs privacy.epsilon, the budget of each client, or privacy.noise-multiplier.",
            )
            return
        rule = f"is read with privacy.mode = 'dp' only, and this run has {self.mode!r}: it would have no privacy."
        for item in fields(self):
            unread(self, "privacy", item.name, rule)
