"""The same engine on a GPU: checked against the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.engine import ClientResult, Engine, train_pack
from fedlora.methods import build_method
from fedlora.models import prepare_base
from tests.families import small_model, small_task, without_float32
from tests.test_packing import ADAMW, METHOD, make_works

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def trained(device: str, dtype: torch.dtype) -> list[ClientResult]:
    model: Any = without_float32(small_model("bert")).to(dtype)
    base = prepare_base(model, None, "auto", device=torch.device(device))
    engine = Engine.build(base, build_method(METHOD, base.structure.adapted, base.structure.head), small_task())
    return train_pack(engine, make_works(engine, 6, ADAMW), {}, ADAMW)


def test_float64_on_the_gpu_equals_the_cpu() -> None:
    for one, two in zip(trained("cpu", torch.float64), trained("cuda", torch.float64), strict=True):
        assert two.error == ""
        assert max(float(np.abs(one.tensors[name] - two.tensors[name]).max()) for name in one.tensors) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_losses_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    for one, two in zip(trained("cpu", torch.float64), trained("cuda", dtype), strict=True):
        assert two.error == ""
        assert two.loss == pytest.approx(one.loss, rel=tolerance)
