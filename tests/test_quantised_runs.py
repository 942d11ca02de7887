"""Runs on a quantised base: what is refused before it loads, what the adapter says, and that nothing is merged."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from peft import PeftConfig

from clients.deployed import own_job
from clients.errors import RefusedError
from clients.worker import Worker
from fedlora.config import Config, ConfigError, ModelConfig
from fedlora.engine import evaluate
from fedlora.engine.apart import random_tensors
from fedlora.exchange import Outcome
from fedlora.hub import check_model
from fedlora.joining import JoinReport
from fedlora.methods.residual import residual_specs
from fedlora.models import inspect_by_name, load_base, quantised
from fedlora.plugins import read_config
from fedlora.quantisation import check_quantisation
from fedlora.reports.card import model_card
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import check_adapter
from fedlora.tasks import Classification
from simulations.cli import main
from tests.support.exported import exported_run, language_flat
from tests.support.quantised import KINDS, weights_hash
from tests.support.sites import Deployment, coordinators_worker, request_of, server_config, site_file
from tests.support.tiny import save_tiny_model
from tests.support.trainers import ask, dp_worker, tiny_flat, tiny_worker
from tools.families import tiny_config

ROOT = Path(__file__).parents[1]
FLOAT32 = {"engine.dtype": "float32"}


def keys(kind: str) -> dict[str, Any]:
    return {"model.quantization": kind, **FLOAT32}


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.quantization": "nf8"}, "model.quantization = 'nf8': must be one of none, nf4, int8. Did you mean"),
        (
            {"model.quantization": "nf4", "engine.dtype": "float64"},
            "model.quantization = 'nf4': goes with engine.dtype = 'float32' or 'bfloat16', not 'float64'",
        ),
    ],
)
def test_a_configuration_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(changes)
    assert str(refused.value).startswith(message)


def saved_by(folder: Path, **config: Any) -> str:
    save_tiny_model(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return str(folder)


BNB = {"quant_method": "bitsandbytes", "load_in_8bit": True}
SAVED = [
    ("nf4", BNB, r"model.quantization = 'nf4': the checkpoint of .* is quantised already \(by bitsandbytes\); set"),
    ("none", {"quant_method": "fp8"}, "its checkpoint is quantised by fp8. Only the 4 and 8 bits that bitsandbytes"),
    ("none", {**BNB, "llm_int8_has_fp16_weight": True}, "is quantised whose activations are|activations are quantised"),
]


@pytest.mark.parametrize(("kind", "config", "message"), SAVED)
def test_a_checkpoint_that_is_quantised_already(kind: str, config: Any, message: str, tmp_path: Path) -> None:
    """Before a run starts, and where a trainer or a site loads it; before any weight is read."""
    model = ModelConfig(saved_by(tmp_path / "model", **config), quantization=kind)
    (tmp_path / "model/model.safetensors").write_bytes(b"no weights")
    for refuse in (
        lambda: check_model(model),
        lambda: load_base(model, Classification, 2, "auto", dtype=torch.float32, device=torch.device("cpu")),
    ):
        with pytest.raises(ConfigError, match=message):
            refuse()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """At the command line in one line, and at a site in words that may leave, whatever its mode."""
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == "bitsandbytes" else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    check_quantisation(ModelConfig(), None)
    with pytest.raises(SystemExit):
        main(["plan", "-c", "model.quantization='nf4'"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "model.quantization = 'nf4': needs a package that is not installed; install it with: pip install" in said
    file = site_file(tmp_path)
    with pytest.raises(RefusedError, match=r"pip install 'fedlora\[quantization\]'"):
        own_job(file, request_of(server_config(**keys("nf4"))))
    own_job(file, request_of(server_config()))


@pytest.mark.parametrize("family", ["Falcon", "Longformer"])
def test_a_family_that_cannot_be_quantised(family: str, tmp_path: Path) -> None:
    """Falcon's linear layers are of its own kind; Longformer changes a projection's output in place."""
    tiny_config(family).save_pretrained(tmp_path)
    inspect_by_name(ModelConfig(str(tmp_path)), Classification, 2, "auto")
    with pytest.raises(
        ConfigError, match=rf"'int8': the linear layers of a {family.lower()} model cannot be quantised"
    ):
        inspect_by_name(ModelConfig(str(tmp_path), quantization="int8"), Classification, 2, "auto")


def test_a_machine_on_which_it_does_not_compute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError("libbitsandbytes: no such symbol\nand a page of advice")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", no_kernel)
    model = ModelConfig(save_tiny_model(tmp_path / "model"), quantization="nf4")
    with pytest.raises(ConfigError) as refused:
        load_base(model, Classification, 2, "auto", dtype=torch.float32, device=torch.device("cpu"))
    assert str(refused.value).count("\n") == 0
    assert re.search(
        r"bitsandbytes [\d.]+ does not compute on this machine's cpu \(.*no such symbol\)", str(refused.value)
    )


def test_a_head_that_its_checkpoint_has_quantised(tmp_path: Path) -> None:
    """It is trained, which packed weights cannot be."""
    import transformers

    folder = save_tiny_model(tmp_path / "model", head=True)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, quantization_config=quantised.settings("int8", torch.float32, ["pooler"]))
    model.save_pretrained(tmp_path / "saved")
    for file in Path(folder).glob("token*"):
        (tmp_path / "saved" / file.name).write_bytes(file.read_bytes())
    saved = ModelConfig(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match="its checkpoint has quantised classifier, a layer of the head, which is trained"
    ):
        load_base(saved, Classification, 2, "auto", dtype=torch.float32, device=torch.device("cpu"))


def test_a_packed_checkpoint_in_float64(tmp_path: Path) -> None:
    model = ModelConfig(saved_by(tmp_path / "model", **BNB))
    with pytest.raises(ConfigError, match=r"engine.dtype = .float64.: model.name = .* is quantised, and bitsandbytes"):
        load_base(model, Classification, 2, "auto", dtype=torch.float64, device=torch.device("cpu"))


# -- a run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_trains_and_says_what_it_holds(kind: str, tmp_path: Path) -> None:
    """In a simulation, with and without DP, all clients in one pack; the model remarks name kind and memory."""
    for worker in (
        tiny_worker(tmp_path / "plain", **keys(kind), **{"strategy.name": "fedavg"}),
        dp_worker(tmp_path / "dp", **keys(kind)),
    ):
        assert [update.report.outcome for update in ask(worker)] == [Outcome.OK] * 4
        (line,) = [line for line in worker.describe().remarks if line.startswith("quantised")]
        assert re.fullmatch(
            rf"quantised: {kind}, 3,840 of 6,018 parameters; the base takes [\d.]+ kB instead of 24.07 kB", line
        )


def test_a_site_joins_on_the_same_base_only(tmp_path: Path) -> None:
    """Under DP, in its own process's terms; a coordinator that holds the base in full is told what differs."""
    north = Deployment(site_file(tmp_path), server_config(**keys("nf4")))
    report = north.site.join(north.request)
    quantised_one = coordinators_worker(tmp_path, north.config).describe()
    plain = coordinators_worker(tmp_path, server_config(**FLOAT32)).describe()
    seeded = {"initial_digest": plain.initial_digest, "constants_digest": plain.constants_digest}
    assert not report.differs(JoinReport("", digest=quantised_one.digest, **seeded))
    assert "its quantisation" in report.differs(JoinReport("", digest=plain.digest, **seeded))
    assert north.train().report.outcome == Outcome.OK


def model_of(worker: Worker) -> Any:
    return worker.loaded.model.engine.base.model


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_merged(kind: str, tmp_path: Path) -> None:
    """A pack, an evaluation, an export with FLoRA's stacked residual and its check leave all bits of the base."""
    worker = tiny_worker(tmp_path, **keys(kind), **{"strategy.name": "flora"})
    model, before = worker.loaded.model, weights_hash(model_of(worker))
    engine, generator = model.engine, np.random.default_rng(0)
    assert [update.report.outcome for update in ask(worker)] == [Outcome.OK] * 4
    residual = {
        name: generator.standard_normal(spec.shape).astype("float32")
        for name, spec in residual_specs(engine.method.specs(), [3] * len(engine.base.structure.adapted)).items()
    }
    tensors = {**random_tensors(model.initial, "x"), **residual}
    rows = engine.task.made_up_rows()
    without = evaluate(engine, random_tensors(model.initial, "x"), rows, range(len(rows)))["loss"]
    assert np.abs(evaluate(engine, tensors, rows, range(len(rows)))["loss"] - without).max() > 1e-3, "control"
    assert check_adapter(engine, tensors, adapter_files(engine, tensors, model.config)) < 1e-5
    assert weights_hash(model_of(worker)) == before


def test_no_code_merges_into_a_base() -> None:
    """PEFT's and transformers' names for it are nowhere in the packages; FLoRA's merge is a second term."""
    merging = re.compile(
        r"merge_and_unload|merge_adapter|\.merge_with_base|\.dequantize\(|unmerge|dequantize_and_replace"
    )
    sources = [
        path
        for name in ("fedlora", "strategies", "clients", "simulations", "deploy")
        for path in (ROOT / name).rglob("*.py")
    ]
    assert len(sources) > 150
    assert not [path for path in sources if merging.search(path.read_text())]


# -- what the adapter says ---------------------------------------------------------------------------------------


def card_of(config: Config, folder: Path, files: dict[str, bytes], head: bool) -> str:
    (folder / "adapter").mkdir(parents=True)
    for name, content in files.items():
        (folder / "adapter" / name).write_bytes(content)
    roles = {"A": Role.SHARED, "B": Role.SHARED, **({"head": Role.SHARED} if head else {})}
    return model_card(config, ("bad", "good") if head else (), {}, roles, {"guarantee": "none"}, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [True, False], ids=["classifier", "language model"])
def test_the_card_loads_the_base_as_it_was_trained_on(
    kind: str, head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code, as it is printed, has the engine's losses; adapter_config.json names the base."""
    flat = tiny_flat(tmp_path, **keys(kind)) if head else language_flat(tmp_path, **keys(kind))
    run = exported_run(tmp_path, {**flat, "strategy.name": "fedavg"})
    model = run.worker.loaded.model
    tensors = random_tensors(model.initial, "card")
    text = card_of(run.config, tmp_path, adapter_files(model.engine, tensors, model.config), head)
    assert f'model.quantization = "{kind}"' in text
    assert "never merged" in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    # On some processors bitsandbytes has a way of its own, for layers of 32 outputs or a multiple: these have 16.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    scope: dict[str, Any] = {"BASE": run.config.model.name, "TEXTS": ["w1 w2 w3", "w5"], "PROMPT": "w1 w2"}
    exec(code[1], scope)
    adapted = scope["model"]
    assert PeftConfig.from_pretrained("adapter").base_model_name_or_path == run.config.model.name
    assert quantised.describe(adapted) != ""
    for module in adapted.modules():  # bitsandbytes' own int8 layers round activations, which the card says
        if isinstance(module, bnb.nn.Linear8bitLt) and module.state.SCB is not None:
            module.weight.SCB = module.state.SCB  # which one call of them has moved
    quantised.leave_rows_alone(adapted)
    engine, task = model.engine, model.engine.task
    rows = task.made_up_rows()
    ours = evaluate(engine, tensors, rows, range(len(rows)))["loss"]
    for row, loss in enumerate(ours):
        with torch.no_grad():
            theirs = float(task.row_metrics(adapted, task.collate(rows, [row], engine.device))["loss"][0])
        assert theirs == pytest.approx(float(loss), abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_try_answers_on_a_quantised_base(
    kind: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On weights quantised as in training, and without a warning of each layer at each call."""
    run, seen = exported_run(tmp_path, {**tiny_flat(tmp_path, **keys(kind)), "strategy.name": "fedavg"}), []
    real = quantised.settings
    monkeypatch.setattr(quantised, "settings", lambda *given: seen.append(given) or real(*given))
    with pytest.raises(SystemExit) as stopped:
        main(["try", str(run.path), "w1 w2"])
    assert stopped.value.code == 0, capsys.readouterr().out
    assert "probability" in capsys.readouterr().out
    ((asked, dtype, heads),) = seen
    assert (asked, dtype, list(heads)) == (kind, torch.float32, ["classifier"])
    assert "MatMul8bitLt" not in caplog.text
