"""What goes between the host and a device: without waiting for what that is doing."""

from __future__ import annotations

from typing import Any, NamedTuple, Self, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Places = slice | Tensor
"""Which groups of a pack: a slice where they stand side by side, so that their numbers are a view; else int64 [a]."""


def to_places(groups: NDArray[np.int64], device: torch.device) -> Places:
    """Return the places of groups, ascending and each once, to index tensors on ``device`` with."""
    first, last = int(groups[0]), int(groups[-1])
    return slice(first, last + 1) if last - first + 1 == len(groups) else to_device(groups, device)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cpu":
        return tensor
    host = torch.empty_like(tensor, pin_memory=True)
    # Not by torch, which wakes its threads for 2 MB and may wait 10 ms for them.
    np.copyto(host.numpy(), array)
    return host.to(device, non_blocking=True)


def wait(device: torch.device) -> None:
    """Wait until a device has done what this thread asked of it, copies to the host among it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@final
class Spans(NamedTuple):
    """Which rows of a batch are whose; rows are sorted by group.

    Attributes:
        group_n: Each row's group, int64 [N].
        first_g: Each group's first row, and N after the last, int64 [G + 1].
    """

    group_n: Tensor
    first_g: Tensor

    @classmethod
    def of(cls, group_n: NDArray[np.int64], groups: int, device: torch.device) -> Self:
        """Return the spans of rows of these groups, made on the host."""
        assert bool((np.diff(group_n) >= 0).all()), "rows that are not sorted by group"
        return cls(to_device(group_n, device), to_device(np.searchsorted(group_n, np.arange(groups + 1)), device))
