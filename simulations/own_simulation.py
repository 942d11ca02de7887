"""Flower's simulation process on a Ray cluster of several machines, with Flower's own actors on this machine alone.

Flower spreads the actors that run ClientApps over the cluster, and uses one that was lost with its machine again and
again. They are thin, and need the app's bundle, which is on this machine: here they are kept, and trainers, which
need GPUs, are spread.

It runs as a file, not as a module of this package: what the process imports of the package is the bundle's.
"""

from __future__ import annotations

import os
import sys
from typing import Any, final

import ray
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.app import flwr_simulation
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_COMMAND = "flwr-simulation"
_MOST = 4  # ClientApps side by side: each waits for trainers most of the time


@final
class PoolHere(BasicActorPool):
    """Flower's pool of actors, all of them on this machine, whatever CPUs the cluster says it has."""

    def __init__(self, actor_type: Any, client_resources: dict[str, Any], actor_kwargs: dict[str, Any]) -> None:
        super().__init__(actor_type, {"num_cpus": 1}, actor_kwargs)  # which any cluster has
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.create_actor_fn = lambda: actor_type.options(num_cpus=0, scheduling_strategy=here).remote(**actor_kwargs)
        self.actors_capacity = max(1, min(_MOST, os.cpu_count() or 1))


def main() -> None:
    """Run a simulation with the arguments of ``flwr-simulation``."""
    sys.argv[0] = _COMMAND  # by which Flower knows what it is
    raybackend.BasicActorPool = PoolHere  # type: ignore[attr-defined]
    flwr_simulation()


if __name__ == "__main__":
    main()
