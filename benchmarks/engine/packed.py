"""fedlora's own way: whole rounds through ``train_pack``, from the clients' arrays to their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from benchmarks.engine.jobs import Arrays, Job, start_tensors
from benchmarks.engine.shapes import Shape, base_of, twin
from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.engine.fast import settle
from fedlora.experts import OWN
from fedlora.methods import METHODS as REGISTERED
from fedlora.methods import Method, build_method
from fedlora.plugins import usual_strategy
from fedlora.privacy import Mechanism, PrivateRandom
from fedlora.privacy.step import PrivateStep
from fedlora.strategy import Setting
from strategies import STRATEGIES

_TRAIN: dict[str, dict[str, Any]] = {
    "lora-pro": {"gradient": "lora-pro"},
    "allora": {"gradient": "allora"},
    "lora+": {"b_rate_ratio": 16.0},
}
METHODS = (*REGISTERED, "ffa-lora", *_TRAIN)
_LEAST_RANK = 2  # of clients of unlike ranks
OWN_RANKS = {"vera": 256, "randlora": 32, "flylora": 32, "lora-sb": 64}
"""Ranks of methods that are not meant for that of LoRA."""


def own_method(method: str) -> str:
    """Return the method of the engine that trains one of ``METHODS``.

    LoRA does where A is fixed (``ffa-lora``), or the gradient is taken in another way or B has a rate of its own.
    """
    return method if method in REGISTERED else "lora"


def config_of(method: str, rank: int) -> Config:
    """Return the configuration of a method: alpha = 2 r for those of LoRA's rank, else as it comes.

    Args:
        method: The method, see :func:`own_method`.
        rank: That of LoRA.
    """
    if method in ("lora", "mos", "s2-lora"):
        return Config(method=MethodConfig(method, rank=rank, alpha=2.0 * rank))
    return Config(method=MethodConfig(method, rank=OWN_RANKS.get(method, rank)))


def engine_of(model: Any, shape: Shape, method: str, rank: int, *, fast: bool) -> Engine:
    """Return the engine of a method on the weights of a model that others use too.

    Args:
        model: The model.
        shape: Its shape.
        method: The method, see :func:`own_method`.
        rank: Of the method.
        fast: Whether it computes as a trainer's does; compiled blocks take a minute, and ranks, roles and privacy share
            them. Else it is the plain reference.
    """
    base = base_of(twin(model), shape)
    built = build_method(config_of(method, rank), base.structure.adapted, base.structure.head)
    engine = Engine.build(base, built, shape.built_task())
    return settle(engine, start_tensors(built)) if fast else engine


@final
class Packed:
    """What trains packs of a method.

    Args:
        engine: Its engine (:func:`engine_of`).
        method: One of ``METHODS``.
        rank: Of the method.
        ragged: Whether clients have ranks from 2 up to ``rank``, in turn.
        noise: DP-SGD with this noise multiplier; None: without privacy.
    """

    def __init__(
        self, engine: Engine, method: str, rank: int, *, ragged: bool = False, noise: float | None = None
    ) -> None:
        self.engine = engine
        built = engine.method
        start = start_tensors(built)
        self._changes = _TRAIN.get(method, {})
        strategy = STRATEGIES[method if method in STRATEGIES else usual_strategy(own_method(method))]
        trains = strategy(Setting(built.specs())).trained_kinds
        fixed = {name for name, spec in built.specs().items() if spec.kind not in trains}
        self.common: Arrays = {name: start[name] for name in fixed}
        if OWN in fixed:  # the first expert is every client's
            self.common[OWN] = np.eye(len(start[OWN]), dtype=start[OWN].dtype)[0]
        trained = {name: value for name, value in start.items() if name not in fixed}
        ranks = range(min(_LEAST_RANK, rank), rank + 1) if ragged else [rank]
        self.starts: list[Arrays] = [_cut(built, trained, one) if ragged else trained for one in ranks]
        self.noise = noise

    @property
    def numbers(self) -> int:
        """Trained numbers of a client, of the largest rank."""
        return sum(value.size for value in self.starts[-1].values())

    def round(self, job: Job, *, only: int | None = None, noisy: bool = True) -> NDArray[np.float64]:
        """Train a round of equal rows; return each client's mean loss.

        Args:
            job: The round.
            only: Train this client alone.
            noisy: Whether there is noise under DP.
        """
        works = job.works(self.starts)
        return self.train(works if only is None else [works[only]], job.train, noisy=noisy)

    def train(self, works: Sequence[ClientWork], train: TrainConfig, *, noisy: bool = True) -> NDArray[np.float64]:
        """Train clients for a round; return each one's mean loss.

        Args:
            works: What each does.
            train: Local training.
            noisy: Whether there is noise under DP.
        """
        private, train = None, replace(train, **self._changes)
        if self.noise is not None:
            noise, steps = self.noise if noisy else 0.0, max(len(work.batches) for work in works)
            mechanism = Mechanism(noise, 1.0, sample_rate=0.1, expected_batch_size=train.batch_size, steps=steps)
            private = PrivateStep(mechanism, [PrivateRandom() for _ in works])
        results = train_pack(self.engine, works, self.common, train, private)
        faults = [result.error for result in results if result.error]
        if faults:
            raise ValueError(f"{len(faults)} of {len(results)} clients: {faults[0]}")
        return np.array([result.loss for result in results])


def _cut(method: Method, tensors: Arrays, rank: int) -> Arrays:
    """Return tensors as a client of a smaller rank holds them."""
    axes = {name: spec.rank_axis for name, spec in method.specs().items()}
    return {
        name: value if axes[name] is None else np.ascontiguousarray(value.take(range(rank), axes[name]))
        for name, value in tensors.items()
    }
