"""The two Flower apps of :mod:`benchmarks.message_path`: this project's own way of a client's update, and Flower's.

Both exchange an adapter of 786,432 float32 numbers in 96 tensors (RoBERTa-large, rank 8 on query and value), and
compute nothing: a client's update is there when it is asked for.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

if TYPE_CHECKING:
    from fedlora.engine import ClientResult, ClientWork, Engine

TENSORS, NUMBERS = 96, 786_432
_UPDATES = 8  # different ones; clients take them in turn

_PROCESSES = {"ray::ClientA": "client_app", "ray::Trainer": "trainer"}

our_server = ServerApp()
flower_server = ServerApp()
flower_client = ClientApp()


# -- this project's way: all parts of a run but the training itself -----------------------------------


@cache
def _updates(names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Return a few updates of trained tensors, made once a process."""
    rng = np.random.default_rng(0)
    return [
        {
            name: (0.05 * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in zip(names, shapes, strict=True)
        }
        for _ in range(_UPDATES)
    ]


def without_arithmetic(
    engine: Engine, works: Sequence[ClientWork], common: Any, config: Any, private: Any = None, **_: Any
) -> list[ClientResult]:
    """Return results as :func:`fedlora.engine.train_pack` does, which were there before."""
    from fedlora.engine import ClientResult

    start = works[0].start
    ready = _updates(tuple(start), tuple(value.shape for value in start.values()))
    return [
        ClientResult(work.client, ready[work.client % _UPDATES], work.num_examples, len(work.batches), 0.5, "")
        for work in works
    ]


@our_server.main()
def run_ours(grid: Grid, context: Context) -> None:
    """Run rounds on trainers that do not train."""
    import ray

    from clients.limits import SiteLimits
    from clients.pool import TrainerPool, machines
    from clients.shards import plan_shards
    from clients.site import Job
    from fedlora.server import FlowerStrategy
    from simulations.dealing import DealtNodes
    from simulations.session import check_trainers
    from simulations.setup import federation_of, resolve, settle
    from strategies.build import build_strategy

    own = {key: value for key, value in context.run_config.items() if not key.startswith("bench.")}
    nodes = _nodes(grid)
    while not ray.is_initialized():
        time.sleep(0.1)
    config, data = settle(resolve(own), nodes)
    job = Job(config.to_flat(), data, SiteLimits(str(Path(str(context.run_config["bench.out"])).parent)))
    shards = plan_shards(machines(), config.engine.trainers)
    pool = TrainerPool.start(context.run_id, shards, job, train=without_arithmetic)
    try:
        specs = check_trainers(pool, config)
        strategy = build_strategy(config, specs.specs)
        dealt = DealtNodes(pool, config.engine.pack, dict.fromkeys(range(len(data.clients)), 1.0))
        flower = FlowerStrategy(strategy, federation_of(config), strategy.initial(specs.initial(config)), dealt)
        watch = Watch(len(pool), nodes)
        flower.start(grid, flower.arrays, num_rounds=config.rounds, on_round=watch.round_of(flower))
    finally:
        pool.stop()
    watch.write(str(context.run_config["bench.out"]))


# -- Flower's way: FedAvg, one message a client ---------------------------------------------------------


@flower_client.train()
def answer(message: Message, context: Context) -> Message:
    """Return the arrays that came, as a client's update."""
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    content = {"arrays": ArrayRecord(arrays.to_numpy_ndarrays()), "metrics": MetricRecord({"num-examples": 4})}
    return Message(RecordDict(content), reply_to=message)


@flower_server.main()
def run_flower(grid: Grid, context: Context) -> None:
    """Run Flower's own FedAvg over all its SuperNodes."""
    nodes = _nodes(grid)
    watch = Watch(0, nodes)
    initial = ArrayRecord([np.zeros(NUMBERS // TENSORS, np.float32) for _ in range(TENSORS)])

    def on_round(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        watch.mark()
        return MetricRecord({"round": server_round})

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    strategy.start(grid, initial, num_rounds=int(str(context.run_config["rounds"])), evaluate_fn=on_round)
    watch.write(str(context.run_config["bench.out"]))


# -- what both measure ----------------------------------------------------------------------------------


class Watch:
    """Seconds of rounds after the first, by the clock and of all CPUs, and the server's largest memory in them.

    Of memory there are two: what the process holds, with all that its allocator keeps, and what of it is in use
    (without small Python objects, which are not the allocator's).
    """

    def __init__(self, trainers: int, nodes: int) -> None:
        self.trainers, self.nodes = trainers, nodes
        self.marks: list[float] = []
        self.cpu: list[dict[str, float]] = []
        self.clients: list[int] = []
        self.bytes = self.in_use = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            if len(self.marks) > 1:
                self.bytes = max(self.bytes, process.memory_info().rss)
                self.in_use = max(self.in_use, sum(psutil.heap_info()))
            time.sleep(0.005)

    def mark(self) -> None:
        """Take the time after a round, and after round 0."""
        self.marks.append(time.monotonic())
        own, used = psutil.Process(), dict[str, float]()
        for process in (own, *own.children(recursive=True)):
            name = "server" if process == own else _PROCESSES.get(process.name()[:12], "ray")
            times = process.cpu_times()
            used[name] = used.get(name, 0.0) + times.user + times.system
        self.cpu.append(used)

    def round_of(self, flower: Any) -> Callable[[int, Result], None]:
        """Return what is called after a round, and checks that every client's update was used."""

        def on_round(number: int, result: Result) -> None:
            self.mark()
            if number:
                metrics = result.train_metrics_clientapp[number]
                assert not metrics["clients_refused"], flower.replies.refused
                self.clients.append(int(metrics["clients_ok"]))  # type: ignore[arg-type]

        return on_round

    def write(self, path: str) -> None:
        """Write what was seen."""
        seconds = [after - before for before, after in itertools.pairwise(self.marks)][1:]
        first, last = self.cpu[1], self.cpu[-1]
        cpu = {name: (last[name] - first.get(name, 0.0)) / len(seconds) for name in last}
        seen = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "server_bytes": self.bytes,
            "server_bytes_in_use": self.in_use,
            "trainers": self.trainers,
            "nodes": self.nodes,
        }
        Path(path).write_text(json.dumps(seen | {"clients_ok": self.clients}))


def _nodes(grid: Grid) -> int:
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.1)
    return len(nodes)
