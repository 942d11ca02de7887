"""Rows of different lengths in one array, one after another: what can be memory-mapped, shared and gathered at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Self, final, overload

import numpy as np
from numpy.typing import NDArray


@final
class Ragged(Sequence[NDArray[Any]]):
    """Rows of numbers, in an array that may be read-only.

    Args:
        flat: All numbers, [total].
        starts: Where each row begins, and where the last one ends, int64 [n + 1].
    """

    def __init__(self, flat: NDArray[Any], starts: NDArray[np.int64]) -> None:
        assert int(starts[-1]) == len(flat), "the last row ends where the numbers do"
        self.flat, self.starts = flat, starts

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: Any) -> Self:
        """Return these rows, lists or arrays of numbers, in a dtype."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        starts = _starts(lengths)
        if isinstance(rows[0] if rows else None, np.ndarray):
            return cls(np.concatenate(rows).astype(dtype, copy=False), starts)
        return cls(np.fromiter(itertools.chain.from_iterable(rows), dtype=dtype, count=int(starts[-1])), starts)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.starts) - 1

    @overload
    def __getitem__(self, row: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[NDArray[Any], ...]: ...
    def __getitem__(self, row: int | slice) -> NDArray[Any] | tuple[NDArray[Any], ...]:
        """Return a row, of whole numbers int64 in whatever width they are kept; of a slice, several."""
        if isinstance(row, slice):
            return tuple(self[number] for number in range(*row.indices(len(self))))
        at = range(len(self))[row]
        part = self.flat[self.starts[at] : self.starts[at + 1]]
        return part if part.dtype == np.bool_ else part.astype(np.int64)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield the rows."""
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Numbers in each row, [n]."""
        return np.diff(self.starts)

    def take(self, rows: NDArray[np.int64]) -> Ragged:
        """Return some of the rows, in this order, in an array of their own."""
        begin, lengths = self.starts[:-1][rows], self.lengths[rows]
        starts = _starts(lengths)
        places = np.arange(starts[-1]) + np.repeat(begin - starts[:-1], lengths)
        return Ragged(self.flat[places], starts)

    def padded(self, rows: NDArray[np.int64], fill: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return some of the rows, filled up to the longest of them, and which numbers are theirs; [N, T] each.

        Whole numbers come as int64, truth values as they are.
        """
        begin = self.starts[:-1][rows]
        lengths = self.starts[1:][rows] - begin
        place = np.arange(lengths.max(initial=0))
        own = place < lengths[:, None]
        found: NDArray[Any] = np.full(own.shape, fill, dtype=np.bool_ if self.flat.dtype == np.bool_ else np.int64)
        if len(self.flat):
            np.copyto(found, self.flat.take(begin[:, None] + place, mode="clip"), where=own)
        return found, own


def stacked(parts: Sequence[Ragged]) -> Ragged:
    """Return the rows of several, one after another."""
    return Ragged(
        np.concatenate([part.flat for part in parts]), _starts(np.concatenate([part.lengths for part in parts]))
    )


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
