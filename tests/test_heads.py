"""Heads: every tensor is saved, a trained head is kept where the classes agree, and the card's snippet works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load

from fedlora.engine import evaluate
from fedlora.engine.apart import random_tensors
from fedlora.methods import initial_tensors
from fedlora.models import head_words, keeps_head
from fedlora.reports.card import model_card
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter, same_numbers
from fedlora.seeded import Seeded
from tests.support.families import small_model, without_float32
from tests.support.matrix import CONFIGS, random_start
from tests.support.matrix import engine_of as matrix_engine
from tests.support.tiny import save_tiny_model
from tests.support.trainers import tiny_worker
from tools import model_table
from tools.model_table import engine_of


def exported(family: str) -> tuple[Any, Any, dict[str, bytes]]:
    engine, config = engine_of(family)
    tensors = random_tensors(initial_tensors(engine.method.specs(), Seeded(0)), "export")
    return engine, tensors, adapter_files(engine, tensors, config)


def test_modernberts_head_is_saved_whole() -> None:
    """Its norm and biases, too: PEFT loads the head's modules whole, and would take what lacks from anywhere."""
    engine, tensors, files = exported("ModernBERT")
    names = {name for name in load(files["adapter_model.safetensors"]) if "lora" not in name}
    wanted = {f"base_model.model.{layer.name}.weight" for layer in engine.base.structure.head}
    assert wanted <= names
    assert {name for name in names if name.endswith("head.norm.weight")}
    assert check_adapter(engine, tensors, files) < 1e-12


@pytest.mark.parametrize("lost", ["head.norm.weight", "lora_B"])
def test_an_adapter_that_lacks_a_tensor_is_not_finished(lost: str) -> None:
    """Planted: the export forgets a tensor; plain PEFT would load it and say nothing."""
    from safetensors.torch import save

    engine, tensors, files = exported("ModernBERT")
    weights = load(files["adapter_model.safetensors"])
    kept = {name: value for name, value in weights.items() if lost not in name}
    assert len(kept) < len(weights)
    with pytest.raises(ExportError, match=r"cannot be loaded in PEFT|does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, {**files, "adapter_model.safetensors": save(kept)})


def test_what_16_bits_round_away_is_no_fault_of_an_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large factors: losses of the same adapter differ by more than the usual bound, here by up to 1 in 6."""
    from safetensors.torch import save

    whole = model_table.tiny_model
    monkeypatch.setattr(model_table, "tiny_model", lambda family: whole(family).to(torch.bfloat16))
    engine, config = engine_of("BERT")
    start = random_tensors(initial_tensors(engine.method.specs(), Seeded(0)), "export")
    for size in (3, 6, 10):
        tensors = {name: (size if "lora" in name else 10) * value for name, value in start.items()}
        files = adapter_files(engine, tensors, config)
        check_adapter(engine, tensors, files)
        weights = load(files["adapter_model.safetensors"])  # planted: an update is lost, whatever rounding hides
        one = next(name for name in weights if "lora_B" in name)
        lost = save({name: value * (name != one) for name, value in weights.items()})
        if size == 6:
            with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
                check_adapter(engine, tensors, {**files, "adapter_model.safetensors": lost})


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("lora", ["lora_A.default.weight", "lora_B.default.weight"]),
        ("dora", ["lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"]),
        ("vera", ["vera_lambda_d.default", "vera_lambda_b.default", "vera_A.default", "vera_B.default"]),
        ("randlora", [f"randlora_{part}.default" for part in ("lambda", "gamma", "A", "B")]),
    ],
)
def test_the_numbers_of_an_adapter_are_compared_where_losses_are_too_coarse(
    method: str, parts: list[str], tmp_path: Path
) -> None:
    """As they are in 16 bits: each part of PEFT's layers counts, and is told when it is a tenth off."""
    engine = matrix_engine(method, "bert")
    tensors = random_start(engine)
    for file, content in adapter_files(engine, tensors, CONFIGS[method]).items():
        (tmp_path / file).write_bytes(content)
    adapted = PeftModel.from_pretrained(without_float32(small_model("bert")), str(tmp_path))
    assert same_numbers(engine, tensors, adapted)
    numbers = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
    for part in parts:
        one = next(value for name, value in numbers.items() if name.endswith(part))
        with torch.no_grad():
            one.mul_(1.1)
            assert not same_numbers(engine, tensors, adapted), part
            one.div_(1.1)
            assert same_numbers(engine, tensors, adapted), part


def test_the_check_leaves_the_engine_as_it_was() -> None:
    engine, tensors, files = exported("ModernBERT")
    rows = engine.task.made_up_rows(long=True)
    before = evaluate(engine, tensors, rows, range(len(rows)))["loss"]
    names = [name for name, _ in engine.base.model.named_modules()]
    check_adapter(engine, tensors, files)
    np.testing.assert_array_equal(evaluate(engine, tensors, rows, range(len(rows)))["loss"], before)
    assert [name for name, _ in engine.base.model.named_modules()] == names


@pytest.mark.parametrize(
    ("policy", "labels", "classes", "kept", "words"),
    [
        ("auto", (), ("a", "b"), False, "anew, from the seed"),
        (
            "auto",
            ("LABEL_0", "LABEL_1"),
            ("bad", "good"),
            True,
            "as the checkpoint has trained it, for LABEL_0, LABEL_1",
        ),
        ("auto", ("Bad", "Good"), ("bad", "good"), True, "as the checkpoint has trained it, for Bad, Good"),
        (
            "auto",
            ("good", "bad"),
            ("bad", "good"),
            False,
            "anew, from the seed (the checkpoint's classes are good, bad",
        ),
        ("auto", ("a", "b", "c"), ("a", "b"), False, "has 3 classes and the data 2"),
        ("fresh", ("a", "b"), ("a", "b"), False, "anew, from the seed (method.head-start = 'fresh')"),
    ],
)
def test_where_the_head_starts(
    policy: str, labels: tuple[str, ...], classes: tuple[str, ...], kept: bool, words: str
) -> None:
    assert keeps_head(policy, labels, classes) is kept
    assert words in head_words(policy, labels, classes)


def test_a_head_that_is_not_there_cannot_be_asked_for() -> None:
    for labels, why in (((), "has no head for this task"), (("a", "b", "c"), "has 3 classes and the data 2")):
        with pytest.raises(ValueError, match=rf"method.head-start = 'checkpoint': .*{why}; use 'fresh'"):
            keeps_head("checkpoint", labels, ("a", "b"))


@pytest.mark.parametrize("policy", ["auto", "fresh"])
def test_a_trained_head_is_what_the_run_starts_with(policy: str, tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "headed", head=True)
    worker = tiny_worker(tmp_path, **{"method.head-start": policy, "model.name": base})
    worker.load()
    described, config = worker.describe(), worker.loaded.model.config
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.name).classifier.weight
    own = described.initial(config)["classifier.weight"]
    assert np.array_equal(own, saved.detach().numpy().astype(own.dtype)) is (policy == "auto")
    assert any("as the checkpoint has trained it" in line for line in described.remarks) is (policy == "auto")


@pytest.mark.parametrize("classes", [2, 5], ids=["", "base of other classes"])
def test_the_cards_snippet_runs(classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is printed, on a base whose own head has as many classes, or others."""
    worker = tiny_worker(tmp_path, **{"method.head-start": "fresh"})
    model = worker.loaded.model
    tensors = random_tensors(model.initial, "card")
    base = save_tiny_model(tmp_path / "base")
    if classes != 2:
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        loaded.classifier = torch.nn.Linear(loaded.config.hidden_size, classes)
        loaded.config.num_labels = classes
        loaded.save_pretrained(base)
    for name, content in adapter_files(model.engine, tensors, model.config).items():
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_bytes(content)
    roles = {"A": Role.SHARED, "B": Role.SHARED, "head": Role.SHARED}
    card = model_card(model.config, ("bad", "good"), {}, roles, {"guarantee": "none"}, 1)
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"BASE": base, "TEXTS": ["w1 w2 w3", "w5"]}
    exec(code[1], names)
    adapted: PeftModel = names["model"]
    with torch.no_grad():
        logits = adapted(**names["inputs"]).logits
    assert logits.shape == (2, 2)
    engine = model.engine
    rows = engine.task.made_up_rows()
    ours = evaluate(engine, tensors, rows, range(len(rows)))["loss"]
    for row, loss in enumerate(ours):
        batch = engine.task.collate(rows, [row], engine.device)
        with torch.no_grad():
            theirs = float(engine.task.row_metrics(adapted, batch)["loss"][0])
        assert theirs == pytest.approx(float(loss), abs=1e-4)
