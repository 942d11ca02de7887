"""A quantised base on a GPU: packs are those of its weights, rows stand apart, and machines agree on its digest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from fedlora.engine import Engine, train_pack
from fedlora.methods import build_method
from fedlora.models import Base, prepare_base
from tests.support.families import small_model, small_task
from tests.support.matrix import CONFIGS, random_start
from tests.support.quantised import KINDS, dequantised
from tests.test_dp_step import TRAIN, off, private_step, ragged
from tests.test_packing import ADAMW, make_works

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def wide_base(kind: str, device: str, dtype: torch.dtype = torch.float32) -> Base:
    """A Llama of random weights, as wide as the GPU's kernels for packed weights ask for."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = small_model("llama-lm", **sizes, num_key_value_heads=4, head_dim=32).to(dtype)
    return prepare_base(model, None, "auto", has_head=False, device=torch.device(device), quantization=kind)


def quantised_engine(kind: str, device: str, *, reference: bool = False) -> Engine:
    """An engine on it; as a reference on plain layers that hold the dequantised weights."""
    base = wide_base(kind, device)
    base = replace(base, model=dequantised(base.model)) if reference else base
    built = build_method(CONFIGS["lora"], base.structure.adapted, base.structure.head)
    return Engine.build(base, built, small_task("llama-lm"))


@pytest.mark.parametrize("dp", [False, True], ids=["", "dp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_on_the_gpu(kind: str, dp: bool) -> None:
    """Its packs are those of the weights that it stands for; machines agree on its digest, CPU and GPU."""
    results = []
    for reference in (False, True):
        engine = quantised_engine(kind, "cuda", reference=reference)
        start = random_start(engine)
        if dp:
            results.append(train_pack(engine, ragged(start, "llama-lm"), {}, TRAIN, private_step(3)))
        else:
            works = [replace(work, start=start) for work in make_works(engine, 6, ADAMW, family="llama-lm")]
            results.append(train_pack(engine, works, {}, ADAMW))
    for one, two in zip(*results, strict=True):
        assert two.error == one.error == ""
        assert off(one.tensors, two.tensors) < 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        assert wide_base(kind, "cpu", dtype).digest == wide_base(kind, "cuda", dtype).digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outlier_couples_no_rows_on_the_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in bitsandbytes' own 8-bit layer."""
    base = wide_base("int8", "cuda", dtype)
    layer: Any = base.model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    outlying = x.clone()
    outlying[1, 2, 7] = 60.0
    assert torch.equal(layer(x)[0], layer(outlying)[0])
    monkeypatch.setattr(layer, "__class__", bnb.nn.Linear8bitLt)
    assert not torch.equal(layer(x)[0], layer(outlying)[0]), "the control: it would be seen"
