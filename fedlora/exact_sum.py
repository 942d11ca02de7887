"""Weighted sums that do not depend on the order in which their terms arrive.

Floating-point addition is not associative, so a mean folded in order of arrival changes its last bits
from run to run. Here every term is split into a coarse and a fine part on two fixed grids
(pre-rounding, Demmel & Nguyen, ARITH 2013). Sums of grid points are exact in float64 as long as they stay
below 2**53 grid steps, so they commute, and partial sums made on different machines may be merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedlora.block_sum import COARSE, FINE, MOST, Flat, TooLargeError, block_sums
from fedlora.exchange import Tensors
from fedlora.shapes import pad

_LIMIT = 2.0**36
_MAX_TERMS = 2**18


def check_sizes(tensors: Tensors, weight: int) -> None:
    """Check that tensors can be summed, ``weight`` times.

    Raises:
        OverflowError: A number is too large for an exact sum, or not finite.
    """
    for name, value in tensors.items():
        largest = _largest(value)
        if not math.isfinite(largest):
            raise OverflowError(f"{name} holds NaN or infinity")
        if not largest * weight < _LIMIT:
            raise OverflowError(_passed(name))


def _largest(value: NDArray[np.floating]) -> float:
    """Return the largest absolute number; NaN where there is one."""
    return max(float(np.max(value)), -float(np.min(value))) if value.size else 0.0


def _passed(name: str) -> str:
    return f"the weighted sum of {name} passed {_LIMIT:.0f}: updates of this size diverge"


@dataclass
class ExactSum:
    """A sum of ``weight * tensors`` over clients, together with the sum of the weights.

    Attributes:
        coarse: Name to float64 array on the coarse grid.
        fine: Name to float64 array on the fine grid.
        weight: Sum of the weights (whole numbers).
        count: How many clients' tensors are inside.
        owned: Whether the arrays are its own alone, so that others are added in place.
    """

    coarse: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    fine: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    weight: int = 0
    count: int = 0
    owned: bool = False

    @classmethod
    def of(cls, terms: Sequence[tuple[Tensors, int]]) -> ExactSum:
        """Return the sum of several clients' tensors, all of the same names and shapes, by their weights.

        Args:
            terms: Each client's tensors and weight (1 or more, e.g. its number of examples).

        Raises:
            OverflowError: A number is too large for the sum to stay exact, or not finite.
        """
        assert terms, "the sum of nothing"
        names = list(terms[0][0])
        shapes = {name: np.shape(value) for name, value in terms[0][0].items()}
        total = cls()
        for at in range(0, len(terms), MOST):
            some = terms[at : at + MOST]
            assert all(weight >= 1 for _, weight in some), "a client without weight is left out, not added"
            try:
                parts = block_sums([([one[name] for name in names], weight) for one, weight in some], _LIMIT)
            except TooLargeError:
                for one, weight in some:
                    check_sizes(one, weight)
                raise OverflowError(_passed(names[0])) from None
            coarse, fine = (_named(part, shapes) for part in parts)
            more = cls(coarse, fine, sum(weight for _, weight in some), len(some), owned=True)
            total.check(more)
            if total.count:
                total.merge(more)
            else:
                total = more
        return total

    def add(self, tensors: Tensors, weight: int) -> None:
        """Add one client's ``tensors``, ``weight`` (1 or more, e.g. its number of examples) times.

        Raises:
            OverflowError: A number is too large for the sum to stay exact, or not finite; nothing was added.
        """
        self.merge(ExactSum.of([(tensors, weight)]))

    def check(self, other: ExactSum) -> None:
        """Check that the partial sum ``other`` may be added.

        Raises:
            OverflowError: The sum would leave the range in which it is exact.
        """
        if self.count + other.count > _MAX_TERMS:
            raise OverflowError(f"more than {_MAX_TERMS} clients in one sum")
        assert not self.count or not other.count or self.coarse.keys() == other.coarse.keys(), "of different tensors"
        for name, coarse in other.coarse.items():
            if not _largest(self.coarse[name] + coarse if self.count else coarse) < _LIMIT:
                raise OverflowError(_passed(name))

    def merge(self, other: ExactSum) -> None:
        """Add the partial sum ``other``, tensor by tensor: no more than one of them is held twice.

        Raises:
            OverflowError: The sum would leave the range in which it is exact; nothing was added.
        """
        self.check(other)
        for mine, its in ((self.coarse, other.coarse), (self.fine, other.fine)):
            for name, value in its.items():
                if not self.count:
                    mine[name] = value
                elif self.owned:
                    np.add(mine[name], value, out=mine[name])
                else:
                    mine[name] = mine[name] + value
        self.owned = self.owned or self.count > 0
        self.weight += other.weight
        self.count += other.count

    def copy(self) -> ExactSum:
        """Return a sum to which others can be added without this one."""
        self.owned = False  # both have the same arrays now
        return ExactSum(dict(self.coarse), dict(self.fine), self.weight, self.count)

    def padded(self, shapes: Mapping[str, tuple[int, ...]]) -> ExactSum:
        """Return the sum with zeros behind its tensors up to larger shapes; itself where it has these."""
        if all(value.shape == shapes[name] for name, value in self.coarse.items()):
            return self
        coarse, fine = ({n: pad(value, shapes[n]) for n, value in part.items()} for part in (self.coarse, self.fine))
        return ExactSum(coarse, fine, self.weight, self.count)

    def is_sound(self) -> bool:
        """Whether both parts are what sums of this many terms can be (another machine may have sent them)."""
        bound = self.count * COARSE / 2
        return 1 <= self.count <= min(self.weight, _MAX_TERMS) and all(
            _within(value, limit) and _on_grid(value, step)
            for parts, step, limit in ((self.coarse, COARSE, _LIMIT), (self.fine, FINE, bound))
            for value in parts.values()
        )

    def total(self) -> dict[str, NDArray[np.float64]]:
        """Return the weighted sum of every tensor, in float64."""
        return {name: self.coarse[name] + self.fine[name] for name in self.coarse}

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Return the weighted mean of every tensor, in float64."""
        assert self.weight > 0, "the mean of nothing"
        return {name: value / self.weight for name, value in self.total().items()}


def _named(flat: Flat, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NDArray[np.float64]]:
    """Return numbers as the tensors that they are, one after another."""
    named, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        named[name] = flat[at : at + size].reshape(shape)
        at += size
    return named


def _within(value: NDArray[np.float64], limit: float) -> bool:
    """Whether all numbers are finite and none is larger."""
    return _largest(value) <= limit


def _on_grid(value: NDArray[np.float64], step: float) -> bool:
    """Whether all numbers are multiples of ``step`` (a power of two, so the quotient is exact)."""
    steps = value / step
    return bool((np.rint(steps) == steps).all())
