"""Strategies whose clients train some of an adapter's modules each, on top of all the others as the server has them.

A module is one place of the method's rank axes: a rank of LoRA, a head of Ravan. Which of them a client trains in a
round is drawn from the run's seed by round and client, one set for all layers; no data has a part in it, so it is free
under DP. The server averages each module over the clients that have trained it; one that nobody has trained stays as it
was. Updates are kept apart until the round's end, and clients keep nothing.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import replace

import numpy as np

from fedlora.exact_sum import ExactSum
from fedlora.reduce import Reduced
from fedlora.seeded import Seeded
from fedlora.shapes import spread
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy


class SomeModules(Strategy, ABC):
    """Clients train as many modules as their rank says, others in each round."""

    ragged = True
    folds = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._whole = setting.whole
        self._some = min(setting.ranks, default=self._whole) < self._whole
        if self._some:  # a client has no part in the mean of a module that it has not trained
            self.exact = False

    def modules(self, server_round: int, client: int) -> tuple[int, ...]:
        """Return the modules that a client trains, as many as its rank; none where all clients train all of them."""
        if not self._some:
            return ()
        order = Seeded(self.setting.config.seed).permutation("modules", server_round, client, size=self._whole)
        return tuple(sorted(order[: self.setting.rank(client)].tolist()))

    def reduction(self, server_round: int) -> str:
        """Return the reduction that keeps updates apart."""
        return "one-by-one"

    def apply(self, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        """Return the mean of each module over the clients that have trained it, and that of the head over all."""
        trained, total, weight_r = self.expected(server_round), ExactSum(), np.zeros(self._whole)
        for one in reduced.updates:
            modules = self.modules(server_round, one.client)
            weight_r[list(modules or range(self._whole))] += one.weight
            whole = {
                name: spread(one.tensors[name], spec.shape, spec.rank_axis, modules)
                for name, spec in trained.items()
                if name in state.tensors
            }
            total.add(whole, one.weight)
        tensors = dict(state.tensors)
        for name, value in total.total().items():
            axis, held = trained[name].rank_axis, tensors[name].astype(np.float64)
            shape = [-1 if at == axis else 1 for at in range(held.ndim)]
            weight = np.float64(total.weight) if axis is None else weight_r.reshape(shape)
            tensors[name] = np.divide(value, weight, out=held, where=weight > 0)
        return replace(state, tensors=tensors)
