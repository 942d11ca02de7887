"""A simulation's evaluator: the clients' trainers, which have every client's rows and the server's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from clients.pool import TrainerPool
from clients.shards import MOST_CLIENTS, Pack, deal, spread_rows
from clients.site import Speed
from fedlora.exchange import Instruction, Tensors
from fedlora.generated import Answer
from fedlora.roles import Role
from fedlora.server.personal import Sums
from fedlora.strategy import Strategy
from simulations.scores import sums_of


@final
class TrainerEvaluator:
    """Measures and exports on all trainers side by side.

    Args:
        pool: The trainers, at work on the run.
        pack: Clients evaluated together; 0: automatic.
        strategy: Says which rank and expert each client has.
        most: Clients of a pack of an automatic size, at most.
    """

    def __init__(self, pool: TrainerPool, pack: int, strategy: Strategy, most: int = MOST_CLIENTS) -> None:
        self.pool, self.pack, self.strategy, self.most = pool, pack, strategy, most

    def at(self, strategy: Strategy) -> TrainerEvaluator:
        """Return the evaluator of clients as the strategy has them after another round."""
        return TrainerEvaluator(self.pool, self.pack, strategy, self.most)

    def facts(self, tensors: Tensors, split: str, rows: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Return facts of each of these rows of a split under the server's tensors, by name, [rows] each."""
        packs, shares = self._shares(len(rows))
        parts = self.pool.results(
            lambda worker, item: worker.evaluate(*item),
            [(tensors, split, [rows[at] for at in share]) for share in shares],
            packs=packs,
        )
        facts = {name: np.zeros(len(rows)) for name in parts[0]}
        for share, part in zip(shares, parts, strict=True):
            for name, values in part.items():
                facts[name][share] = values
        return facts

    def personal(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int], split: str = ""
    ) -> dict[int, Sums]:
        """Return the sums of the facts of clients' rows under their own models, as they start a round.

        Args:
            tensors: What the server sends.
            roles: Roles of the round.
            server_round: The round that the clients would start.
            clients: The clients.
            split: Evaluate each on all rows of this split; empty: on those that it holds out.
        """
        packs = self._packs(clients)
        items = [(self._instruction(tensors, roles, server_round, pack.clients), split) for pack in packs]
        parts = self.pool.results(lambda worker, item: worker.evaluate_personal(*item), items, packs=packs)
        return {report.client: sums_of(report) for part in parts for report in part}

    def answers(self, tensors: Tensors, split: str, rows: Sequence[int]) -> list[Answer]:
        """Return what the server's model writes for each of these rows of a split."""
        packs, shares = self._shares(len(rows))
        parts = self.pool.results(
            lambda worker, item: worker.answers(*item),
            [(tensors, split, [rows[at] for at in share]) for share in shares],
            packs=packs,
        )
        written: dict[int, Answer] = {}
        for share, part in zip(shares, parts, strict=True):
            written |= dict(zip((rows[at] for at in share), part, strict=True))
        return [written[row] for row in rows]

    def answers_personal(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, counts: Mapping[int, int]
    ) -> list[Answer]:
        """Return what clients' own models write for the first rows that each holds out, so many of each client."""
        packs = self._packs(list(counts))
        items = [
            (
                self._instruction(tensors, roles, server_round, pack.clients),
                [counts[client] for client in pack.clients],
            )
            for pack in packs
        ]
        parts = self.pool.results(lambda worker, item: worker.answers_personal(*item), items, packs=packs)
        own: dict[int, Sequence[Answer]] = {}
        for pack, part in zip(packs, parts, strict=True):
            ends = np.cumsum([counts[client] for client in pack.clients])
            own |= {client: part[end - counts[client] : end] for client, end in zip(pack.clients, ends, strict=True)}
        return [answer for client in sorted(own) for answer in own[client]]

    def export(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int] = ()
    ) -> list[dict[str, bytes]]:
        """Return the files of a PEFT adapter for the server's tensors, or one for each of ``clients``."""
        if not clients:
            return self.pool.results(lambda worker, server: worker.export(server), [tensors])
        items = [self._instruction(tensors, roles, server_round, (client,)) for client in clients]
        return self.pool.results(lambda worker, item: worker.export_personal(item)[0], items)

    def probe(self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int]) -> Speed:
        """Return how fast a trainer trains and evaluates a few rows of a pack of these clients."""
        pack = self._packs(clients)[0]
        item = self._instruction(tensors, roles, server_round, pack.clients)
        (speed,) = self.pool.results(lambda worker, item: worker.probe(item), [item], packs=[pack])
        return speed

    def _packs(self, clients: Sequence[int]) -> list[Pack]:
        """Return packs of clients, dealt to the trainers that are there."""
        return [replace(pack, work=0.0) for pack in deal(clients, self.pack, self.pool.shares(), most=self.most)]

    def _shares(self, rows: int) -> tuple[list[Pack], list[list[int]]]:
        """Return the places of the rows that trainers evaluate, and who does each part."""
        shares = spread_rows(rows, self.pool.shares())
        able = [(Pack(trainer, ()), share) for trainer, share in enumerate(shares) if share]
        return [pack for pack, _ in able], [share for _, share in able]

    def _instruction(
        self, tensors: Tensors, roles: Mapping[str, Role], server_round: int, clients: Sequence[int]
    ) -> Instruction:
        held = self.strategy.held
        ranks = tuple(held[client] for client in clients) if held else ()
        experts = self.strategy.experts(clients)
        return Instruction(server_round, tuple(clients), dict(roles), tensors, ranks=ranks, experts=experts)


def describe(pool: TrainerPool) -> list[dict[str, Any]]:
    """Return what each trainer reports of itself, for ``trainers.json``."""
    kept = ("device", "threads", "host", "pid", "base_loads", "digest")
    described = {(one.host, one.pid): one for one in pool.everywhere(lambda worker, _: worker.describe())}
    return [
        {"trainer": number, "node": one.node, "tokens_per_s": one.speed or None}
        | {key: getattr(described[one.host, one.pid], key) for key in kept}
        for number, one in enumerate(pool.standings())
        if (one.host, one.pid) in described
    ]
