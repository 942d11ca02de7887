"""The command line before Flower starts: options, bad input, and what is shipped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from fedlora.config import to_toml
from simulations.cli import main
from simulations.launch import shipped, with_few_actors
from simulations.options import read_overrides
from tests.support.trainers import tiny_flat

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("options", "cores", "expected"),
    [
        ([], 64, ["client-resources-num-cpus=16"]),
        ([], 8, []),
        (
            ["num-supernodes=3 init-args-num-cpus=16"],
            64,
            ["num-supernodes=3 init-args-num-cpus=16", "client-resources-num-cpus=4"],
        ),
        (["client-resources-num-cpus=1"], 64, ["client-resources-num-cpus=1"]),
    ],
)
def test_flower_starts_a_few_actors(options: list[str], cores: int, expected: list[str]) -> None:
    """Not one for each two cores, unless the options say how many."""
    assert with_few_actors(options, cores) == expected


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
@pytest.mark.slow
def test_flower_ships_the_same_of_a_copy(tmp_path: Path) -> None:
    """And does not walk through this checkout's virtual environment for it."""
    copy = shipped(ROOT, tmp_path / "app")
    assert build_fab_from_disk(copy) == build_fab_from_disk(ROOT)
    assert len(list(copy.rglob("*"))) < 400
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pyproject.toml").write_text('[tool.flwr.app]\npublisher = "tests"\n')
    assert shipped(tmp_path / "other", tmp_path / "never") == tmp_path / "other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy.name": "fedavgg"}, "strategy.name: unknown name 'fedavgg'. Did you mean 'fedavg'?"),
        ({"data.label-column": "lable"}, "data.label-column = 'lable': no such column"),
    ],
)
def test_bad_input_stops_before_anything_starts(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(to_toml(tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run", **changes})))
    with pytest.raises(SystemExit) as exit_code:
        main(["run", str(ROOT), "-c", str(config)])
    assert exit_code.value.code == 2, "1 is that of a run that was started"
    assert f"fedlora: error: {message}" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "run").exists()


def test_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["report", str(ROOT)])
    assert exit_code.value.code == 2
    assert "is not a run folder" in capsys.readouterr().out


def test_an_interrupted_import_is_one_line() -> None:
    """A real SIGINT in the middle of what a command imports before it does anything."""
    program = """
import os, signal, sys
class Interrupter:
    def find_spec(self, name, path, target=None):
        if name == "simulations.preflight":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
signal.signal(signal.SIGINT, signal.default_int_handler)
from deploy.cli import main
main(["plan"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")
    assert done.stdout == "fedlora: interrupted; nothing was left running\n"


def test_repeated_options_all_count() -> None:
    """Flower itself would keep only the last option of a section; garbage must not be dropped silently."""
    flat = read_overrides(ROOT, ["train.batch-size=3", "train.learning-rate=0.5 seed=4"])
    assert (flat["train.batch-size"], flat["train.learning-rate"], flat["seed"]) == (3, 0.5, 4)
    for option, unread in (
        ("rounds 3", "rounds 3"),
        ("train.learning-rate = 0.1 rounds=2", "train.learning-rate ="),
        ("", ""),
    ):
        with pytest.raises(ValueError, match=f"cannot read '?{unread}"):
            read_overrides(ROOT, [option])
