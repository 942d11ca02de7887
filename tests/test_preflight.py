"""What is tried before a run: in an order in which the quick refusals come first."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import ModelConfig, to_toml
from fedlora.hub import check_model
from fedlora.plugins import schema
from simulations.cli import main
from simulations.preflight import Preflight, preflight
from simulations.setup import resolve
from simulations.sweeps.file import Sweep
from tests.support.tiny import save_tiny_model
from tests.support.trainers import tiny_flat

ROOT = Path(__file__).parents[1]
SLOW = ("torch", "transformers", "peft", "opacus", "ray", "datasets", "flwr_datasets", "matplotlib", "scipy")

_REFUSED = """
import contextlib, io, json, sys
from simulations.cli import main
option, said = sys.argv[1], io.StringIO()
try:
    with contextlib.redirect_stdout(said):
        main(["plan", "-c", option])
except SystemExit as end:
    print(json.dumps([end.code, said.getvalue(), sorted(sys.modules)]))
"""


def refused(option: str) -> tuple[str, set[str]]:
    """What ``fedlora plan`` says of an option in a process of its own, and the packages that it imported for it."""
    answer = subprocess.run(
        [sys.executable, "-c", _REFUSED, option], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code, said, modules = json.loads(answer.stdout)
    assert code == 2, said
    assert len(said.splitlines()) == 1
    return said, {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("strategy.name='fedvg'", "strategy.name: unknown name 'fedvg'"),
        ("model.name='no/such-model'", "model.name = 'no/such-model': cannot be loaded ("),
        ("federation.num-clients=100000000", "federation.num-clients = 100000000: 1600 training rows cannot give"),
        ("data.path='missing.csv'", "missing.csv': no such file"),
    ],
)
def test_what_can_be_refused_without_the_model_is_refused_at_once(option: str, message: str) -> None:
    """Importing torch, transformers and the partitioner takes four to six seconds."""
    said, imported = refused(option)
    assert message in said
    assert not imported & set(SLOW)


def test_what_the_model_refuses_waits_for_nothing_else() -> None:
    said, imported = refused("method.target-modules='nothing_here'")
    assert "method.target-modules = 'nothing_here': PEFT cannot adapt a bert model so" in said
    assert not imported & {"opacus", "ray", "datasets", "flwr_datasets", "matplotlib"}


def test_a_model_that_is_not_there_is_refused_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Path(save_tiny_model(tmp_path / "model"))
    check_model(ModelConfig(str(model)))
    for name in ("minilm", "small-llama"):
        check_model(ModelConfig(name))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (model / "model.safetensors").unlink()
    (tmp_path / "empty").mkdir()
    for name, reason in (
        (str(model), r"the folder has no weights, \*.safetensors or \*.bin"),
        (str(tmp_path / "empty"), r"the folder has no config.json"),
        (str(tmp_path / "none"), r"there is no such folder"),
        ("./none", r"there is no such folder"),
        ("some/where/deep", r"there is no such folder"),
        ("some/model", r"it is no folder, it is not in the hub's cache, and the hub is switched off"),
        ("not a name", r"Repo id must"),
    ):
        with pytest.raises(ValueError, match=rf"cannot be loaded \({reason}.*local folder.*connect to the network"):
            check_model(ModelConfig(name))


def swept(folder: Path, capsys: pytest.CaptureFixture[str], **flat: Any) -> tuple[int, str]:
    """Exit code and output of ``fedlora sweep`` on the tiny model, which must not start."""
    file = folder / "sweep.toml"
    file.write_text(to_toml({**tiny_flat(folder), "run.dir": str(folder / "runs"), **flat}))
    with pytest.raises(SystemExit) as end:
        main(["sweep", str(file), str(ROOT)])
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("method.target-modules", ["query", "query,value", "qery"], "'qery'"),
        ("method.rank", [1, 2, 100_000], "method.rank = 100000: the adapted layers have 16 features at most"),
        ("model.name", ["MODEL", "minilm", "no/such-model"], "model.name = 'no/such-model': cannot be loaded"),
        ("strategy.name", ["fedavg", "ffa-lora", "fedvg"], "strategy.name: unknown name 'fedvg'"),
        ("train.max-length", [8, 48, 4096], "train.max-length = 4096: the model takes 64 tokens at most"),
        ("federation.num-clients", [2, 4, 5000], "federation.num-clients = 5000: 96 training rows"),
        ("data.label-column", ["label", "text", "lable"], "no such column"),
        ("seed", [0, 1, -1], "seed = -1"),
    ],
)
def test_each_cell_of_a_sweep_is_tried_before_the_first_runs(
    key: str, values: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if key == "model.name":
        values = [save_tiny_model(tmp_path / "other"), *values[1:]]
    if key == "data.label-column":
        values = ["label", values[-1]]
    code, said = swept(tmp_path, capsys, **{f"grid.{key}": values, "grid.rounds": [1, 2]})
    assert code == 2, "1 is that of a sweep that was started"
    assert message in said
    assert str(values[-1]) in said
    assert not (tmp_path / "runs").exists()


def test_a_cell_that_cannot_work_is_named_and_finished_ones_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second value is tried for every seed, and the one that is finished is not tried again."""
    grid = {"grid.method.rank": [2, 90], "grid.seed": [0, 1]}
    flat = {**tiny_flat(tmp_path), "run.dir": str(tmp_path / "runs"), "run.name": "sweep"}
    (tmp_path / "sweep.toml").write_text(to_toml({**flat, **grid}))
    done = Sweep.read(str(tmp_path / "sweep.toml"), schema().defaults()).finals({"method.rank": 2}, {})[0]
    done.folder.mkdir(parents=True)
    (done.folder / "result.json").write_text('{"test_accuracy": 0.5}')
    code, said = swept(tmp_path, capsys, **grid)
    assert code == 2
    assert "cell method.rank=90 seed=0: method.rank = 90: the adapted layers have 16 features at most" in said
    assert f"Finished already, and kept: 1 of 4 cells in {tmp_path / 'runs' / 'sweep'}." in said
    assert [file.name for file in done.folder.iterdir()] == ["result.json"]


def test_what_cells_have_in_common_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every plan is what it would be by itself, and a grid of forty costs little more than its different parts."""
    counts = Counter[str]()
    for place, name in (
        ("simulations.preflight", "load_corpus"),
        ("fedlora.models", "inspect_by_name"),
        ("fedlora.models", "load_tokenizer"),
        ("fedlora.engine.rehearsal", "rehearse"),
    ):
        real = getattr(importlib.import_module(place), name)

        def counted(*arguments: Any, name: str = name, real: Any = real) -> Any:
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(f"{place}.{name}", counted)
    flat = {**tiny_flat(tmp_path), "strategy.name": "fedavg", "run.name": "run"}
    grid = itertools.product((1, 2), ("query", "query,value"), (2, 4), (0.1, 0.2), (0, 1))
    configs = [
        resolve(
            {
                **flat,
                "method.rank": rank,
                "method.target-modules": targets,
                "federation.num-clients": clients,
                "train.learning-rate": rate,
                "seed": seed,
            }
        )
        for rank, targets, clients, rate, seed in grid
    ]
    configs.append(resolve({**flat, "privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.unit": "record"}))
    shared = Preflight(2)
    plans = [shared.plan(config) for config in sorted(configs, key=lambda one: one.seed)]
    assert counts == {"load_corpus": 2, "inspect_by_name": 3, "load_tokenizer": 1, "rehearse": 3}
    for (plan, structure), config in zip(plans, sorted(configs, key=lambda one: one.seed), strict=True):
        alone, own = preflight(config, 2)
        assert structure == own
        assert plan.record() == alone.record()
        assert plan.config == alone.config
