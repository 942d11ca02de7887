"""Runs side by side in one process, whose clients train in common packs: the seeds of a sweep's combination.

A pack of one short run leaves a GPU idle most of the time. Runs that differ by their seed alone have the same base
model, method and number of steps, so their clients of a round fit into one pack: each trains as it does in a pack of
its own run, within rounding. What seeds draw otherwise (tensors that are not trained, indices) goes with each client;
runs for which it cannot train one after the other.

Each run has a thread, and one of them works at a time: one that has clients to train waits, and the last one that comes
to wait trains those of all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final
from weakref import WeakKeyDictionary

import numpy as np

from fedlora.config import TrainConfig
from fedlora.engine import ClientResult, ClientWork, Engine, train_pack
from fedlora.engine.fast import set_compile_limits
from fedlora.engine.local import NO_TERMS
from fedlora.engine.work import Arrays
from fedlora.experts import OWN
from fedlora.local_terms import LocalTerms
from fedlora.methods import Method, tensors_digest
from fedlora.privacy.step import PrivateStep

_logger = logging.getLogger(__name__)
_OWN_NUMBERS = 2**20  # that a row under DP has a copy of, at most: beyond it passes have few rows


_digests: WeakKeyDictionary[Method, str] = WeakKeyDictionary()


def _constants(method: Method) -> str:
    """Return a digest of what a method holds fixed; made once, as drawing RandLoRA's bases takes a while."""
    if method not in _digests:
        _digests[method] = tensors_digest(method.constants())
    return _digests[method]


@dataclass
class _Request:
    """What a run asks to train, and what came of it."""

    engine: Engine
    works: Sequence[ClientWork]
    common: Arrays
    config: TrainConfig
    private: PrivateStep | None
    terms: LocalTerms
    shared: frozenset[str]
    done: threading.Event = field(default_factory=threading.Event)
    results: list[ClientResult] = field(default_factory=list)
    error: Exception | None = None

    def key(self) -> tuple[Any, ...]:
        """Return what requests have in common that train in one pack."""
        mechanism = None if self.private is None else self.private.mechanism
        experts = len(self.works[0].fixed.get(OWN, ()))  # padded ones would be chosen by routers
        return (
            *(self.config, mechanism, self.terms, self.shared, tuple(self.works[0].start), experts),
            *(tuple(self.works[0].fixed), tuple(self.common), _constants(self.engine.method)),
        )


@final
class Lockstep:
    """Runs that wait for each other where they train."""

    def __init__(self) -> None:
        self._baton = threading.Lock()  # held by the run that works
        self._alive = 0
        self._waiting: list[_Request] = []
        self._errors: list[Exception] = []

    def run(self, runs: Sequence[Callable[[], None]]) -> None:
        """Run these side by side until all have ended.

        Raises:
            Exception: The first one that a run has raised; the others have ended, too.
        """
        self._alive, self._errors = len(runs), []
        threads = [threading.Thread(target=self._one, args=(each,), daemon=True) for each in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def train(
        self,
        engine: Engine,
        works: Sequence[ClientWork],
        common: Arrays,
        config: TrainConfig,
        private: PrivateStep | None = None,
        *,
        terms: LocalTerms = NO_TERMS,
        shared: frozenset[str] = frozenset(),
    ) -> list[ClientResult]:
        """Train a run's clients with those of the others; arguments as of :func:`fedlora.engine.train_pack`."""
        request = _Request(engine, works, common, config, private, terms, frozenset(shared))
        self._waiting.append(request)
        self._train_all()
        self._baton.release()
        request.done.wait()
        self._baton.acquire()
        if request.error is not None:
            raise request.error.with_traceback(None)  # which would keep the failed pack's tensors
        return request.results

    def _one(self, each: Callable[[], None]) -> None:
        set_compile_limits()  # they hold in the thread that sets them
        with self._baton:
            try:
                each()
            except Exception as error:
                self._errors.append(error)
            finally:
                self._alive -= 1
                self._train_all()

    def _train_all(self) -> None:
        """Train what all runs wait for, if all of them do."""
        if len(self._waiting) < self._alive or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        alike: dict[tuple[Any, ...], list[_Request]] = {}
        for request in waiting:
            alike.setdefault(request.key(), []).append(request)
        for requests in alike.values():
            for together in [requests] if _pays(requests) else [[one] for one in requests]:
                self._train(together)
        for request in waiting:
            request.done.set()

    def _train(self, requests: Sequence[_Request]) -> None:
        """Train clients of several runs in one pack; where that fails, such as for lack of memory, each run's alone.

        Under DP a run pays for a round before it trains: one that another run's clients made fail would pay twice.
        """
        try:
            results = self._trained(requests)
        except Exception as error:
            failure = error.with_traceback(None)
        else:
            for one in requests:
                one.results, results = results[: len(one.works)], results[len(one.works) :]
            return
        if len(requests) == 1:
            requests[0].error = failure
            return
        _logger.warning("%d runs side by side: each trains alone in this round (%s)", len(requests), failure)
        for one in requests:
            self._train([one])

    def _trained(self, requests: Sequence[_Request]) -> list[ClientResult]:
        first = requests[0]
        own = _differing(requests)
        works = [
            replace(work, fixed={**{name: one.common[name] for name in own}, **work.fixed})
            for one in requests
            for work in one.works
        ]
        common = {name: value for name, value in first.common.items() if name not in own}
        private = first.private
        if private is not None:
            private = replace(private, randoms=[r for one in requests if one.private for r in one.private.randoms])
        return train_pack(first.engine, works, common, first.config, private, terms=first.terms, shared=first.shared)


def _differing(requests: Sequence[_Request]) -> list[str]:
    """Return the names of the tensors that are not trained and differ among these runs."""
    first = requests[0].common
    return [
        name
        for name, value in first.items()
        if any(one.common[name] is not value and not _same(one.common[name], value) for one in requests[1:])
    ]


def _same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.shape == other.shape and np.array_equal(one, other)


def _pays(requests: Sequence[_Request]) -> bool:
    """Whether one pack is faster: under DP each row has a copy of what its client has otherwise."""
    if requests[0].private is None:
        return True
    return sum(requests[0].common[name].size for name in _differing(requests)) <= _OWN_NUMBERS
