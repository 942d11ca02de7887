"""``fedlora merge``: what it writes, read by PEFT, against PEFT's own merging; quality; refusals before any work."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from fedlora.data import load_corpus
from fedlora.lego import merge_units
from fedlora.lora_files import CONFIG, WEIGHTS
from fedlora.runs.export_check import ExportError
from fedlora.runs.merged import check_written
from simulations.cli import main
from simulations.merge_sources import Source
from tests.support.exported import exported_run
from tests.support.tiny import save_tiny_model
from tests.support.trainers import tiny_flat
from tests.test_preflight import ROOT, SLOW

SHARES = [0.5, 0.3, 0.2]
WEIGHTS_GIVEN = ("--weights", "5", "3", "2")


@functools.cache
def saved_base(folder: Path) -> Any:
    save_tiny_model(folder / "base")
    return transformers.AutoModel.from_pretrained(folder / "base").double()


def base_model(folder: Path) -> Any:
    return copy.deepcopy(saved_base(folder))


def save_adapter(folder: Path, name: str, **settings: Any) -> Path:
    """Save an adapter of random numbers, as PEFT does."""
    torch.manual_seed(sum(map(ord, name)))
    adapted = get_peft_model(
        base_model(folder), LoraConfig(**{"r": 2, "target_modules": ["query", "value"]} | settings)
    )
    with torch.no_grad():
        for key, value in adapted.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape))
    adapted.save_pretrained(folder / name)
    return folder / name


def merged(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Return exit code and output of ``fedlora merge``."""
    with pytest.raises(SystemExit) as stopped:
        main(["merge", *map(str, arguments)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capsys.readouterr().out


def updates(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """What an adapter adds to the weight of each layer."""
    layers = {name: one for name, one in model.named_modules() if isinstance(one, peft.tuners.lora.LoraLayer)}
    return {name: one.get_delta_weight(adapter).detach() for name, one in layers.items() if adapter in one.lora_A}


def even(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """DARE's pruning without chance: every second entry stays."""
    mask = torch.arange(tensor.numel()).reshape(tensor.shape) % 2 == 0
    return tensor * mask / density


RULES: list[tuple[str, dict[str, Any], list[float]]] = [
    ("weighted", {"combination_type": "cat"}, SHARES),
    ("svd", {"combination_type": "svd", "svd_rank": 3}, SHARES),
    ("ties", {"combination_type": "ties", "density": 0.3}, [(3 * p) ** 2 for p in SHARES]),
    ("dare-ties", {"combination_type": "dare_ties", "density": 0.3}, [(3 * p) ** 2 for p in SHARES]),
    ("dare-linear", {"combination_type": "dare_linear", "density": 0.3}, [p**2 for p in SHARES]),
]


def test_pefts_own_merging_gives_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At other ranks and scales, too, where the rule takes them, and where an adapter lacks a layer: zero there."""
    monkeypatch.setattr(merge_utils, "random_pruning", even)
    alike = {"lora_alpha": 2}
    others: list[dict[str, Any]] = [alike, {"r": 3, "lora_alpha": 5, "use_rslora": True}]
    others.append({"r": 4, "alpha_pattern": {"value": 3}, "layers_to_transform": [1]})
    for chosen, settings in ((RULES[:2], others), (RULES[2:], [alike] * 3)):
        folders = [save_adapter(tmp_path, name, **one) for name, one in zip("abc", settings, strict=True)]
        model = PeftModel.from_pretrained(base_model(tmp_path), str(folders[0]), adapter_name="a")
        for name, folder in zip("bc", folders[1:], strict=True):
            model.load_adapter(str(folder), name)
        each = [updates(model, name) for name in "abc"]
        mean = {
            name: sum(p * one[name] for p, one in zip(SHARES, each, strict=True) if name in one) for name in each[0]
        }
        for by, theirs, weights in chosen:
            more = ("--rank", "3") if by == "svd" else ("--density", "0.3") if "density" in theirs else ()
            out = tmp_path / by
            code, said = merged(capsys, out, "--adapters", *folders, *WEIGHTS_GIVEN, "--by", by, *more)
            assert code == 0, said
            ours = updates(PeftModel.from_pretrained(base_model(tmp_path), str(out)))
            model.add_weighted_adapter(list("abc"), weights, by.replace("-", ""), **theirs)
            expected = updates(model, by.replace("-", ""))
            assert len(ours) == 4
            assert ours.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.allclose(ours[name], value, atol=1e-5), (by, name)
            off = sum(float((ours[name] - mean[name]).norm() ** 2) for name in mean) ** 0.5
            off /= sum(float(value.norm() ** 2) for value in mean.values()) ** 0.5  # type: ignore[union-attr]
            assert float(said.split()[-1]) == pytest.approx(off, rel=0.1, abs=1e-6)
            assert (off < 1e-6) is (by == "weighted")


def test_lego_and_random_pruning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """LEGO by its function; what DARE draws is the same each time."""
    folders = [save_adapter(tmp_path, name, r=rank, lora_alpha=3) for name, rank in (("a", 2), ("b", 4))]
    assert merged(capsys, tmp_path / "out", "--adapters", *folders, "--by", "lego", "--rank", "3")[0] == 0
    loaded, (_, rest) = [Source.read(one).load()[0] for one in folders], Source.read(folders[0]).load()
    assert not rest
    for layer, product in Source.read(tmp_path / "out").load()[0].items():
        a, b = merge_units([one[layer] for one in loaded], [0.5, 0.5], 3)
        assert np.abs(product[0] - a).max() < 1e-6
        assert np.abs(product[1] - b).max() < 1e-6
    alike = [folders[0], save_adapter(tmp_path, "c", lora_alpha=3)]
    drawn = []
    for name in ("once", "again"):
        assert merged(capsys, tmp_path / name, "--adapters", *alike, "--by", "dare-linear")[0] == 0
        drawn.append(load_file(tmp_path / name / WEIGHTS))
    assert all(torch.equal(drawn[1][key], value) for key, value in drawn[0].items())
    assert 0.1 < float(np.mean([(value == 0).double().mean() for value in drawn[0].values()])) < 0.4, "of two, 0.25"


def scores(said: str) -> dict[str, list[float]]:
    """The numbers of a printed table by the first word of their line."""
    lines = [line.split() for line in said.splitlines()]
    return {words[0]: [float(word) for word in words[1:] if word[0].isdigit()] for words in lines if words}


def test_quality_before_and_after_on_a_runs_test_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By plain PEFT what the engine finds; an adapter merged with itself is as good, head and all."""
    run = exported_run(tmp_path, tiny_flat(tmp_path, **{"strategy.name": "local"}), clients=2)
    monkeypatch.chdir(run.path / "adapters")
    one, two, out = Path("client-0"), Path("client-1"), Path("out")
    code, said = merged(capsys, out, "--adapters", one, two, "--run", run.path, "--weights", "1", "3")
    assert code == 0, said
    facts = run.worker.evaluate(run.tensors, "test", range(len(load_corpus(run.config).test)))
    shown = scores(said)
    assert shown[str(two)] == pytest.approx([facts["accuracy"].mean(), facts["loss"].mean()], abs=1e-4)
    assert shown[str(out)] not in (shown[str(one)], shown[str(two)])
    heads = [load_file(folder / WEIGHTS)["base_model.model.classifier.weight"] for folder in (one, two, out)]
    assert torch.allclose(heads[2], 0.25 * heads[0] + 0.75 * heads[1])
    assert heads[2].dtype == torch.float64
    assert (out / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()
    code, said = merged(capsys, "same", "--adapters", two, two, "--run", run.path, "--by", "lego")
    assert code == 0, said
    assert scores(said)["same"] == shown[str(two)]


def test_a_written_adapter_that_peft_reads_otherwise_is_not_passed(tmp_path: Path) -> None:
    """Planted: a scale, an entry, a layer."""
    folder = save_adapter(tmp_path, "a", r=2, lora_alpha=2, rank_pattern={"value": 3}, alpha_pattern={"value": 3})
    products, _ = Source.read(folder).load()
    check_written(folder, products)
    about, weights = (folder / CONFIG).read_text(), load_file(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({**json.loads(about), "lora_alpha": 3}))
    with pytest.raises(ExportError, match="is not what was merged"):
        check_written(folder, products)
    (folder / CONFIG).write_text(about)
    key = next(iter(weights))
    for changed in ({**weights, key: weights[key] * 1.01}, {k: v for k, v in weights.items() if k != key}):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(ExportError, match="is not what was merged"):
            check_written(folder, products)


def test_adapters_that_cancel_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is left of them is rounding, and no fault."""
    first, turned = save_adapter(tmp_path, "first"), save_adapter(tmp_path, "first-too")
    weights = load_file(first / WEIGHTS)
    save_file({key: -value if "lora_B" in key else value for key, value in weights.items()}, turned / WEIGHTS)
    code, said = merged(capsys, tmp_path / "out", "--adapters", first, turned, "--by", "svd", "--rank", "2")
    assert code == 0, said
    ours = updates(PeftModel.from_pretrained(base_model(tmp_path), str(tmp_path / "out")))
    assert all(float(one.abs().max()) < 1e-5 for one in ours.values())


def test_what_cannot_be_merged_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save_adapter(tmp_path, "first")
    other = save_adapter(tmp_path, "other", r=3)
    magnitudes = save_adapter(tmp_path, "dora", use_dora=True)
    fewer = save_adapter(tmp_path, "fewer", target_modules=["query"])
    embedding = save_adapter(tmp_path, "embedding", target_modules=["query", "value", "word_embeddings"])
    changes: dict[str, dict[str, Any]] = {
        "elsewhere": {"base_model_name_or_path": "some/other"},
        "revised": {"revision": "v2"},
        "writes": {"task_type": "CAUSAL_LM"},
        "pooled": {"use_qalora": True},
    }
    for name, change in changes.items():
        folder = save_adapter(tmp_path, name)
        (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **change}))
    empty = save_adapter(tmp_path, "empty")
    save_file({}, empty / WEIGHTS)
    wide, infinite = save_adapter(tmp_path, "wide"), save_adapter(tmp_path, "infinite")
    weights = load_file(wide / WEIGHTS)
    key = next(key for key in weights if key.endswith("lora_A.weight"))
    save_file({**weights, key: torch.zeros(2, 17)}, wide / WEIGHTS)
    save_file({**weights, key: weights[key] * torch.inf}, infinite / WEIGHTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    out = tmp_path / "out"
    cases: list[tuple[list[Any], str]] = [
        ([first, tmp_path / "none"], "no PEFT adapter can be read there"),
        ([first, magnitudes], "it has use_dora = True"),
        ([first, tmp_path / "pooled"], "it has use_qalora = True"),
        ([first, tmp_path / "elsewhere"], "its base model is some/other, and of "),
        ([first, tmp_path / "revised"], "revision v2, and of "),
        ([first, tmp_path / "writes"], "task_type CAUSAL_LM, and of "),
        ([first, fewer], "it adapts the modules query, and of "),
        ([first, embedding], "is neither A or B of a linear layer nor in modules_to_save"),
        ([empty, empty], "it has no A and B of any linear layer"),
        ([first, wide], "has 17 features in and 16 out, and of "),
        ([first, infinite], "has numbers that are not finite"),
        ([first, other, "--weights", "1"], "--weights: there are 1 of them, and 2 adapters"),
        ([first, other, "--weights", "1", "0"], "--weights 1 0: each must be above 0"),
        ([first, other, "--by", "tyes"], "--by: unknown name 'tyes'. Did you mean 'ties'?"),
        ([first, other, "--by", "ties"], "has the ranks 2, 3, and this rule needs the same"),
        ([first, first, "--by", "ties", "--density", "1.5"], "--density 1.5: must be above 0 and below 1"),
        ([first, other, "--rank", "2"], "--rank goes with --by lego, svd, not with weighted"),
        ([first, other, "--by", "svd", "--rank", "6"], "--rank 6: must be at least 1, and at most 5"),
        ([first, other, "--run", tmp_path], "is not a run folder"),
    ]
    for arguments, message in cases:
        code, said = merged(capsys, out, "--adapters", *arguments)
        assert (code, said.count("\n")) == (2, 1), said
        assert message in said
        assert not out.exists()
    code, said = merged(capsys, tmp_path / "full", "--adapters", first, first)
    assert (code, said.count("\n")) == (2, 1), said
    assert "is there already; name a new folder" in said


def test_refusals_do_not_wait_for_torch(tmp_path: Path) -> None:
    folders = [save_adapter(tmp_path, name, r=rank) for name, rank in (("a", 2), ("b", 3))]
    code = "import sys; from simulations.cli import run; from rich.console import Console\n"
    code += "try: run(sys.argv[1:], Console())\nexcept ValueError as error: print(error); print(*sys.modules)"
    command = [sys.executable, "-c", code, "merge", tmp_path / "out", "--by", "ties", "--adapters", *folders]
    said, modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "this rule needs the same in all adapters" in said
    assert not {name.partition(".")[0] for name in modules.split()} & set(SLOW)
