"""The largest numbers of tensors side by side, and which tensors differ, against numpy; on a GPU its kernel, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedlora.engine.kernels.row_peaks import Parts, _differ, _peaks, differ, peaks

SIZES = (1, 7, 5000, 8192, 2)
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


def parts_of(device: str) -> Parts:
    ends = np.cumsum(SIZES).tolist()
    return Parts.of([slice(a, b) for a, b in zip([0, *ends], ends, strict=False)], torch.device(device))


def rows_of(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(6, sum(SIZES), generator=torch.Generator().manual_seed(0)).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_peaks(device: str, dtype: torch.dtype) -> None:
    """Exactly numpy's, also of a slice of rows; infinite where a number is infinite or none."""
    rows, parts = rows_of(device, dtype), parts_of(device)
    rows[1, 3], rows[2, 4000], rows[3] = torch.nan, -torch.inf, 0.0
    numbers = rows.double().cpu().numpy()
    wanted = np.stack([np.abs(numbers[:, a:b]).max(1) for a, b in zip(parts.bounds, parts.bounds[1:], strict=False)], 1)
    wanted[np.isnan(wanted)] = np.inf
    assert wanted[1, 1] == wanted[2, 2] == np.inf
    assert np.isinf(wanted).sum() == 2
    assert peaks(rows, parts).double().cpu().numpy().tolist() == wanted.tolist()
    assert peaks(rows[2:5], parts).double().cpu().numpy().tolist() == wanted[2:5].tolist()
    assert torch.equal(peaks(rows, parts).double(), _peaks(rows, parts).double())


@pytest.mark.parametrize("device", DEVICES)
def test_differ(device: str) -> None:
    """One number of one tensor is enough, its last one or its first; one that is none differs from itself."""
    parts = parts_of(device)
    others = rows_of(device)[:2]
    row_n = torch.tensor([0, 0, 1, 1, 0, 1], device=device)
    rows = others[row_n]
    rows[1, parts.bounds[3] - 1] += 1e-4
    rows[2, 0] -= 1e-4
    rows[4, parts.bounds[4]] = torch.nan
    found = differ(rows, others, row_n, parts)
    assert found.nonzero().tolist() == [[1, 2], [2, 0], [4, 4]]
    assert torch.equal(found, _differ(rows, others, row_n, parts))
