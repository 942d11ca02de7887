"""A small server in float64 on two layers that are not square, and nodes that fail."""

from __future__ import annotations

from typing import Any

from flwr.app import Message

from fedlora.methods import Head, Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server import Federation, FlowerStrategy
from fedlora.server.replies import Replies
from fedlora.strategy import Setting, Specs, Strategy
from fedlora.wire import (
    from_named_arrays,
)
from tests.support.loop import Arrays, LoopGrid

LAYERS = [Layer("a", 6, 10, bias=True, fan_in_fan_out=False), Layer("b", 8, 4, bias=False, fan_in_fan_out=True)]
SPECS = Head(Lora(LAYERS, rank=2, alpha=4.0, rslora=False), [Layer("head", 4, 3, True, False)]).specs()


def server_of(
    kind: type[Strategy], clients: int = 4, *, specs: Specs = SPECS, head: Role = Role.SHARED, **changes: Any
) -> FlowerStrategy:
    federation = Federation(**{"num_clients": clients, "dtype": "float64", **changes})
    strategy = kind(Setting(specs, head))
    return FlowerStrategy(strategy, federation, strategy.initial(initial_tensors(specs, Seeded(0), federation.dtype)))


def one_round(server: FlowerStrategy, grid: LoopGrid) -> Arrays:
    result = server.start(grid, server.arrays, num_rounds=1, timeout=1.0)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


def replies_of(server: FlowerStrategy) -> Replies:
    """The last round's replies."""
    assert server.replies is not None
    return server.replies


def failing(_message: Message) -> Exception:
    return RuntimeError("out of memory")


def silent(_message: Message) -> None:
    return None
