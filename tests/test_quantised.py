"""A quantised base: what transformers makes of a checkpoint, trained in packs and under DP as its weights stand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import transformers
from torch import nn

from fedlora.config import Config, MethodConfig, ModelConfig
from fedlora.engine import Engine
from fedlora.engine.apart import random_tensors
from fedlora.joining import JoinReport
from fedlora.methods import build_method, initial_tensors
from fedlora.models import inspect_by_name, load_base
from fedlora.models.quantised import Int8Linear, describe, settings
from fedlora.quantisation import base_bytes
from fedlora.seeded import Seeded
from fedlora.tasks import CausalLM, Classification
from tests.support.quantised import FAMILIES, KINDS, dequantised, plain_engine, quantised_base, weights_hash
from tests.support.tiny import save_tiny_language_model, save_tiny_model
from tools.families import FAMILIES as ALL_FAMILIES
from tools.model_table import _alone, _trained, engine_of, find

CPU = torch.device("cpu")


def loaded(folder: str, kind: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    task, outputs = (CausalLM, 0) if Path(folder).name.startswith("lm") else (Classification, 2)
    return load_base(ModelConfig(folder, quantization=kind), task, outputs, "auto", dtype=dtype, device=CPU)


def by_transformers(folder: str, kind: str, dtype: torch.dtype) -> Any:
    """What the model card's code makes."""
    if Path(folder).name.startswith("lm"):
        auto, options, heads = transformers.AutoModelForCausalLM, {}, None
    else:
        auto, heads = transformers.AutoModelForSequenceClassification, ["classifier"]
        options = {"num_labels": 2, "ignore_mismatched_sizes": True}
    return auto.from_pretrained(folder, dtype=dtype, quantization_config=settings(kind, dtype, heads), **options)


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if not name.startswith("classifier")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [save_tiny_model, save_tiny_language_model])
def test_weights_are_those_of_transformers(save: Any, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Packed weights and scales to the bit, from the same layers; what the checkpoint then holds loads as such."""
    name = "lm" if save is save_tiny_language_model else "model"
    folder = save(tmp_path / name)
    base, theirs = loaded(folder, kind, dtype), by_transformers(folder, kind, dtype)
    ours, expected = base_weights(base.model), base_weights(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    assert describe(base.model) == describe(theirs)
    assert len(describe(base.model).splitlines()) > 12
    task, outputs = (CausalLM, 0) if name == "lm" else (Classification, 2)
    assert base.structure == inspect_by_name(ModelConfig(folder, quantization=kind), task, outputs, "auto")
    theirs.save_pretrained(tmp_path / f"{name}-saved")
    for file in Path(folder).glob("token*"):
        (tmp_path / f"{name}-saved" / file.name).write_bytes(file.read_bytes())
    saved = loaded(str(tmp_path / f"{name}-saved"), dtype=dtype)
    assert saved.structure == base.structure
    assert describe(saved.model) == describe(base.model)
    rows_alone = [module for module in saved.model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    assert all(type(module) is Int8Linear for module in rows_alone)
    assert len(rows_alone) == (len(describe(base.model).splitlines()) if kind == "int8" else 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=() if one in FAMILIES else pytest.mark.slow)
        for one in ALL_FAMILIES
        if one not in ("Falcon", "Longformer")  # which are refused
    ],
)
def test_packed_is_alone_is_row_by_row(family: str, kind: str) -> None:
    """Without DP and with it, and PEFT on the quantised base gives what the engine gives, all in float32."""
    found = find(family, "auto", kind)
    assert found.moved > 1e-2
    bound = 1e-3 if family == "ConvBERT" else 2e-6 if family in FAMILIES else 1e-4  # as in float32 in full precision
    for name in ("alone", "by_row", "dp", "peft"):
        assert getattr(found, name) < bound, name


def of_method(name: str, engine: Engine) -> Engine:
    """An engine on the same layers, of another method."""
    structure = engine.base.structure
    config = Config(method=MethodConfig(name, rank=2))
    return replace(engine, method=build_method(config, structure.adapted, structure.head))


@pytest.mark.parametrize("dp", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_that_of_the_dequantised_weights(family: str, method: str, kind: str, dp: bool) -> None:
    """The reference: plain layers, clients alone, row by row. A gradient that stops at a layer is seen below it.

    DoRA reads the weights, for their norms, and leaves them as they are.
    """
    engine = of_method(method, engine_of(family, "auto", kind)[0])
    reference = replace(of_method(method, plain_engine(family, kind)), max_cost=1)
    start = random_tensors(initial_tensors(engine.method.specs(), Seeded(0)), "start")
    before = weights_hash(engine.base.model)
    packed, alone = _trained(engine, start, (0, 1, 2), dp=dp), _alone(reference, start, dp=dp)
    assert weights_hash(engine.base.model) == before
    for one, other in zip(packed, alone, strict=True):
        for name in start:
            assert np.abs(one[name] - other[name]).max() < 3e-6, name
            assert np.abs(one[name] - start[name]).max() > 0, f"{name} was trained"


def test_a_row_of_outliers_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' own 8-bit layer moves others: it computes a feature in 16 bits when any row exceeds a threshold."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    apart = torch.stack([x[0], x[1].clone()])
    apart[1, 2, 7] = 60.0
    for family in FAMILIES:
        layers = [m for m in quantised_base(family, "int8").model.modules() if isinstance(m, Int8Linear)]
        layer = next(layer for layer in layers if layer.in_features == 16)
        assert torch.equal(layer(x)[0], layer(apart)[0])
        assert torch.allclose(layer(x[:1])[0], layer(apart)[0], atol=1e-6)
        monkeypatch.setattr(layer, "__class__", bnb.nn.Linear8bitLt)
        assert layer.state.threshold == 6.0
        coupled = layer(x)[0] - layer(apart)[0]
        assert float(coupled.detach().abs().max()) > 1e-4, "the control: it would be seen"


def test_evaluation_leaves_layers_that_gradients_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with bfloat16, where bitsandbytes repacks 4-bit weights for a kernel without gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    base = quantised_base("Llama", "nf4")
    packed, ids = weights_hash(base.model), torch.tensor([[3, 4, 5, 6]])

    def gradient() -> torch.Tensor:
        embedded = base.model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
        base.model(inputs_embeds=embedded).logits.square().sum().backward()
        assert embedded.grad is not None
        return embedded.grad

    before = gradient()
    with torch.inference_mode():
        base.model(input_ids=ids)
    assert torch.equal(gradient(), before)
    assert weights_hash(base.model) == packed
    layers = [module for module in base.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert not any(getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers)


def test_what_has_no_gradient_is_noticed() -> None:
    """Planted: a layer that detaches its input, which the reference of the test above must not equal."""
    engine = engine_of("Llama", "auto", "int8")[0]
    start = random_tensors(initial_tensors(engine.method.specs(), Seeded(0)), "start")
    sound = _trained(engine, start, (0,))[0]
    for module in engine.base.model.modules():
        if isinstance(module, Int8Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
    broken = _trained(engine, start, (0,))[0]
    assert max(float(np.abs(sound[name] - broken[name]).max()) for name in start) > 1e-3


# -- what is compared, and said ---------------------------------------------------------------------------------


def test_digests_say_what_was_quantised(tmp_path: Path) -> None:
    """Equal whatever the threads, on which the scales' last digits depend; another for each kind and dtype."""
    folder = save_tiny_model(tmp_path / "model")
    digests = {}
    threads = torch.get_num_threads()
    for kind in ("none", *KINDS):
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_num_threads(1)
            digests[kind, dtype] = loaded(folder, kind, dtype).digest
            torch.set_num_threads(2)
            assert loaded(folder, kind, dtype).digest == digests[kind, dtype]
    torch.set_num_threads(threads)
    assert len(set(digests.values())) == len(digests)


def test_a_dequantised_base_does_not_join(tmp_path: Path) -> None:
    """Planted: a site that holds the weights that 4 bits stand for, in full."""
    folder = save_tiny_model(tmp_path / "model")
    asked = loaded(folder, "nf4")
    dequantised(by_transformers(folder, "nf4", torch.float32)).bert.save_pretrained(tmp_path / "full")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "full")
    del saved.quantization_config
    saved.save_pretrained(tmp_path / "full")
    for file in Path(folder).glob("token*"):
        (tmp_path / "full" / file.name).write_bytes(file.read_bytes())
    for kind in ("none", "nf4"):
        there = loaded(str(tmp_path / "full"), kind)
        said = JoinReport("east", digest=there.digest).differs(JoinReport("", digest=asked.digest))
        assert re.match(r"the base model, its quantisation or its tokenizer differs: '[0-9a-f]{16}' at the site", said)
    assert not JoinReport("east", digest=loaded(folder, "nf4").digest).differs(JoinReport("", digest=asked.digest))


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_bytes_are_those_in_memory(kind: str, tmp_path: Path) -> None:
    """At a size at which scales are whole blocks; the 16-entry table of a layer's levels is not counted."""
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(save_tiny_language_model(tmp_path / "lm"))
    base = loaded(str(tmp_path / "lm"), kind, torch.bfloat16)
    held = sum(
        value.numel() * value.element_size()
        for name, value in base.model.state_dict().items()
        if "quant_map" not in name and "quant_state" not in name and "weight_format" not in name
    )
    structure = base.structure
    said = base_bytes(structure.num_parameters, structure.num_quantisable, kind, "bfloat16")
    assert said == pytest.approx(held, rel=0.02)
    assert structure.num_parameters == sum(parameter.numel() for parameter in _plain(config).parameters())


def _plain(config: Any) -> Any:
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_took_others_places_are_in_evaluation_mode(kind: str) -> None:
    """In training mode bitsandbytes' own would compute otherwise on a CPU."""
    assert not any(module.training for module in quantised_base("BERT", kind).model.modules())
