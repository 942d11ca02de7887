"""The plan of a run: what it will train, exchange and spend, before its first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from clients.shards import Pack, Shard, deal, most_clients, weights
from clients.site import Speed
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.data.targets import spread_note
from fedlora.methods import METHODS, TensorSpec, count_parameters, payload_bytes
from fedlora.reports.format import human_bytes
from fedlora.reports.tables import clients_table
from fedlora.roles import TRAINED, Role
from fedlora.server import Federation, Payloads
from fedlora.strategy import Strategy
from fedlora.tasks import TASKS
from fedlora.workload import examples_seen, local_steps, pack_bytes, predicted_tokens
from simulations.advice import learns_from, verdict
from simulations.privacy import PrivacyPlan
from simulations.rates import rate_line
from simulations.shard_plan import shards_lines, shards_record
from strategies.server_optimizers import learning_rate


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
            "roles": {kind: _in_turn(roles) for kind, roles in self.strategy.roles_in_turn().items()},
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

    def show(self, console: Console) -> None:
        """Print who holds what, what is trained and sent, and what that amounts to."""
        console.print(clients_table(list(self.data.categories), self.data.label_counts().tolist()))
        console.print(self.tensors_table())
        for line in self._lines():
            console.print(line, markup=False)

    def tensors_table(self) -> RichTable:
        """Return a table of the kinds of tensors, with role and bytes of each."""
        config, dtype = self.config, self.config.engine.tensor_dtype
        table = RichTable(title=f"{config.strategy.name} / {config.method.name} on {config.model.name} ({self.family})")
        for column in ("kind", "role", "tensors", "parameters", "bytes up", "bytes down"):
            table.add_column(column, justify="left" if column in ("kind", "role") else "right")
        sent_up = [self.strategy.expected(number) for number in range(1, self.strategy.period + 1)]
        for kind, roles in self.strategy.roles_in_turn().items():
            own = {name: spec for name, spec in self.specs.items() if spec.kind == kind}
            size = payload_bytes(own, dtype)
            up = max(payload_bytes({n: spec for n, spec in own.items() if n in sent}, dtype) for sent in sent_up)
            down = size if {Role.SHARED, Role.BROADCAST} & set(roles) else 0
            table.add_row(kind, _in_turn(roles), str(len(own)), f"{count_parameters(own):,}", f"{up:,}", f"{down:,}")
        return table

    def _lines(self) -> list[str]:
        config, steps = self.config, self.steps()
        up, down, cached = self.payloads.cycle()
        ups, downs = self.traffic
        exact = {
            True: "exact",
            False: "not exact (docs/strategies.md says by how much)",
            None: "none: the server holds no whole update",
        }
        lines = [
            f"base model: {self.num_parameters:,} parameters, {self.num_layers} adapted layers, "
            f"{self.trained_parameters():,} trained parameters a client",
            *self.remarks,
            f"rounds: {config.rounds} of {self.sampled} of {config.federation.num_clients} clients, in "
            f"{len(self.packs)} pack(s) on {self.trainers} trainer(s); {min(steps)} to {max(steps)} local steps of "
            f"{config.train.batch_size} examples",
            rate_line(config),
            *shards_lines(self.shards, self.packs),
            *([f"data: {self.data.corpus.shape}"] if self.data.corpus.shape else []),
            f"reported: {self.measure.replace('_', ' ')}"
            + (" (each client on the rows it holds out)" if self.strategy.has_personal else ""),
            f"bytes a client a round: {human_bytes(up)} up, {human_bytes(down)} down"
            + (f" ({human_bytes(cached)} if it kept what it was sent)" if cached != down else "")
            + (f", means over {len(self.payloads.rounds)} rounds" if self.strategy.period > 1 else ""),
            f"bytes of the whole run: {human_bytes(sum(ups))} up, {human_bytes(sum(downs))} down"
            + (" at most" if self._at_most else ""),
        ]
        if self.strategy.has_personal:
            lines.append("and down once more a round to every client that has trained, to evaluate its own tensors")
        lines.append(f"server mean of updates: {exact[self.strategy.exact]}")
        lines += self._terms()
        lines += ["privacy: none"] if self.privacy is None else [*self.privacy.lines(), *verdict(self.privacy)]
        lines += self._remarks()
        return lines

    @property
    def _at_most(self) -> bool:
        """Whether the run's bytes depend on numbers, and shapes give the most that they may be."""
        grows = self.strategy.accumulates and not self.strategy.exact
        prunes = self.strategy.prunes and bool(self.strategy.setting.ranks)
        return grows or prunes or self.strategy.most_experts > 0

    def _terms(self) -> list[str]:
        """Return what is done beside the strategy's own rule: server optimizer, local terms, schedule, ranks."""
        config, lines = self.config, []
        if config.server.optimizer != "none":
            lines.append(
                f"server optimizer: {config.server.optimizer}, learning rate {learning_rate(config.server):.4g}"
            )
        first = self.strategy.local(1)
        if first.proximal:
            lines.append(f"local term: FedProx, mu {first.proximal:g}")
        if first.penalty:
            lines.append(f"local term: HetLoRA's penalty on the last ranks, lambda {first.penalty:g}")
        if first.scaffold:
            lines.append(
                f"local term: SCAFFOLD, option {first.scaffold}; control variates double the bytes of what is shared"
            )
        shares = [self.strategy.local(number).learning_rate for number in range(1, config.rounds + 1)]
        if len(set(shares)) > 1:
            lines.append(
                f"learning rate by round: {', '.join(f'{config.train.learning_rate * one:.4g}' for one in shares[:10])}"
                + (", ..." if len(shares) > 10 else "")
            )
        ranks = self.strategy.setting.ranks
        if ranks:
            key, whole = METHODS[config.method.name].whole_rank(config)
            shown = ", ".join(map(str, ranks[:20])) + (", ..." if len(ranks) > 20 else "")
            lines.append(
                f"ranks by client{' in round 1, which fall where they are pruned' if self.strategy.prunes else ''}: "
                f"{shown}; what is said of a client above is for {key} = {whole}"
            )
        drawn = [self.strategy.rank(number) for number in range(1, min(config.rounds, 20) + 1)]
        if any(drawn):
            shown = ", ".join(map(str, drawn)) + (", ..." if config.rounds > len(drawn) else "")
            lines.append(f"ranks by round: {shown}; measured and exported with all {config.method.rank}")
        lines += self._blocks()
        if self.strategy.most_experts:
            lines.append(
                f"experts: as many as round 1 shows clusters of clients, 2 to {self.strategy.most_experts}; bytes down "
                "are for the most"
            )
        no_adapter = METHODS[config.method.name].no_adapter
        if no_adapter:
            lines.append(f"no adapter will be written: {no_adapter}")
        if self.strategy.accumulates:
            downs = self.traffic[1]
            lines.append(
                f"what is sent grows by round: {human_bytes(downs[0])} in round 1, "
                f"{human_bytes(downs[-1])} in the last at most"
            )
        return lines

    def _blocks(self) -> list[str]:
        """Return which blocks of the model are trained in turn, of a strategy that trains some in each round."""
        blocks = {spec.block: None for spec in self.specs.values() if spec.block}
        turns = [set(self.strategy.blocks(number)) for number in range(1, self.config.rounds + 1)]
        if not all(turns):
            return []
        counts = [sum(block in turn for turn in turns) for block in blocks]
        line = (
            f"blocks: {len(turns[0])} of {len(blocks)} are trained in a round, each in {min(counts)} to {max(counts)} "
            f"of the {len(turns)} rounds"
        )
        never = [block for block, count in zip(blocks, counts, strict=True) if not count]
        if not never:
            return [line]
        return [line, f"note: with so few rounds {len(never)} blocks are never trained: {', '.join(never)}"]

    def _remarks(self) -> list[str]:
        """Return what is allowed but may surprise."""
        counts, remarks = self.data.label_counts(), []
        lone = np.flatnonzero((counts > 0).sum(1) == 1).tolist() if counts.shape[1] > 1 else []
        if lone:
            shown = ", ".join(map(str, lone[:10])) + (", ..." if len(lone) > 10 else "")
            remarks.append(
                f"note: {len(lone)} of {len(counts)} clients hold rows of one class only ({shown}): alone they learn "
                "to answer it always, and a personal head stays useless for the others"
            )
        if self.config.task == "regression" and len(self.data.corpus.train):
            note = spread_note([value for (value,) in self.data.corpus.train.numbers])
            remarks += [note] if note else []
        declared = self.config.privacy.client_size
        mean = np.mean([len(self.data.training_rows(client)) for client in range(len(counts))])
        if self.privacy is not None and not declared / 2 <= mean <= 2 * declared:
            remarks.append(
                f"note: clients hold {mean:.0f} training rows on average; sample rate, steps, denominators and delta "
                f"go by privacy.client-size = {declared}"
            )
        return remarks


def trained_in_a_round(strategy: Strategy) -> int:
    """Return the most numbers that a client trains in one round."""
    turns = range(1, strategy.period + 1)
    return max(count_parameters(strategy.with_role(number, *TRAINED)) for number in turns)


def _in_turn(roles: Sequence[Role]) -> str:
    """Return a kind's role, or its different roles in the order of rounds."""
    return ", ".join(dict.fromkeys(map(str, roles)))
