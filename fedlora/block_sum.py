"""The arithmetic of :mod:`fedlora.exact_sum`: weighted terms on two grids, many at once, in blocks that fit the cache.

A term is rounded to the fine grid (to even, where it lies between two points). Terms below 2 are there after one
addition: a number plus 6 lies between 4 and 8, where neighbouring float64 numbers are 2**-50 apart, so the sum's bits
are the number of grid steps, plus those of 6. The bits are summed as integers. Larger terms are split into a multiple
of the coarse step and a rest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

COARSE = 2.0**-16
FINE = 2.0**-50  # a mean with weights >= 1 is off by at most 2**-51
MOST = 2**11
"""Terms of one call: their integers must not pass 63 bits."""

_BLOCK = 2**16  # numbers; fewer pay for calls, more leave the cache
_SMALL = 2.0
_SHIFT = 6.0
_SHIFT_BITS = int(np.array(_SHIFT).view(np.uint64))
_STEPS = 34  # bits by which the coarse step is wider than the fine one
_ROUNDED = 2.0**35  # terms below it are rounded to the coarse grid by adding and taking away 1.5 * 2**36
_COARSE_SHIFT = 1.5 * 2.0**36

Flat = NDArray[np.float64]
Term = tuple[Sequence[NDArray[np.floating]], int]
"""A client's tensors, and how often they count."""
_Piece = tuple[int, int, int]
"""A tensor's number, from and up to where in it."""


class TooLargeError(ArithmeticError):
    """A term is not finite, or the terms may come to more than the limit."""


def block_sums(terms: Sequence[Term], limit: float, threads: int = 1) -> tuple[Flat, Flat]:
    """Return the sum of ``weight * tensors`` in its coarse part and its fine one, the tensors one after another.

    Args:
        terms: The terms, at most :data:`MOST`, all of the same shapes.
        limit: What the absolute terms, those below 2 left out, must stay below in sum.
        threads: CPU threads to use.

    Raises:
        TooLargeError: They do not, or a term is not finite.
    """
    assert 0 < len(terms) <= MOST, "not that many terms"
    sizes = [tensor.size for tensor in terms[0][0]]
    flat = [([tensor.reshape(-1) for tensor in tensors], float(weight)) for tensors, weight in terms]
    coarse, fine = np.empty(sum(sizes)), np.empty(sum(sizes))
    dtype = np.result_type(np.float32, *(tensor.dtype for tensors, _ in flat for tensor in tensors))
    blocks = list(_blocks(sizes))
    threads = max(1, min(threads, len(blocks)))

    def work(first: int) -> None:
        buffers = _Buffers(min(_BLOCK, len(coarse)), dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for start, stop, pieces in blocks[first::threads]:
                buffers.sum(flat, pieces, coarse[start:stop], fine[start:stop], limit)

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    return coarse, fine


def _blocks(sizes: Sequence[int]) -> Iterator[tuple[int, int, list[_Piece]]]:
    """Cut tensors of these sizes, one after another, into blocks; yield from and up to where, and the pieces."""
    start, length, pieces = 0, 0, list[_Piece]()
    for number, size in enumerate(sizes):
        at = 0
        while at < size:
            taken = min(size - at, _BLOCK - length)
            pieces.append((number, at, at + taken))
            at, length = at + taken, length + taken
            if length == _BLOCK:
                yield start, start + length, pieces
                start, length, pieces = start + length, 0, []
    if length:
        yield start, start + length, pieces


@final
class _Buffers:
    """What one thread sums a block in.

    Args:
        size: Numbers of a block.
        dtype: Of the tensors.
    """

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        self._given = np.empty(size, dtype)
        self._term, self._part, self._large = np.empty(size), np.empty(size), np.empty(size)
        self._steps, self._rests = np.empty(size, dtype=np.int64), np.empty(size, dtype=np.int64)

    def sum(
        self,
        terms: Sequence[tuple[Sequence[NDArray[np.floating]], float]],
        pieces: Sequence[_Piece],
        coarse: Flat,
        fine: Flat,
        limit: float,
    ) -> None:
        """Write the sums of a block's numbers."""
        size = len(coarse)
        term, part, large = self._term[:size], self._part[:size], self._large[:size]
        steps, rests, bits = self._steps[:size], self._rests[:size], term.view(np.int64)
        small, split, bound = 0, 0, 0.0
        for tensors, weight in terms:
            given = [tensors[number][start:stop] for number, start, stop in pieces]
            value = given[0] if len(given) == 1 else np.concatenate(given, out=self._given[:size])
            most = weight * max(float(np.maximum.reduce(value)), -float(np.minimum.reduce(value)))
            np.copyto(term, value)
            if weight != 1.0:
                np.multiply(term, weight, out=term)
            if most < _SMALL:
                np.add(term, _SHIFT, out=term)
                _add(steps, bits, first=not small)
                small += 1
                continue
            bound += most
            if not bound < limit:  # NaN is not below it either
                raise TooLargeError
            if most < _ROUNDED:
                np.add(term, _COARSE_SHIFT, out=part)
                np.subtract(part, _COARSE_SHIFT, out=part)
            else:
                np.multiply(np.rint(term / COARSE), COARSE, out=part)
            np.subtract(term, part, out=term)
            np.add(term, _SHIFT, out=term)
            _add(large, part, first=not split)
            _add(rests, bits, first=not split)
            split += 1
        if small:
            _take_shifts(steps, small)
            whole = bits
            np.add(steps, 1 << (_STEPS - 1), out=whole)
            np.right_shift(whole, _STEPS, out=whole)
            np.multiply(whole, COARSE, out=coarse)
            np.left_shift(whole, _STEPS, out=whole)
            np.subtract(steps, whole, out=steps)
            np.multiply(steps, FINE, out=fine)
        if split:
            _take_shifts(rests, split)
            np.multiply(rests, FINE, out=part)
            _add(coarse, large, first=not small)
            _add(fine, part, first=not small)


def _add(total: NDArray[Any], value: NDArray[Any], *, first: bool) -> None:
    if first:
        np.copyto(total, value)
    else:
        np.add(total, value, out=total)


def _take_shifts(steps: NDArray[np.int64], count: int) -> None:
    """Take the bits of as many shifts out of sums that have gone round in 64 bits."""
    unsigned = steps.view(np.uint64)
    np.subtract(unsigned, np.uint64(count * _SHIFT_BITS % 2**64), out=unsigned)
