"""Runs that start from an adapter: the same outputs at any rank and scale, and refusals that say what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from clients.site import Description
from clients.worker import Worker
from fedlora.config import Config, ConfigError
from fedlora.runs.folder import RunFolder
from fedlora.state import ServerState
from simulations.in_process import InProcess, Resident
from simulations.preflight import preflight
from simulations.setup import resolve
from tests.support.exported import Exported, exported_run, language_flat
from tests.support.trainers import tiny_flat, tiny_job, tiny_worker

ROWS = range(10)
WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.classifier"


@pytest.fixture
def first(tmp_path: Path) -> Exported:
    """A finished run on LoRA of rank 2, whose adapter holds random tensors."""
    return exported_run(tmp_path, tiny_flat(tmp_path, **{"strategy.name": "fedavg"}))


def started(folder: Path, **changes: Any) -> Worker:
    """A worker of a run that starts from the first one's adapter."""
    flat = {"strategy.name": "fedavg", "method.start": str(folder / "runs" / "run" / "adapter"), **changes}
    return tiny_worker(folder, **flat)


def worker_of(flat: dict[str, Any], folder: Path) -> Worker:
    job = tiny_job(resolve(flat), folder)
    return Worker(lambda: job, 1)


def federation_of(config: Config, folder: Path) -> tuple[InProcess, Description]:
    """A federation as a new process would have it."""
    job = tiny_job(config, folder)
    worker = Worker(lambda: job, 1)
    worker.load()
    return InProcess(config, job.data, worker), worker.describe()


def losses(worker: Worker, tensors: Any) -> Any:
    return worker.evaluate(tensors, "test", ROWS)["loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method.rank": 3},
        {"method.rank": 5, "method.alpha": 3.0},
        {"method.rank": 4, "method.rslora": True},
        {"method.target-modules": "query,key,value"},
        {"strategy.name": "ffa-lora"},
        {"strategy.name": "zero-padding", "method.rank": 3, "method.ranks": "3,2,3,2"},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "as it was",
)
def test_it_starts_where_the_adapter_ended(first: Exported, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Losses of the new run before its first round are those of the first one's tensors; the seed's are others."""
    worker = started(tmp_path, **changes)
    expected = losses(first.worker, first.tensors)
    # The adapter is exported in float64 here: what is left is the rounding of scales.
    assert np.abs(losses(worker, {}) - expected).max() < 1e-9
    assert np.abs(losses(tiny_worker(tmp_path, **{"strategy.name": "fedavg"}), {}) - expected).max() > 1e-3
    # What the server starts with is what clients start with.
    described = worker.describe()
    initial = described.initial(worker.loaded.model.config)
    assert all(np.array_equal(value, worker.loaded.model.initial[name]) for name, value in initial.items())


@pytest.mark.parametrize(
    "changes",
    [{}, {"method.rank": 5, "method.alpha": 3.0}, {"method.target-modules": "q_proj,k_proj,v_proj"}],
    ids=["as it was", "another rank", "more layers"],
)
def test_a_language_model_starts_where_the_adapter_ended(changes: dict[str, Any], tmp_path: Path) -> None:
    """A Llama, whose norms compute in float32, so that the scales' rounding in float64 shows up to 1e-5."""
    first = exported_run(tmp_path, language_flat(tmp_path), scale=0.3)
    flat = language_flat(tmp_path, **{"method.start": str(first.path / "adapter"), **changes})
    worker = worker_of(flat, tmp_path)
    expected = losses(first.worker, first.tensors)
    assert np.abs(losses(worker, {}) - expected).max() < 1e-5
    assert np.abs(losses(worker_of(language_flat(tmp_path), tmp_path), {}) - expected).max() > 1e-2


def test_ranks_that_the_adapter_lacks_can_be_trained(first: Exported, tmp_path: Path) -> None:
    """Their A is the seed's and their B zero."""
    plain = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.rank": 5}).loaded.model.initial
    initial = started(tmp_path, **{"method.rank": 5}).loaded.model.initial
    for name in initial:
        if name.endswith("lora_A"):
            assert np.array_equal(initial[name][2:], plain[name][2:])
            assert not np.array_equal(initial[name][:2], plain[name][:2])
        if name.endswith("lora_B"):
            assert not initial[name][:, 2:].any()
            assert initial[name][:, :2].any()


def test_a_federation_goes_on_from_it(first: Exported, tmp_path: Path) -> None:
    """Rounds of a real worker: the first instruction holds the adapter, and training moves it."""
    flat = tiny_flat(tmp_path, **{"strategy.name": "fedavg", "method.start": str(first.path / "adapter")})
    config = resolve(flat)
    job = tiny_job(config, tmp_path)
    federation = Resident(1).federation(config, job.data, str(tmp_path / "kept"))
    before = {name: value.copy() for name, value in federation.core.state.tensors.items()}
    name = next(name for name in before if name.endswith("lora_B"))
    assert before[name].any()
    federation.train(1)
    assert np.abs(federation.core.state.tensors[name] - before[name]).max() > 0


@pytest.mark.parametrize("flat_of", [tiny_flat, language_flat], ids=["bert", "llama"])
def test_a_run_that_has_started_from_it_is_resumed(flat_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """From where its folder has moved to, to the bits of an undisturbed run; not from an adapter that has changed.

    Under FFA-LoRA no client is ever sent A: were it not that of the adapter, nothing but the check would say so.
    """
    adapter = exported_run(tmp_path, flat_of(tmp_path, **{"strategy.name": "fedavg"})).path / "adapter"
    moved = tmp_path / "moved"
    keys = {"strategy.name": "ffa-lora", "run.dir": str(tmp_path / "runs"), "run.name": "second"}

    def config_of(start: Path, *, resume: bool = True) -> Config:
        return resolve(flat_of(tmp_path, **keys, **{"method.start": str(start), "run.resume": resume}))

    def resumed(start: Path, *, same: bool = True) -> InProcess:
        config = config_of(start)
        with RunFolder.opened(config) as folder:
            run, described = federation_of(config, tmp_path)
            checkpoint = folder.read_checkpoint(described.resumed if same else {})
            assert checkpoint is not None
            run.core.state = ServerState.read(checkpoint.arrays, checkpoint.state["clients"])
            return run

    def is_undisturbed(run: InProcess) -> bool:
        run.train(2)
        tensors, expected = run.core.state.tensors, undisturbed.core.state.tensors
        return all(np.array_equal(tensors[name], expected[name]) for name in expected)

    config = config_of(adapter, resume=False)
    undisturbed, described = federation_of(config, tmp_path)
    with RunFolder.opened(config) as folder:
        undisturbed.train(1)
        state = undisturbed.core.state
        folder.checkpoint(1, state.arrays(), {**described.resumed, "clients": state.clients.record()})
        undisturbed.train(2)
    adapter.rename(moved)
    with pytest.raises(ConfigError, match=r"no PEFT adapter can be read there .* or where it has moved to"):
        resumed(adapter)
    assert is_undisturbed(resumed(moved))
    with_tensors(moved, larger)
    with pytest.raises(ValueError, match=r"has start = '\w+', and this is '\w+' \(the adapter in method.start, or "):
        resumed(moved)
    assert not is_undisturbed(resumed(moved, same=False)), "planted: nobody compares the adapter"


def test_an_adapter_that_peft_has_made(tmp_path: Path) -> None:
    """Ranks and alphas by pattern: the run's losses are PEFT's."""
    flat = tiny_flat(tmp_path, **{"strategy.name": "fedavg", "method.rank": 4})
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(flat["model.name"], num_labels=2)
    layers = [name for name, _ in base.named_modules() if name.endswith(("query", "value"))]
    peft = get_peft_model(
        base.double(),
        LoraConfig(
            r=2, lora_alpha=6, target_modules=["query", "value"], modules_to_save=["classifier"],
            rank_pattern={f"^{layers[0].replace('.', '[.]')}$": 3}, alpha_pattern={"value": 5}, init_lora_weights=False,
        ),
    )  # fmt: skip
    peft.save_pretrained(str(tmp_path / "peft"))
    worker = tiny_worker(tmp_path, **{**flat, "method.start": str(tmp_path / "peft")})
    model = worker.loaded.model
    batch = model.engine.task.collate(model.examples["test"], ROWS, torch.device("cpu"))
    with torch.no_grad():
        logits = peft.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = torch.tensor([int(model.examples["test"].targets[row]) for row in ROWS])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none").numpy()
    assert np.abs(losses(worker, {}) - expected).max() < 1e-9


def changed(adapter: Path, **about: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **about}))


def with_tensors(adapter: Path, change: Any) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def larger(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = 2 * tensors[name]


def wider(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], 1)


def more_classes(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("classifier.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], 0)


def half(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("lora_A.weight"))]


def spoilt(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(name for name in tensors if name.endswith("lora_B.weight"))][0, 0] = torch.nan


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no adapter": (lambda path: shutil.rmtree(path), {}, "no PEFT adapter can be read there"),
    "no weights": (
        lambda path: (path / WEIGHTS).write_bytes(b"x"),
        {},
        "no PEFT adapter can be read",
    ),
    "another kind": (lambda path: changed(path, peft_type="VERA"), {}, "it is of the kind VERA, not LORA"),
    "DoRA": (lambda path: changed(path, use_dora=True), {}, "it has use_dora = True, which a plain LoRA has not"),
    "another base": (
        lambda path: changed(path, base_model_name_or_path="FacebookAI/roberta-large"),
        {},
        "its base model is 'FacebookAI/roberta-large', and the run's is",
    ),
    "a larger rank": (
        lambda path: None,
        {"method.rank": 1},
        "and each of method.ranks, to 2 or more",
    ),
    "a client of a smaller rank": (
        lambda path: None,
        {"strategy.name": "zero-padding", "method.ranks": "1,2,1,2"},
        "has rank 2; set method.rank, and each of method.ranks, to 2",
    ),
    "another base of its own": (lambda path: changed(path, init_lora_weights="pissa"), {}, "may have changed the base"),
    "no mapping": (
        lambda path: (path / "adapter_config.json").write_text("[1]"),
        {},
        "it is of the kind [1], not LORA",
    ),
    "LoRA on the head": (
        lambda path: with_tensors(path, lambda t: t.update({f"{HEAD}.lora_A.weight": torch.ones(2, 2)})),
        {},
        "tensors that the run does not train: ",
    ),
    "half a layer": (lambda path: with_tensors(path, half), {}, "it has one factor only"),
    "not finite": (lambda path: with_tensors(path, spoilt), {}, "numbers that are not finite"),
    "other layers": (lambda path: None, {"method.target-modules": "key"}, "it is on none of the run's layers, such as"),
    "fewer layers": (lambda path: None, {"method.target-modules": "query"}, "tensors that the run does not train: "),
    "other shapes": (lambda path: with_tensors(path, wider), {}, "has factors of"),
    "other classes": (lambda path: with_tensors(path, more_classes), {}, "of its head is [4, "),
}


@pytest.mark.parametrize("why", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_before_a_run(why: str, first: Exported, tmp_path: Path) -> None:
    """By the check before a run, and by a worker that is given it all the same."""
    spoil, changes, reason = REFUSED[why]
    spoil(first.path / "adapter")
    worker = started(tmp_path, **changes)
    with pytest.raises(ConfigError, match=r"method.start = ") as caught:
        worker.load()
    assert reason in str(caught.value)
    config = resolve(
        tiny_flat(tmp_path, **{"strategy.name": "fedavg", "method.start": str(first.path / "adapter"), **changes})
    )
    with pytest.raises(ConfigError) as again:
        preflight(config, 2)
    assert str(again.value) == str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strategy.name": "flora"}, "strategy 'flora' start a fresh LoRA in every round"),
        ({"strategy.name": "florist"}, "strategy 'florist' start a fresh LoRA in every round"),
        ({"strategy.name": "mos"}, "is read by lora, not 'mos'"),
        ({"strategy.name": "fed-sb"}, "is read by lora, not 'lora-sb'"),
    ],
)
def test_where_it_would_be_lost_it_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.start = ") as caught:
        resolve(tiny_flat(tmp_path, **{"method.start": str(tmp_path), **changes}))
    assert reason in str(caught.value)


def test_the_plan_says_what_is_started_from(first: Exported, tmp_path: Path) -> None:
    flat = {"strategy.name": "fedavg", "method.start": str(first.path / "adapter")}
    plan, _ = preflight(resolve(tiny_flat(tmp_path, **flat)), 2)
    assert any("start: the adapter" in line for line in plan.remarks)
    assert any("head: starts as the start adapter has it" in line for line in plan.remarks)
    worker = started(tmp_path)
    worker.load()
    assert worker.describe().remarks == plan.remarks, "a run says what its plan has said"
    private = {**flat, "privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "data.partition": "iid"}
    plan, _ = preflight(resolve(tiny_flat(tmp_path, **private)), 2)
    assert any("is not covered by the epsilon of this run" in line for line in plan.remarks)


def test_planted_a_scale_that_is_left_as_it_was(first: Exported, tmp_path: Path) -> None:
    """Factors taken over without alpha / r are another model: seen by the equality above."""
    worker = started(tmp_path, **{"method.rank": 5, "method.alpha": 3.0})
    initial, own = worker.loaded.model.initial, 3.0 / 5
    unscaled = {name: value * own if name.endswith("lora_B") else value for name, value in initial.items()}
    assert np.abs(losses(worker, unscaled) - losses(first.worker, first.tensors)).max() > 1e-3
