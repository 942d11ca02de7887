"""The plan of a run: what it will train, exchange and spend, before its first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from clients.shards import Pack, Shard, deal, most_clients, weights
from clients.site import Speed
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.methods import TensorSpec, count_parameters
from fedlora.roles import TRAINED, Role
from fedlora.server import Federation, Payloads
from fedlora.strategy import Strategy
from fedlora.tasks import TASKS
from fedlora.workload import examples_seen, local_steps, pack_bytes, predicted_tokens
from simulations.advice import learns_from, verdict
from simulations.privacy import PrivacyPlan
from simulations.rates import rate_line
from simulations.shard_plan import shards_record


@dataclass(frozen=True)
class Plan:
    """A run, before its first round.

    Attributes:
        config: The resolved configuration.
        data: The federated data.
        strategy: The strategy.
        federation: Its clients, as the server sees them.
        family: The base model's type.
        num_parameters: Parameters of the base model.
        num_layers: Adapted layers.
        nodes: SuperNodes to which clients are assigned.
        trainers: Trainers that work side by side.
        remarks: What may surprise of the model.
        shards: What each trainer owns; empty: it is not known yet.
        base_bytes: What the base model's weights take.
        row_tokens: Mean tokens of each client's training rows; empty: they are not known yet, and all alike.
    """

    config: Config
    data: FederatedData
    strategy: Strategy
    federation: Federation
    family: str
    num_parameters: int
    num_layers: int
    nodes: int
    trainers: int
    remarks: tuple[str, ...] = ()
    shards: tuple[Shard, ...] = ()
    base_bytes: int = 0
    row_tokens: tuple[float, ...] = ()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The method's tensors."""
        return self.strategy.setting.specs

    @cached_property
    def privacy(self) -> PrivacyPlan | None:
        """What its privacy comes to; None where it has none."""
        return PrivacyPlan(self.config, trained_in_a_round(self.strategy)) if self.config.privacy.mode == "dp" else None

    @property
    def keeps_at_clients(self) -> bool:
        """Whether clients keep something in the run folder: ledgers, personal tensors, control variates."""
        return self.privacy is not None or self.strategy.has_personal or self.strategy.local(1).scaffold > 0

    @property
    def sampled(self) -> int:
        """Clients that take part in a round."""
        return self.config.federation.clients_per_round or self.config.federation.num_clients

    @property
    def measured(self) -> str:
        """What a round is measured on: clients' own rows, or the split ``dev`` or ``test``."""
        if self.strategy.has_personal or self.federation.measured_by_sites:
            return "personal"
        return "dev" if self.config.data.dev_share else "test"

    @property
    def measure(self) -> str:
        """The number by which a round is reported, such as ``test_accuracy``."""
        return f"{self.measured}_{TASKS[self.config.task].measure.name}"

    @property
    def payloads(self) -> Payloads:
        """The bytes of a client's messages."""
        return Payloads(self.strategy, self.config.engine.tensor_dtype)

    @cached_property
    def traffic(self) -> tuple[list[int], list[int]]:
        """The bytes that all clients send, and are sent, in each round, if none fails: see :attr:`_at_most`."""
        ups, downs = [], []
        ranks: list[tuple[int, ...]] = [()]
        for number in range(1, self.config.rounds + 1):
            cohort = self.federation.cohort(number)
            alike: dict[int | None, list[int]] = {}  # clients of one rank have one payload
            for client in cohort:
                alike.setdefault(self.strategy.setting.rank(client), []).append(client)
            one_of_each = [(len(clients), clients[0]) for clients in alike.values()]
            ups.append(sum(count * self.payloads.up(number, client) for count, client in one_of_each))
            downs.append(sum(count * self.payloads.down(number, -1, client, ranks)[0] for count, client in one_of_each))
            added = self.strategy.added_ranks(cohort)
            ranks.append(tuple(map(sum, zip(ranks[-1] or (0,) * len(added), added, strict=True))))
        return ups, downs

    def steps(self) -> list[int]:
        """Return each client's local steps in a round that it takes part in."""
        if self.privacy is not None:
            return [self.privacy.mechanism.steps] * len(self.data.clients)
        return [local_steps(rows, self.config.train) for rows in self._rows()]

    def examples_by_client(self) -> list[int]:
        """Return the examples that each client sees in a round that it takes part in; under DP what it expects to."""
        if self.privacy is not None:
            rate = self.privacy.mechanism.sample_rate
            return [round(steps * rate * rows) for steps, rows in zip(self.steps(), self._rows(), strict=True)]
        return [examples_seen(rows, self.config.train) for rows in self._rows()]

    def _rows(self) -> list[int]:
        """Return each client's training rows."""
        return [len(self.data.training_rows(client)) for client in range(len(self.data.clients))]

    @cached_property
    def work(self) -> dict[int, float]:
        """The tokens of each client's round, by which it is dealt to a trainer; examples where tokens are not known."""
        seen = self.examples_by_client()
        tokens = self.row_tokens or (1.0,) * len(seen)
        return {client: predicted_tokens(seen[client], tokens[client]) for client in range(len(seen))}

    def examples(self, rounds: int) -> int:
        """Return the examples that all clients see in so many rounds."""
        seen = self.examples_by_client()
        return sum(seen[client] for number in range(1, rounds + 1) for client in self.federation.cohort(number))

    @cached_property
    def most_clients(self) -> int:
        """Clients of a pack of an automatic size, at most: by the memory of their trained numbers on a GPU."""
        return most_clients(self.shards, self.base_bytes, pack_bytes(trained_in_a_round(self.strategy), self.config))

    @cached_property
    def packs(self) -> list[Pack]:
        """The packs of the first round, before any trainer was measured."""
        pack, shares = self.config.engine.pack, weights([0.0] * self.trainers)
        return deal(self.federation.cohort(1), pack, shares, self.work, self.most_clients)

    def record(self, speed: Speed | None = None) -> dict[str, Any]:
        """Return the plan as plain values, for ``plan.json``.

        Args:
            speed: What a probe measured; None: there was none.
        """
        measure = TASKS[self.config.task].measure
        up, down, cached = self.payloads.cycle()
        return {
            "measure": self.measure,
            "higher_is_better": measure.higher_is_better,
            "roles": {kind: in_turn(roles) for kind, roles in self.strategy.roles_in_turn().items()},
            "trained_parameters": self.trained_parameters(),
            "base_parameters": self.num_parameters,
            "model": list(self.remarks),
            "learning_rate": rate_line(self.config),
            "texts": list(self.data.corpus.text_names(self.config.data.text_column)),
            "outputs": list(self.data.corpus.classes),
            "bytes_up_per_client": up,
            "bytes_down_per_client": down,
            "bytes_down_cached_per_client": cached,
            "bytes_up_by_round": self.traffic[0],
            "bytes_down_by_round": self.traffic[1],
            "packs": len(self.packs),
            "nodes": self.nodes,
            "trainers": self.trainers,
            **({"shards": shards_record(self.shards, self.packs, speed)} if self.shards else {}),
            **({"privacy": self._privacy_record(self.privacy)} if self.privacy is not None else {}),
        }

    @staticmethod
    def _privacy_record(privacy: PrivacyPlan) -> dict[str, Any]:
        return {**privacy.record(), "learns_from": learns_from(privacy.config), "verdict": verdict(privacy)}

    def trained_parameters(self) -> int:
        """Return the numbers that a client trains, over the rounds of a cycle."""
        trained = self.strategy.trained_kinds
        return count_parameters({name: spec for name, spec in self.specs.items() if spec.kind in trained})


def trained_in_a_round(strategy: Strategy) -> int:
    """Return the most numbers that a client trains in one round."""
    turns = range(1, strategy.period + 1)
    return max(count_parameters(strategy.with_role(number, *TRAINED)) for number in turns)


def in_turn(roles: Sequence[Role]) -> str:
    """Return a kind's role, or its different roles in the order of rounds."""
    return ", ".join(dict.fromkeys(map(str, roles)))
