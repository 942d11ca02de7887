"""How large the numbers of each tensor are in rows of many tensors' numbers, and which tensors differ from others'.

Hundreds of tensors side by side are a reduction each in plain torch, of which most are too small for a GPU; the kernel
takes all of them at once.

Shapes: `N` rows, `P` numbers of a row, `K` tensors that they are of, `D` rows that others are compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Self, final

import numpy as np
import torch
from torch import Tensor

from fedlora.engine.kernels.common import takes_kernel
from fedlora.fused import WithFallback
from fedlora.transfer import to_device


@final
class Parts(NamedTuple):
    """Where in a row tensors are, one after another.

    Attributes:
        bounds: Where each begins, and P, [K + 1].
        here: The same on the device, int64.
    """

    bounds: tuple[int, ...]
    here: Tensor

    @classmethod
    def of(cls, places: Sequence[slice], device: torch.device) -> Self:
        """Return the parts of tensors at these places."""
        bounds = (*(place.start for place in places), places[-1].stop)
        assert all(place.stop == end for place, end in zip(places, bounds[1:], strict=True)), "a gap between tensors"
        return cls(bounds, to_device(np.array(bounds), device))


def peaks(rows: Tensor, parts: Parts) -> Tensor:
    """Return the largest size of each tensor's numbers in each row [N, P], [N, K]; infinite where one is no number."""
    return (_fast_peaks if takes_kernel(rows) else _peaks)(rows, parts)


def differ(rows: Tensor, others: Tensor, row_n: Tensor, parts: Parts) -> Tensor:
    """Return whether each tensor of each row [N, P] has a number other than row ``row_n`` of others [D, P], [N, K]."""
    return (_fast_differ if takes_kernel(rows) else _differ)(rows, others, row_n, parts)


def _peaks(rows: Tensor, parts: Parts) -> Tensor:
    columns = [torch.linalg.vector_norm(rows[:, at:end], torch.inf, 1) for at, end in itertools.pairwise(parts.bounds)]
    return torch.stack(columns, 1).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _differ(rows: Tensor, others: Tensor, row_n: Tensor, parts: Parts) -> Tensor:
    pairs = itertools.pairwise(parts.bounds)
    return torch.stack([(rows[:, at:end] != others[:, at:end][row_n]).any(1) for at, end in pairs], 1)


def _peaks_by_kernel(rows: Tensor, parts: Parts) -> Tensor:
    from fedlora.engine.kernels import row_peaks_triton

    return row_peaks_triton.peaks(rows, parts.here)


def _differ_by_kernel(rows: Tensor, others: Tensor, row_n: Tensor, parts: Parts) -> Tensor:
    from fedlora.engine.kernels import row_peaks_triton

    return row_peaks_triton.differ(rows, others, row_n, parts.here)


_fast_peaks = WithFallback(_peaks_by_kernel, _peaks)
_fast_differ = WithFallback(_differ_by_kernel, _differ)
