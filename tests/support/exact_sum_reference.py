"""The slow, readable arithmetic that :mod:`fedlora.exact_sum` must equal: one term at a time, two roundings.

Floating-point addition is not associative, so a mean folded in order of arrival changes its last bits
from run to run. Here every term is split into a coarse and a fine part on two fixed grids
(pre-rounding, Demmel & Nguyen, ARITH 2013). Sums of grid points are exact in float64 as long as they stay
below 2**53 grid steps, so they commute, and partial sums made on different machines may be merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors

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

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Return the weighted mean of every tensor, in float64."""
        assert self.weight > 0, "the mean of nothing"
        return {name: (self.coarse[name] + self.fine[name]) / self.weight for name in self.coarse}
