"""Export: PEFT loads the adapter on the untouched base and gives the engine's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedlora.config import Config, MethodConfig
from fedlora.engine.layers import Layout
from fedlora.methods import initial_tensors
from fedlora.runs.export import adapter_files
from fedlora.seeded import Seeded
from tests.support.families import FAMILIES, random_examples, small_model, without_float32
from tests.test_packing import make_engine


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reproduces_the_logits(family: str, targets: str, tmp_path: Path) -> None:
    """All families, non-square layers and Conv1D, rsLoRA's scale folded into B: float64 to 1e-12."""
    method = MethodConfig(name="lora", rank=3, alpha=5.0, rslora=True)
    engine = make_engine(family, method, "" if targets == "auto" else targets)
    generator = np.random.default_rng(0)
    tensors = {
        name: value + generator.standard_normal(value.shape)
        for name, value in initial_tensors(engine.method.specs(), Seeded(0)).items()
    }
    for name, content in adapter_files(engine, tensors, Config(method=method)).items():
        (tmp_path / name).write_bytes(content)
    loaded = PeftModel.from_pretrained(without_float32(small_model(family)), str(tmp_path)).double().eval()
    batch = engine.task.collate(random_examples(6, seed=2, family=family), range(6), torch.device("cpu"))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    factors = engine.method.factors({name: engine.tensor(value) for name, value in tensors.items()})
    with torch.no_grad(), engine.grouped.placed(factors, Layout(1, 6, None)) as model:
        expected = model(**inputs).logits
    with torch.no_grad():
        logits = loaded(**inputs).logits
        plain = without_float32(small_model(family))(**inputs).logits
    assert float((logits - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    assert float((plain - expected).abs().max()) > 1e-2, "control: the adapter makes a difference"
