"""Weighted sums that do not depend on the order in which their terms arrive.

Floating-point addition is not associative, so a mean folded in order of arrival changes its last bits
from run to run. Here every term is split into a coarse and a fine part on two fixed grids
(pre-rounding, Demmel & Nguyen, ARITH 2013). Sums of grid points are exact in float64 as long as they stay
below 2**53 grid steps, so they commute, and partial sums made on different machines may be merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors
from fedlora.shapes import pad

_COARSE = 2.0**-16
_FINE = 2.0**-50  # a mean with weights >= 1 is off by at most 2**-51
_LIMIT = 2.0**36
_MAX_TERMS = 2**18


def _round_to(x: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """Return ``x`` rounded to multiples of ``step`` (a power of two, so both products are exact)."""
    return np.rint(x / step) * step


def weighted(name: str, value: NDArray[np.floating], weight: int) -> NDArray[np.float64]:
    """Return ``weight * value`` in float64.

    Raises:
        OverflowError: A number of it is too large to be summed exactly, or not finite.
    """
    if not np.isfinite(value).all():
        raise OverflowError(f"{name} holds NaN or infinity")
    with np.errstate(over="ignore"):
        term = np.asarray(value, dtype=np.float64) * float(weight)
    _check_range(name, term)
    return term


def check_sizes(tensors: Tensors, weight: int) -> None:
    """Check that tensors can be summed, ``weight`` times.

    Raises:
        OverflowError: A number is too large for an exact sum, or not finite.
    """
    for name, value in tensors.items():
        weighted(name, value, weight)


def _check_range(name: str, x: NDArray[np.float64]) -> None:
    if x.size and not np.max(np.abs(x)) < _LIMIT:  # NaN is not below it either
        raise OverflowError(f"the weighted sum of {name} passed {_LIMIT:.0f}: updates of this size diverge")


@dataclass
class ExactSum:
    """A sum of ``weight * tensors`` over clients, together with the sum of the weights.

    Attributes:
        coarse: Name to float64 array on the coarse grid.
        fine: Name to float64 array on the fine grid.
        weight: Sum of the weights (whole numbers).
        count: How many clients' tensors are inside.
    """

    coarse: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    fine: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    weight: int = 0
    count: int = 0

    def add(self, tensors: Tensors, weight: int) -> None:
        """Add one client's ``tensors``, ``weight`` (1 or more, e.g. its number of examples) times.

        Raises:
            OverflowError: A number is too large for the sum to stay exact, or not finite; nothing was added.
        """
        assert weight >= 1, "a client without weight is left out, not added"
        coarse: dict[str, NDArray[np.float64]] = {}
        fine: dict[str, NDArray[np.float64]] = {}
        for name, value in tensors.items():
            term = weighted(name, value, weight)
            coarse[name] = _round_to(term, _COARSE)
            fine[name] = _round_to(term - coarse[name], _FINE)
        self.merge(ExactSum(coarse, fine, weight, 1))

    def check(self, other: ExactSum) -> None:
        """Check that the partial sum ``other`` may be added.

        Raises:
            OverflowError: The sum would leave the range in which it is exact.
        """
        if self.count + other.count > _MAX_TERMS:
            raise OverflowError(f"more than {_MAX_TERMS} clients in one sum")
        assert not self.count or not other.count or self.coarse.keys() == other.coarse.keys(), "of different tensors"
        for name, coarse in other.coarse.items():
            _check_range(name, self.coarse[name] + coarse if self.count else coarse)

    def merge(self, other: ExactSum) -> None:
        """Add the partial sum ``other``, tensor by tensor: no more than one of them is held twice.

        Raises:
            OverflowError: The sum would leave the range in which it is exact; nothing was added.
        """
        self.check(other)
        for mine, its in ((self.coarse, other.coarse), (self.fine, other.fine)):
            for name, value in its.items():
                mine[name] = mine[name] + value if self.count else value
        self.weight += other.weight
        self.count += other.count

    def copy(self) -> ExactSum:
        """Return a sum to which others can be added without this one."""
        return ExactSum(dict(self.coarse), dict(self.fine), self.weight, self.count)

    def padded(self, shapes: Mapping[str, tuple[int, ...]]) -> ExactSum:
        """Return the sum with zeros behind its tensors up to larger shapes; itself where it has these."""
        if all(value.shape == shapes[name] for name, value in self.coarse.items()):
            return self
        coarse, fine = ({n: pad(value, shapes[n]) for n, value in part.items()} for part in (self.coarse, self.fine))
        return ExactSum(coarse, fine, self.weight, self.count)

    def is_sound(self) -> bool:
        """Whether both parts are what sums of this many terms can be (another machine may have sent them)."""
        bound = self.count * _COARSE / 2
        return 1 <= self.count <= min(self.weight, _MAX_TERMS) and all(
            np.array_equal(_round_to(value, step), value) and np.all(np.abs(value) <= limit)
            for parts, step, limit in ((self.coarse, _COARSE, _LIMIT), (self.fine, _FINE, bound))
            for value in parts.values()
        )

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Return the weighted mean of every tensor, in float64."""
        assert self.weight > 0, "the mean of nothing"
        return {name: (self.coarse[name] + self.fine[name]) / self.weight for name in self.coarse}
