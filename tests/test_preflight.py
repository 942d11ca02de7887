"""What is tried before a run: in an order in which the quick refusals come first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedlora.config import ModelConfig
from fedlora.hub import check_model
from tests.support.tiny import save_tiny_model

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
