"""FedDPA: a LoRA that the server averages and one that never leaves the client, used together.

Yang, Long, Shen, Jiang & Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, arXiv
2403.19211; read against the authors' code (Lydia-yang/FedDPA). The method is :mod:`fedlora.methods.dual_lora`, with the
weight a of the own one.

- FedDPA-T, the default: in every round a client trains both, and the server averages the shared one;
- FedDPA-F, with ``feddpa.own-rounds`` = n: until the last n rounds the shared one alone is trained and averaged, while
  the own one adds nothing (its B is at its start, zero). In the last n rounds the own one alone is trained, on top of
  the final shared one and its head, which stay as they are; nothing is sent to the server.

Bytes are those of ``fedavg`` in the rounds that train the shared one. There is no global model; what is measured is
each client on its own rows. What differs from the paper and its code:

- in FedDPA-T both are trained in the same steps. In the code a client trains its own one first, on top of the shared
  one, and then the shared one, so that a round has twice the steps;
- the weights 1 - a and a are there from the first step. In the code the shared one is trained by itself unless
  asked otherwise, at weight 1;
- clients count by ``strategy.weights`` (the code has equal weights);
- the weight by instance at inference, from the cosine similarity to rows of the client, is not built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from fedlora.config import Config, Options, at_least, require
from fedlora.roles import Role, Roles
from fedlora.strategy import Setting, Strategy


@final
@dataclass(frozen=True)
class FedDPAOptions(Options):
    """FedDPA; read by ``strategy.name = 'feddpa'`` only."""

    section: ClassVar[str] = "feddpa"

    own_rounds: int = 0
    """Last rounds of the run, in which clients train their own LoRA alone (FedDPA-F); 0: both, in all (FedDPA-T)."""

    def __post_init__(self) -> None:
        """Check the fields."""
        at_least("feddpa.own-rounds", self.own_rounds, 0)


@final
class FedDPA(Strategy):
    """Averages the shared LoRA; the own one is personal."""

    name = "feddpa"
    methods = ("dual-lora",)
    exact = None
    personal = True

    def __init__(self, setting: Setting) -> None:
        own_rounds, rounds = setting.config.options(FedDPAOptions).own_rounds, setting.config.rounds
        self._apart = own_rounds > 0
        self._shared_rounds = rounds - own_rounds
        if self._apart:
            self.period, self.repeats = rounds, False
        super().__init__(setting)

    @classmethod
    def laid_out(cls, config: Config) -> str:
        """Return the number of own rounds, which are the last of the run."""
        own = config.options(FedDPAOptions).own_rounds
        return f"feddpa.own-rounds = {own}" if own else ""

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse a run in which nothing would be shared."""
        own, rounds = config.options(FedDPAOptions).own_rounds, config.rounds
        rule = f"must be below rounds = {rounds}, or the shared LoRA is never trained; strategy 'local' shares nothing."
        require(own < rounds, "feddpa.own-rounds", own, rule)

    def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
        """Return the roles of the shared factors and of the own ones.

        After the shared rounds of FedDPA-F a shared head is ``broadcast``, too: it is a part of the final shared model.
        """
        if not self._apart:
            shared, own, head = Role.SHARED, Role.PERSONAL, self.setting.head
        elif server_round <= self._shared_rounds:
            shared, own, head = Role.SHARED, Role.FROZEN, self.setting.head
        else:
            shared, own = Role.BROADCAST, Role.PERSONAL
            head = Role.BROADCAST if self.setting.head is Role.SHARED else self.setting.head
        return {"head": head, **{kind: own if kind.endswith("_own") else shared for kind in kinds}}
