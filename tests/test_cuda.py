"""The same engine on a GPU: checked against the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config import Config
from fedlora.engine import ClientResult, Engine, train_pack
from fedlora.methods import build_method
from fedlora.models import prepare_base
from tests.families import small_model, small_task, task_of, without_float32
from tests.test_packing import ADAMW, METHOD, make_works

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


FAMILIES = pytest.mark.parametrize("family", ["bert", "llama-lm"])
# transformers computes rotary positions in float32 whatever the model's dtype, and sines differ by device.
TOLERANCE = {"bert": 1e-10, "llama-lm": 1e-6}


def trained(family: str, device: str, dtype: torch.dtype) -> list[ClientResult]:
    model: Any = without_float32(small_model(family)).to(dtype)
    has_head = task_of(family).has_head
    base = prepare_base(model, None, "auto", has_head=has_head, device=torch.device(device))
    method = build_method(Config(method=METHOD), base.structure.adapted, base.structure.head)
    engine = Engine.build(base, method, small_task(family))
    return train_pack(engine, make_works(engine, 6, ADAMW, family=family), {}, ADAMW)


@FAMILIES
def test_float64_on_the_gpu_equals_the_cpu(family: str) -> None:
    for one, two in zip(trained(family, "cpu", torch.float64), trained(family, "cuda", torch.float64), strict=True):
        assert two.error == ""
        difference = max(float(np.abs(one.tensors[name] - two.tensors[name]).max()) for name in one.tensors)
        assert difference < TOLERANCE[family]


@FAMILIES
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_losses_in_lower_precision(family: str, dtype: torch.dtype, tolerance: float) -> None:
    for one, two in zip(trained(family, "cpu", torch.float64), trained(family, "cuda", dtype), strict=True):
        assert two.error == ""
        assert two.loss == pytest.approx(one.loss, rel=tolerance)
