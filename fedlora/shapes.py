"""Tensors of clients that hold fewer ranks than the server: their shapes, arrays cut to them and padded from them.

Or some ranks in the midst of the others, by their places on the rank axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedlora.methods import TensorSpec

Number = TypeVar("Number", bound=np.floating)


def at_rank(specs: Mapping[str, TensorSpec], rank: int | None) -> dict[str, TensorSpec]:
    """Return tensors as a client of this rank holds them, the first ``rank`` of each rank axis; None: as they are."""
    return {
        name: spec
        if rank is None or spec.rank_axis is None
        else replace(spec, shape=tuple(rank if axis == spec.rank_axis else n for axis, n in enumerate(spec.shape)))
        for name, spec in specs.items()
    }


def cut(value: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
    """Return the part of an array that a smaller shape holds; itself where it has that shape."""
    return value if value.shape == shape else value[tuple(slice(n) for n in shape)]


def pad(value: NDArray[Number], shape: tuple[int, ...]) -> NDArray[Number]:
    """Return an array with zeros behind it up to a larger shape; itself where it has that shape."""
    if value.shape == shape:
        return value
    return np.pad(value, [(0, whole - n) for whole, n in zip(shape, value.shape, strict=True)])


def first_ranks(
    tensors: Mapping[str, NDArray[Number]], specs: Mapping[str, TensorSpec], rank: int
) -> dict[str, NDArray[Number]]:
    """Return a model cut to its first ranks: zeros stand for those behind them."""
    kept = at_rank(specs, rank)
    return {
        name: pad(cut(value, kept[name].shape), value.shape) if name in kept else value
        for name, value in tensors.items()
    }


def chosen(value: NDArray[Number], axis: int | None, places: Sequence[int]) -> NDArray[Number]:
    """Return an array's numbers at some places of an axis; itself where there is no axis, or no place is named."""
    return np.take(value, places, axis) if axis is not None and places else value


def spread(value: NDArray[Number], shape: tuple[int, ...], axis: int | None, places: Sequence[int]) -> NDArray[Number]:
    """Return the array of a larger shape that :func:`chosen` takes this one from, with zeros elsewhere."""
    if axis is None or not places:
        return value
    whole = np.zeros(shape, value.dtype)
    np.moveaxis(whole, axis, 0)[list(places)] = np.moveaxis(value, axis, 0)
    return whole


def placed(value: NDArray[Number], held: NDArray[Number]) -> NDArray[Number]:
    """Return an array with a smaller one in its first places; the smaller one itself where it has the same shape."""
    if value.shape == held.shape:
        return value
    whole = held.copy()
    whole[tuple(slice(n) for n in value.shape)] = value
    return whole
