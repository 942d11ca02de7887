"""The arithmetic of :mod:`fedlora.exact_sum`: weighted terms on two grids, many at once, in blocks that fit the cache.

Where no rounding can occur the sum of several clients' terms is a product of their weights and a matrix, which is
exact in whatever order it is computed: all float32 numbers of a block are multiples of the unit in the last place of
the smallest of them, and float64 holds 2**53 such units. The largest and the smallest number say whether that is so.

Other terms are rounded to the fine grid one by one (to even, where they lie between two points). Terms below 2 are
there after one addition: a number plus 6 lies between 4 and 8, where neighbouring float64 numbers are 2**-50 apart, so
the sum's bits are the number of grid steps, plus those of 6. The bits are summed as integers. Larger terms, and sums
of clients, are split into a multiple of the coarse step and a rest first.

One thread does it: several would wait for each other between two calls of numpy for longer than the calls take.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

COARSE = 2.0**-16
FINE = 2.0**-50  # a mean with weights >= 1 is off by at most 2**-51
MOST = 2**11
"""Terms of one call: their integers must not pass 63 bits."""

_BLOCK = 2**16  # numbers of a client in a block, at most
_TOGETHER = 2**20  # numbers of all clients in a block: fewer pay for calls, more leave the cache
_CLIENTS = 32  # of a block
_SMALL = 2.0
_SHIFT = 6.0
_SHIFT_BITS = int(np.array(_SHIFT).view(np.uint64))
_STEPS = 34  # bits by which the coarse step is wider than the fine one
_ROUNDED = 2.0**35  # terms below it are rounded to the coarse grid by adding and taking away 1.5 * 2**36
_COARSE_SHIFT = 1.5 * 2.0**36
_PLACES = 53  # bits that float64 has for a number

Flat = NDArray[np.float64]
Term = tuple[Sequence[NDArray[np.floating]], int]
"""A client's tensors, and how often they count."""
_Flats = Sequence[tuple[Sequence[NDArray[np.floating]], float]]
_Piece = tuple[int, int, int]
"""A tensor's number, from and up to where in it."""


class TooLargeError(ArithmeticError):
    """A term is not finite, or the terms may come to more than the limit."""


def block_sums(terms: Sequence[Term], limit: float) -> tuple[Flat, Flat]:
    """Return the sum of ``weight * tensors`` in its coarse part and its fine one, the tensors one after another.

    Args:
        terms: The terms, at most :data:`MOST`, all of the same shapes.
        limit: What the absolute terms, those below 2 left out, must stay below in sum.

    Raises:
        TooLargeError: They do not, or a term is not finite.
    """
    assert 0 < len(terms) <= MOST, "not that many terms"
    sizes = [tensor.size for tensor in terms[0][0]]
    flat = [([tensor.reshape(-1) for tensor in tensors], float(weight)) for tensors, weight in terms]
    coarse, fine = np.empty(sum(sizes)), np.empty(sum(sizes))
    dtype = np.result_type(np.float32, *(tensor.dtype for tensors, _ in flat for tensor in tensors))
    clients = min(len(flat), _CLIENTS)
    size = max(1, min(_BLOCK, _TOGETHER // clients, len(coarse)))
    sums = _Sums(clients, size, dtype, limit)
    with np.errstate(over="ignore", invalid="ignore"):
        for start, stop, pieces in _blocks(sizes, size):
            sums.write(flat, pieces, coarse[start:stop], fine[start:stop])
    return coarse, fine


def _blocks(sizes: Sequence[int], most: int) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Cut tensors of these sizes, one after another, into blocks; yield from and up to where, and the pieces."""
    start, length, pieces = 0, 0, list[_Piece]()
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            taken = min(size - at, most - length)
            pieces.append((number, at, at + taken))
            at, length = at + taken, length + taken
            if length == most:
                yield start, start + length, pieces
                start, length, pieces = start + length, 0, []
    if length:
        yield start, start + length, pieces


@final
class _Sums:
    """The sums of a block's numbers, and the memory to make them in.

    Args:
        clients: Clients that are summed at once.
        size: Numbers of a client in a block.
        dtype: Of the tensors.
        limit: See :func:`block_sums`.
    """

    def __init__(self, clients: int, size: int, dtype: np.dtype[Any], limit: float) -> None:
        self._limit = limit
        self._given = np.empty(clients * size, dtype)
        self._terms, self._parts = np.empty((clients, size)), np.empty((clients, size))
        self._sum, self._large = np.empty((1, size)), np.empty(size)
        self._steps, self._rests = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)
        self._small = self._split = 0
        """Terms, or sums of terms, that are in ``_steps``, and in ``_large`` and ``_rests``."""

    def write(self, terms: _Flats, pieces: Sequence[_Piece], coarse: Flat, fine: Flat) -> None:
        """Write the sums of a block's numbers."""
        size = len(coarse)
        self._small = self._split = 0
        bound = 0.0
        for at in range(0, len(terms), len(self._terms)):
            some = terms[at : at + len(self._terms)]
            weights = np.array([weight for _, weight in some])
            block, most, unit = self._read(some, pieces, size)
            sizes = weights * most  # of the largest term of each client
            bound += float(sizes[~(sizes < _SMALL)].sum())
            if not bound < self._limit:  # NaN is not below it either
                raise TooLargeError
            for start, stop, exact in _runs(sizes, unit):
                if exact:
                    total = self._sum[:, :size]
                    np.dot(weights[start:stop], block[start:stop], out=total[0])
                    self._add(total, float(sizes[start:stop].sum()))
                else:
                    own = block[start:stop]
                    np.multiply(own, weights[start:stop, None], out=own)
                    self._add(own, float(sizes[start:stop].max()))
        self._finish(coarse, fine)

    def _read(
        self, terms: _Flats, pieces: Sequence[_Piece], size: int
    ) -> tuple[Flat, NDArray[np.float64], NDArray[np.float64]]:
        """Return the numbers of some clients [c, n], the largest of each, and what all of its numbers are multiples of.

        The latter is 0 where it is not known.
        """
        count = len(terms)
        given = self._given[: count * size]
        np.concatenate(
            [tensors[number][start:stop] for tensors, _ in terms for number, start, stop in pieces], out=given
        )
        rows, block = given.reshape(count, size), self._terms[:count, :size]
        np.copyto(block, rows)
        if rows.dtype != np.float32:
            most = np.maximum(np.maximum.reduce(rows, axis=1), -np.minimum.reduce(rows, axis=1))
            return block, most.astype(np.float64), np.zeros(count)
        bits = rows.view(np.uint32)
        np.left_shift(bits, 1, out=bits)  # without the sign they are in the order of the absolute numbers
        largest, smallest = np.maximum.reduce(bits, axis=1), np.minimum.reduce(bits, axis=1)
        if not smallest.all():  # zero is a multiple of anything: it becomes the largest
            np.subtract(bits, np.uint32(1), out=bits)
            smallest = np.minimum.reduce(bits, axis=1) + np.uint32(1)  # and 0 again where there is nothing else
        exponent = np.maximum((smallest >> 24).astype(np.int64), 1) - 150
        most = (largest >> 1).view(np.float32).astype(np.float64)
        return block, most, np.where(most == 0.0, 1.0, np.ldexp(1.0, exponent))

    def _add(self, terms: Flat, most: float) -> None:
        """Add terms [c, n], none larger than ``most``; nothing is left of them."""
        count, size = terms.shape
        bits = terms.view(np.int64)
        if most < _SMALL:
            np.add(terms, _SHIFT, out=terms)
            _add_rows(self._steps[:size], bits, first=not self._small)
            self._small += count
            return
        parts = self._parts[:count, :size]
        if most < _ROUNDED:
            np.add(terms, _COARSE_SHIFT, out=parts)
            np.subtract(parts, _COARSE_SHIFT, out=parts)
        else:
            np.multiply(np.rint(terms / COARSE), COARSE, out=parts)
        np.subtract(terms, parts, out=terms)
        np.add(terms, _SHIFT, out=terms)
        _add_rows(self._large[:size], parts, first=not self._split)
        _add_rows(self._rests[:size], bits, first=not self._split)
        self._split += count

    def _finish(self, coarse: Flat, fine: Flat) -> None:
        """Write what was added."""
        size = len(coarse)
        steps, rests, part = self._steps[:size], self._rests[:size], self._sum[0, :size]
        if self._small:
            _take_shifts(steps, self._small)
            whole = part.view(np.int64)
            np.add(steps, 1 << (_STEPS - 1), out=whole)
            np.right_shift(whole, _STEPS, out=whole)
            np.multiply(whole, COARSE, out=coarse)
            np.left_shift(whole, _STEPS, out=whole)
            np.subtract(steps, whole, out=steps)
            np.multiply(steps, FINE, out=fine)
        if self._split:
            _take_shifts(rests, self._split)
            np.multiply(rests, FINE, out=part)
            _add_rows(coarse, self._large[None, :size], first=not self._small)
            _add_rows(fine, part[None], first=not self._small)


def _runs(sizes: NDArray[np.float64], unit: NDArray[np.float64]) -> Iterator[tuple[int, int, bool]]:
    """Cut clients, one after another, into runs; yield from and up to which, and whether their sum is exact.

    It is where float64 holds their largest terms, added up, in the unit that all their numbers are multiples of, and
    nothing is rounded to the fine grid. Clients whose numbers allow for no exact sum are told apart by whether they are
    small.

    Args:
        sizes: The largest term of each.
        unit: What a client's numbers are multiples of; 0: not known.
    """
    kinds = np.where((unit >= FINE) & (sizes <= unit * 2.0**_PLACES), 0, np.where(sizes < _SMALL, 1, 2)).tolist()
    at = 0
    for kind, group in itertools.groupby(kinds):
        end = at + len(list(group))
        if kind:
            yield at, end, False
            at = end
        while at < end:
            start, total, least = at, 0.0, np.inf
            while at < end and total + sizes[at] <= min(least, unit[at]) * 2.0**_PLACES:
                total, least = total + sizes[at], min(least, unit[at])
                at += 1
            yield start, at, True


def _add_rows(total: NDArray[Any], rows: NDArray[Any], *, first: bool) -> None:
    """Add rows [c, n] to a total, or make it of them."""
    if first and len(rows) == 1:
        np.copyto(total, rows[0])
    elif first:
        np.add.reduce(rows, axis=0, out=total)
    else:
        np.add(total, rows[0] if len(rows) == 1 else np.add.reduce(rows, axis=0), out=total)


def _take_shifts(steps: NDArray[np.int64], count: int) -> None:
    """Take the bits of as many shifts out of sums that have gone round in 64 bits."""
    unsigned = steps.view(np.uint64)
    np.subtract(unsigned, np.uint64(count * _SHIFT_BITS % 2**64), out=unsigned)
