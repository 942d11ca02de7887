"""Servers of the matrix: every strategy on the matrix's layers, under Flower without its processes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.experts import OWN
from fedlora.methods import Method, TopRanks, WeightDecomposed, as_low_rank, initial_tensors
from fedlora.methods.products import pairs
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server import Federation, FlowerStrategy
from fedlora.server.traffic import ACCUMULATED
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import from_named_arrays
from strategies import STRATEGIES
from tests.support.loop import Arrays, LoopGrid, update_of
from tests.support.matrix import CASES, CONFIGS, method_of, setting

RAGGED = (1, 3, 2, 1, 2)
"""Ranks of five clients, where they differ."""
SERVERS = [
    *((name, method, ()) for name, method in CASES),
    *((name, STRATEGIES[name].methods[0], RAGGED) for name in STRATEGIES if STRATEGIES[name].ragged),
]
servers = pytest.mark.parametrize(
    ("name", "method", "ranks"), SERVERS, ids=["-".join(case[:2]) + "-ragged" * bool(case[2]) for case in SERVERS]
)


def strategy_of(name: str, method: str, ranks: tuple[int, ...] = (), **changes: Any) -> Strategy:
    return STRATEGIES[name](setting(method, ranks=ranks, **changes))


def server_of(
    strategy: Strategy, method: str, state: ServerState | None = None, clients: int = 5, **changes: Any
) -> FlowerStrategy:
    """Return a strategy under Flower, in float64 unless said otherwise, with what it starts with or ``state``."""
    federation = Federation(**{"num_clients": clients, "dtype": "float64", **changes})
    return FlowerStrategy(strategy, federation, state or strategy.initial(seeded_of(method, federation.dtype)))


def seeded_of(method: str, dtype: str = "float64") -> Arrays:
    return dict(initial_tensors(method_of(method).specs(), Seeded(0), dtype))


def run(server: FlowerStrategy, grid: LoopGrid, rounds: int, completed: int = 0) -> Arrays:
    result = server.start(grid, server.arrays, num_rounds=rounds, timeout=1.0, completed=completed)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


def one_round(server: FlowerStrategy, grid: LoopGrid, number: int) -> Arrays:
    """Run a round alone, whatever its number."""
    messages = server.configure_train(number, server.arrays, Any, grid)  # type: ignore[arg-type]
    arrays, _ = server.aggregate_train(number, list(grid.pull_messages(grid.push_messages(messages))))
    assert arrays is not None
    return from_named_arrays(arrays)


def random_state(strategy: Strategy, number: int) -> ServerState:
    """What a server might hold before a round: four ranks where tensors accumulate."""
    held = [4] * len(pairs(strategy.setting.specs)) if strategy.accumulates else []
    stacked = {ACCUMULATED: np.array([np.zeros(len(held)), held])} if held else {}
    return ServerState(
        update_of(99, 7, {**strategy.sent(number), **strategy.accumulated(held)}),
        {**update_of(98, 7, strategy.extra(number)), **stacked},
    )


def saved(state: ServerState) -> ServerState:
    """Return a state as it comes back from a checkpoint."""
    arrays = {name: value.copy() for name, value in state.arrays().items()}
    return ServerState.read(arrays, json.loads(json.dumps(state.clients.record())))


def updates(name: str, tensors: Arrays, method: Method | None = None) -> Arrays:
    """Return Delta W of each layer, [d_out, d_in]: the method's, and what has been stacked beside it.

    Of a weight-decomposed layer it is that of a base weight which is drawn for it. Of experts, which a router mixes:
    the Delta W of each of them, [M, d_out, d_in]. Where each token uses some ranks: what is made of tokens with one
    feature that is not zero.
    """
    method, scale = method or method_of(name), CONFIGS[name].method.alpha / CONFIGS[name].method.rank
    if OWN in tensors:
        layers = [layer for layer, _, _ in pairs(method.specs())]
        return {layer: scale * tensors[f"{layer}.expert_B_all"] @ tensors[f"{layer}.expert_A_all"] for layer in layers}
    factors = method.factors({key: torch.tensor(np.asarray(value)).double() for key, value in tensors.items()})
    added = {layer: as_low_rank(one) for layer, one in factors.items()}
    found = {layer: (one.scaled_b() @ one.A).numpy() for layer, one in added.items() if one is not None}
    for layer, one in factors.items():
        if isinstance(one, TopRanks):
            found[layer] = one.of(torch.eye(one.A.shape[-1], dtype=torch.float64)).mT.numpy()
        if isinstance(one, WeightDecomposed):
            base = Seeded(3).uniform("base", layer, shape=found[layer].shape, bound=1.0)
            before, after = (np.linalg.norm(weight, axis=1) for weight in (base, base + found[layer]))
            found[layer] = ((before + one.magnitude.numpy()) / after)[:, None] * (base + found[layer]) - base
    for layer in found:
        if f"{layer}.residual_A" in tensors:
            found[layer] = found[layer] + scale * tensors[f"{layer}.residual_B"] @ tensors[f"{layer}.residual_A"]
    return found


def kept_by_clients(strategy: Strategy, number: int) -> set[str]:
    """Return the kinds that never leave a client, or never leave the seed."""
    return {kind for kind, role in strategy.all_roles(number).items() if role in (Role.PERSONAL, Role.FROZEN)}
