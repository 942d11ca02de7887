"""What a site demands of every job and every instruction, whatever a server sends."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from clients.errors import RefusedError
from fedlora.config import Config, Scalar
from fedlora.exchange import Instruction
from fedlora.methods import TensorSpec, payload_bytes
from fedlora.methods.residual import KIND as RESIDUAL
from fedlora.privacy import Mechanism
from fedlora.roles import UP, Role, with_role

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class SiteLimits:
    """What a site demands of every job, whatever a server sends; the defaults demand nothing.

    ``max_grad_norm`` has no limit here: the noise grows with it, so no guarantee depends on it.

    Attributes:
        folder: Where the site's clients keep their ledgers and personal tensors. Never a server's choice: in another
            folder every budget would start anew.
        name: The site's own name. It then is one client with one ledger, whatever number a server gives it; empty:
            every client has a ledger of its own, as in a simulation.
        dp_required: Whether a job must train with differential privacy, and with noise that nobody knows.
        max_epsilon: The most that a client of the site spends over all jobs in its ledger; 0: no limit of its own.
        max_delta: The largest delta that an epsilon may be stated at; 0: any.
        min_noise_multiplier: The least noise of a step in units of ``privacy.max-grad-norm``; 0: any.
        max_steps: The most optimizer steps in a round; 0: any number.
        max_rounds_per_day: The most rounds that may leave in 24 hours; 0: any number.
        max_bytes: The most bytes of tensors that may leave in a round; 0: any number.
        methods: Low-rank methods that a job may use (``method.name``); empty: any.
        strategies: Strategies that a job may use (``strategy.name``); empty: any.
        heads: What a job may do with the head (``method.head``); empty: anything.
        models: Names of the base models that the site loads (``model.name``); empty: any.
        model_digests: Digests of the base models that the site trains; empty: any.
    """

    folder: str
    name: str = ""
    dp_required: bool = False
    max_epsilon: float = 0.0
    max_delta: float = 0.0
    min_noise_multiplier: float = 0.0
    max_steps: int = 0
    max_rounds_per_day: int = 0
    max_bytes: int = 0
    methods: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    model_digests: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.folder:
            raise ValueError("folder: must name where the site's clients keep ledgers and personal tensors.")
        for name in ("max_epsilon", "max_delta", "min_noise_multiplier", *_COUNTS):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{_key(name)} = {value!r}: must be a finite number of at least 0.")
            if value and not self.dp_required and name not in _COUNTS:
                raise ValueError(
                    f"{_key(name)} = {value!r}: a job without differential privacy would pass it; it goes with sites "
                    "that demand it."
                )
        if self.max_epsilon and not 0 < self.max_delta < 1:
            raise ValueError(
                f"max-epsilon = {self.max_epsilon!r}: says nothing without a delta; set max-delta, well below 1 / rows."
            )

    def check(self, config: Config) -> None:
        """Refuse a job that does not satisfy the limits, before anything of it is loaded.

        Raises:
            RefusedError: It does not, with the key and the limit; what the site's limit is does not leave.
        """
        privacy = config.privacy
        for key, value, limit in (
            ("model.name", config.model.name, "models"),
            ("method.name", config.method.name, "methods"),
            ("strategy.name", config.strategy.name, "strategies"),
            ("method.head", config.method.head, "heads"),
        ):
            if getattr(self, limit) and value not in getattr(self, limit):
                self._refuse(key, value, limit)
        steps = config.train.local_steps
        if self.max_steps and steps > self.max_steps:
            self._refuse("train.local-steps", steps, "max_steps")
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
        self.check_steps(Mechanism.of(config).steps)

    def check_steps(self, steps: int) -> None:
        """Refuse a round of more optimizer steps than the site takes.

        Raises:
            RefusedError: It is.
        """
        if self.max_steps and steps > self.max_steps:
            self._refuse("steps of a round", steps, "max_steps")

    def check_model(self, digest: str) -> None:
        """Refuse a base model that the site does not train, whatever its name is.

        Raises:
            RefusedError: It is one.
        """
        if self.model_digests and digest not in self.model_digests:
            self._refuse("the digest of model.name", digest, "model_digests")

    def check_instruction(self, instruction: Instruction, specs: Mapping[str, TensorSpec], config: Config) -> None:
        """Refuse an instruction whose tensors or roles are not the job's, or that would have too much leave.

        Args:
            instruction: The instruction.
            specs: The method's tensors.
            config: The job's configuration.

        Raises:
            RefusedError: It is such an instruction.
        """
        roles, kinds = instruction.roles, {spec.kind for spec in specs.values()}
        if set(roles) != kinds:
            raise RefusedError(f"the instruction gives roles to {sorted(roles)}, and the method has {sorted(kinds)}")
        if "head" in roles and roles["head"] not in _HEAD_ROLES[config.method.head]:
            raise RefusedError(f"the head is {roles['head']}, and the job has method.head = {config.method.head!r}")
        unknown = set(instruction.blocks) - {spec.block for spec in specs.values() if spec.block}
        if unknown:
            raise RefusedError(
                f"the instruction names blocks that the model does not have: {sorted(unknown)[0][:80]!r}"
            )
        for name, value in instruction.tensors.items():
            if name in specs:
                whole = specs[name].shape
                if value.ndim != len(whole) or any(n > most for n, most in zip(value.shape, whole, strict=True)):
                    raise RefusedError(f"the instruction's {name} has shape {list(value.shape)}, not {list(whole)}")
            elif not name.rpartition(".")[2].startswith(RESIDUAL):
                raise RefusedError(f"the instruction holds {name[:80]!r}, which is no tensor of the method")
        leaving = payload_bytes(with_role(specs, roles, *UP, blocks=instruction.blocks), config.engine.tensor_dtype)
        if self.max_bytes and leaving > self.max_bytes:
            self._refuse("bytes of the tensors that leave", leaving, "max_bytes")

    def _refuse(self, key: str, value: Scalar, limit: str) -> None:
        _logger.error("refused a job: %s = %r, and %s = %r", key, value, _key(limit), getattr(self, limit))
        raise RefusedError(f"the site's own limits refuse the job: {key}, by {_key(limit)}")


_HEAD_ROLES = {
    "shared": frozenset(Role),
    "personal": frozenset({Role.PERSONAL, Role.FROZEN}),
    "frozen": frozenset({Role.FROZEN}),
}
"""What may happen to the head in a round, by ``method.head``."""
_COUNTS = ("max_steps", "max_rounds_per_day", "max_bytes")


def _key(name: str) -> str:
    return name.replace("_", "-")
