"""The weighted mean of updates, folded as they arrive; shorter ranks count as padded with zeros."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self, final

import numpy as np
from numpy.typing import NDArray

from fedlora.codec import WireError
from fedlora.exact_sum import ExactSum, check_sizes
from fedlora.exchange import ClientReport, Tensors, Update
from fedlora.reduce.base import Expected, Header, Records, Reduced, Reduction
from fedlora.reduce.check import check_tensors

if TYPE_CHECKING:
    from fedlora.methods import TensorSpec

_SUMS = ("", "extra_")  # of tensors by weight; of what is sent beside them, all clients alike
_SUM_PARTS = ("coarse", "fine", "extra_coarse", "extra_fine")


@final
class WeightedMean(Reduction):
    """A sum of weighted updates that does not depend on their order (:mod:`fedlora.exact_sum`).

    A single update is kept, and crosses the wire, as it is: a sum takes four times the memory of float32.

    Attributes:
        tensors: The weighted sum of the clients' tensors; empty while there is one update only.
        extra: The sum of what they sent beside.
    """

    name = "mean"

    def __init__(self) -> None:
        self.tensors = ExactSum()
        self.extra = ExactSum()
        self._only: tuple[Update, int] | None = None

    @property
    def count(self) -> int:
        """How many clients' updates are in it."""
        return 1 if self._only else self.tensors.count

    def add(self, update: Update, weight: int) -> None:
        """Add one client's update, ``weight`` times."""
        one = WeightedMean()
        check_sizes(update.tensors, weight)
        check_sizes(update.extra, 1)
        one._only = update, weight
        self.merge(one)

    def add_all(self, updates: Sequence[tuple[Update, int]]) -> None:
        """Add several clients' updates, those of the same rank together: that is several times as fast."""
        if len(updates) == 1:
            self.add(*updates[0])
            return
        alike: dict[tuple[tuple[str, tuple[int, ...]], ...], list[tuple[Update, int]]] = {}
        for update, weight in updates:
            shapes = tuple((name, value.shape) for name, value in update.tensors.items())
            alike.setdefault(shapes, []).append((update, weight))
        total = WeightedMean()
        for some in alike.values():
            more = WeightedMean()
            more.tensors = ExactSum.of([(update.tensors, weight) for update, weight in some])
            if some[0][0].extra:
                more.extra = ExactSum.of([(update.extra, 1) for update, _ in some])
            total.merge(more)
        self.merge(total)

    def merge(self, other: WeightedMean) -> None:
        """Add the updates of another node."""
        if not self.count:
            self.tensors, self.extra, self._only = other.tensors.copy(), other.extra.copy(), other._only
            return
        (tensors, extra), (more, more_extra) = self._sums(), other._sums()
        tensors, more = _padded(tensors, more)
        extra, more_extra = _padded(extra, more_extra)
        extra.check(more_extra)  # before either of the two sums is changed
        tensors.merge(more)
        extra.merge(more_extra)
        self.tensors, self.extra, self._only = tensors, extra, None

    def _sums(self) -> tuple[ExactSum, ExactSum]:
        if self._only is None:
            return self.tensors, self.extra
        (update, weight), tensors, extra = self._only, ExactSum(), ExactSum()
        tensors.add(update.tensors, weight)
        if update.extra:
            extra.add(update.extra, 1)
        return tensors, extra

    def encode(self) -> tuple[Records, Header]:
        """Return the only update, or both parts of the sums."""
        if self.count == 0:
            return {}, {}
        if self._only is not None:
            update, weight = self._only
            beside = {"extra": update.extra} if update.extra else {}
            return {"update": update.tensors, **beside}, {"weight": weight, "count": 1}
        records: dict[str, Tensors] = {}
        for prefix, total in zip(_SUMS, (self.tensors, self.extra), strict=True):
            if total.count:
                records |= {f"{prefix}coarse": total.coarse, f"{prefix}fine": total.fine}
        return records, {"weight": self.tensors.weight, "count": self.tensors.count}

    @classmethod
    def decode(cls, records: Records, header: Header) -> Self:
        """Return the mean of :meth:`encode`.

        Raises:
            WireError: A part is missing, or is none of a mean.
        """
        mean = cls()
        weight, count = header.get("weight", 0), header.get("count", 0)
        parts = ("update", "extra") if "update" in records else _SUM_PARTS
        for name in records.keys() - set(parts):
            raise WireError(f"it holds {name[:40]}, which is no part of a mean")
        if "update" in records:
            mean._only = (Update(ClientReport(-1), records["update"], records.get("extra", {})), weight)
            return mean
        for prefix, weights in zip(_SUMS, (weight, count), strict=True):
            coarse, fine = records.get(f"{prefix}coarse"), records.get(f"{prefix}fine")
            if (coarse is None) != (fine is None):
                raise WireError(f"it holds one part of {prefix or 'the '}sum and not the other")
            if coarse is not None and fine is not None:
                total = ExactSum(_float64(coarse), _float64(fine), weights, count)
                mean.tensors, mean.extra = (total, mean.extra) if prefix == "" else (mean.tensors, total)
        return mean

    def check(self, expected: Mapping[int, Expected], dtype: str) -> None:
        """Check the update, or that the sum can be one of these clients' updates.

        Raises:
            WireError: It cannot.
            OverflowError: An update is too large for an exact sum.
        """
        weight = sum(one.weight for one in expected.values())
        if self._only is not None:
            update, claimed = self._only
            if len(expected) != 1:
                raise WireError("it holds one update for several clients")
            (one,) = expected.values()
            check_tensors(update.tensors, one.tensors, dtype)
            check_tensors(update.extra, one.extra, dtype)
            if claimed != weight:
                raise WireError("the weight of its update is not that of its client")
            check_sizes(update.tensors, weight)
            check_sizes(update.extra, 1)
            return
        if self.tensors.count == 0:
            raise WireError("it holds no update")
        _check_sum(self.tensors, _widest(one.tensors for one in expected.values()), weight, len(expected))
        extra = _widest(one.extra for one in expected.values())
        if extra or self.extra.count:
            _check_sum(self.extra, extra, len(expected), len(expected))

    def each(self, clients: Sequence[int]) -> list[tuple[int, Tensors]]:
        """Return the update, where there is one only."""
        return [(clients[0], self._only[0].tensors)] if self._only else []

    def reduced(self) -> Reduced:
        """Return the mean."""
        tensors, extra = self._sums()
        return Reduced(self.count, tensors.mean(), extra.mean() if extra.count else {})


def _float64(tensors: Tensors) -> dict[str, NDArray[np.float64]]:
    """Return the tensors as what they must be.

    Raises:
        WireError: One is of another dtype.
    """
    found: dict[str, NDArray[np.float64]] = {}
    for name, value in tensors.items():
        if value.dtype != np.float64:
            raise WireError(f"the sum of {name} has dtype {value.dtype}, not float64")
        found[name] = value.astype(np.float64, copy=False)
    return found


def _check_sum(total: ExactSum, expected: Mapping[str, TensorSpec], weight: int, count: int) -> None:
    check_tensors(total.coarse, expected, "float64")
    check_tensors(total.fine, expected, "float64")
    if (total.weight, total.count) != (weight, count):
        raise WireError("the weight of its sum is not that of its clients")
    if not total.is_sound():
        raise WireError("its sum cannot come from that many updates")


def _widest(specs: Iterable[Mapping[str, TensorSpec]]) -> dict[str, TensorSpec]:
    """Return for each tensor the shape that holds it at every client's rank; clients of one rank share their specs."""
    widest: dict[str, TensorSpec] = {}
    for own in {id(one): one for one in specs}.values():
        for name, spec in own.items():
            shape = widest[name].shape if name in widest else spec.shape
            widest[name] = replace(spec, shape=tuple(map(max, spec.shape, shape)))
    return widest


def _padded(one: ExactSum, other: ExactSum) -> tuple[ExactSum, ExactSum]:
    """Return two sums of the same shapes, the smaller of each pair of tensors padded with zeros."""
    if not (one.count and other.count):
        return one, other
    assert one.coarse.keys() == other.coarse.keys(), "sums of different tensors"
    shapes = {name: tuple(map(max, one.coarse[name].shape, other.coarse[name].shape)) for name in one.coarse}
    return one.padded(shapes), other.padded(shapes)
