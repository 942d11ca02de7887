"""Sweeps: what is refused, and what is chosen by what. A real one is in e2e/test_sweep.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from fedlora.config import Config, ConfigError, to_toml
from fedlora.data import load_corpus, load_federated
from fedlora.plugins import read_config, schema
from simulations.cli import run
from simulations.session import Session
from simulations.sweeps.cells import Cell, Share
from simulations.sweeps.file import Sweep
from simulations.sweeps.progress import run_share
from simulations.sweeps.tables import summary, write_tables
from tests.support.trainers import tiny_flat

DEFAULTS = schema().defaults()
GRID: dict[str, Any] = {"grid.strategy.name": ["fedavg", "ffa-lora"], "grid.seed": [0, 1, 2]}
TUNE: dict[str, Any] = {"tune.train.learning-rate": [0.01, 0.1]}


def sweep(folder: Path, **flat: Any) -> Sweep:
    file = folder / "sweep.toml"
    file.write_text(to_toml({"run.dir": str(folder), "run.name": "s", **flat}))
    return Sweep.read(str(file), DEFAULTS)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({}, r"neither \[grid\] nor \[tune\]"),
        ({"grid.strategy.nam": ["fedavg"]}, r"unknown key 'strategy.nam'. Did you mean 'strategy.name'"),
        ({"grid.strategy.name": ["fedavg", "fedavgg"]}, r"unknown name 'fedavgg'. Did you mean 'fedavg'"),
        ({"grid.seed": 3}, r"\[grid\] seed = 3: must be a list of values"),
        ({"grid.seed": []}, r"\[grid\] seed = \[\]: must be a list of values"),
        ({"grid.seed": [1, 1]}, r"\[grid\] seed = \[1, 1\]: holds a value twice"),
        ({"grid.train.learning-rate": [0.1]}, r"would be chosen by the test rows. Put it in \[tune\]"),
        ({**TUNE, "tune.seed": [0, 1]}, r"a seed is not chosen by its result"),
        ({**TUNE, "grid.train.learning-rate": [0.1], "eval.test": False}, r"is in \[grid\] and in \[tune\]"),
        ({**GRID, "cases.a": 3}, r"\[\[cases.a\]\] = 3: must be a list of tables"),
        ({"tune.train.learning-rate": [0.1, -1.0]}, r"train.learning-rate = -1.0: must be at least 0"),
        ({"grid.seed": [0, -1]}, r"seed = -1: must be at least 0"),
        ({"grid.seed": [0, 1], "grid.train.batch-size": [4, 0]}, r"train.batch-size = 0: must be at least 1"),
        ({"grid.privacy.epsilom": [1.0]}, r"unknown key 'privacy.epsilom'.* Did you mean 'privacy.epsilon'"),
        ({"grid.privacy.epsilon": [1.0]}, r"privacy.epsilon = 1.0: is read with privacy.mode = 'dp' only"),
    ],
)
def test_what_cannot_be_swept_is_refused(flat: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, **flat)
    with pytest.raises(ConfigError, match="cannot be read"):
        Sweep.read(str(tmp_path / "none.toml"), DEFAULTS)


def test_cells_and_the_file_that_remembers_them(tmp_path: Path) -> None:
    one = sweep(tmp_path, **GRID, **TUNE)
    assert one.size() == 2 * 2 + 2 * 3
    tuning = one.tuning()
    assert {cell.config.seed for cell in tuning} == {0}, "choices are made with the first seed"
    assert not any(cell.config.eval.test for cell in tuning)
    assert all(cell.config.data.dev_share == 0.1 for cell in tuning)
    finals = one.finals({"strategy.name": "fedavg"}, {"train.learning-rate": 0.1})
    assert [cell.config.seed for cell in finals] == [0, 1, 2]
    assert all(cell.config.eval.test for cell in finals)
    names = [cell.name for cell in (*tuning, *finals)]
    assert len(set(names)) == len(names)
    (tmp_path / "again.toml").write_text(one.to_toml())
    assert Sweep.read(str(tmp_path / "again.toml"), DEFAULTS) == one


CASES = """
[[cases.strategy]]
name = "FedIT"
strategy.name = "fedavg"
tune.train.learning-rate = [0.3]

[[cases.strategy]]
name = "cores of 4"
strategy.name = "fed-sb"
method.rank = 4

[[cases.split]]
name = "iid"
data.partition = "iid"

[[cases.split]]
name = "skewed"
data.alpha = 0.1
"""


def with_cases(folder: Path, cases: str = CASES, **flat: Any) -> Sweep:
    file = folder / "sweep.toml"
    file.write_text(to_toml({"run.dir": str(folder), "run.name": "s", "rounds": 2, **flat}) + cases)
    return Sweep.read(str(file), DEFAULTS)


def test_cases_are_keys_that_go_together(tmp_path: Path) -> None:
    """Each with each of the other list and of the grid; one has rates of its own; a column that draws data says so."""
    one = with_cases(tmp_path, **{"grid.seed": [0, 1]}, **TUNE)
    assert one.columns == ["strategy", "data.split", "seed", "train.learning-rate"]
    assert one.size() == (1 + 2) * 2 + 2 * 2 * 2
    assert one.first.strategy.name == "fedavg"
    found = [
        (cell.varied["strategy"], cell.config.strategy.name, cell.config.method.rank, cell.config.train.learning_rate)
        for cell in one.tuning()
        if cell.config.data.partition == "iid"
    ]
    assert found == [("FedIT", "fedavg", 8, 0.3), ("cores of 4", "fed-sb", 4, 0.01), ("cores of 4", "fed-sb", 4, 0.1)]
    skewed = one.finals({"strategy": "FedIT", "data.split": "skewed"}, {"train.learning-rate": 0.3})
    assert [(cell.config.data.alpha, cell.config.seed) for cell in skewed] == [(0.1, 0), (0.1, 1)]
    (tmp_path / "again.toml").write_text(one.to_toml())
    assert Sweep.read(str(tmp_path / "again.toml"), DEFAULTS) == one


def test_hyper_parameters_are_chosen_once_for_all_cases_of_a_list(tmp_path: Path) -> None:
    """With the first of them; their final cells belong to one group, so no two processes choose for the same."""
    one = with_cases(tmp_path, **{"grid.seed": [0, 1], "tune.once": ["split"]}, **TUNE)
    assert one.size() == (1 + 2) + 2 * 2 * 2
    assert {cell.config.data.partition for cell in one.tuning()} == {"iid"}
    group = {"strategy": "cores of 4"}
    assert group in one.groups()
    finals = one.finals(group, {"train.learning-rate": 0.1})
    assert [(cell.varied["data.split"], cell.config.data.partition, cell.config.seed) for cell in finals] == [
        *(("iid", "iid", 0), ("iid", "iid", 1), ("skewed", "dirichlet", 0), ("skewed", "dirichlet", 1)),
    ]
    for cell, dev in zip(one.tuning(group), (0.6, 0.7), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / "result.json").write_text(json.dumps({"dev_accuracy": dev}))
    assert one.choose(group) == {"train.learning-rate": 0.1}
    (tmp_path / "again.toml").write_text(one.to_toml())
    assert Sweep.read(str(tmp_path / "again.toml"), DEFAULTS) == one
    packs: list[list[str]] = []

    def run_cells(cells: Sequence[Callable[[Session], None]]) -> None:
        packs.append([])
        for each in cells:
            each(session)

    def outcome(config: Config, _: Console) -> dict[str, float]:
        packs[-1].append(config.data.partition)
        return {"dev_accuracy": 0.5, "test_accuracy": 0.5}

    session: Any = SimpleNamespace(run=outcome)
    run_share(one, run_cells, Console(quiet=True), Share())
    assert {len(set(pack)) for pack in packs if pack} == {1}, "side by side are cells that differ by their seed alone"
    assert [pack[0] for pack in packs if len(pack) == 2] == ["iid", "dirichlet"], "of the other case no rate was chosen"


@pytest.mark.parametrize(
    ("once", "message"),
    [
        ("split", r"\[tune\] once = 'split': must be a list of names"),
        (["seed"], r"once = \['seed'\]: 'seed' is neither .* data.split, split, strategy\."),
        (["strategy"], r"once names strategy, and FedIT has rates of its own"),
    ],
)
def test_once_names_lists_of_cases_without_rates_of_their_own(once: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_cases(tmp_path, **{"grid.seed": [0, 1], "tune.once": once}, **TUNE)
    with pytest.raises(ConfigError, match="there is nothing to choose"):
        with_cases(tmp_path, CASES.replace("tune.train.learning-rate = [0.3]", ""), **{"tune.once": ["split"]})


@pytest.mark.parametrize(
    ("cases", "message"),
    [
        ("[[cases.a]]\nrounds = 1", r"\[\[cases.a\]\] .*: needs a name of its own"),
        ("[[cases.a]]\nname = 'x'\n[[cases.a]]\nname = 'x'", r"\[cases\] a = \['x', 'x'\]: holds a value twice"),
        ("[[cases.a]]\nname = 'x'\ntune.train.momentum = [0.1]", r"tune.train.momentum is not in \[tune\]"),
        ("[[cases.a]]\nname = 'x'\nseed = 1", r"seed is in \[grid\] and in \[\[cases.a\]\]; leave it in one"),
        ("[[cases.partition]]\nname = 'x'\ndata.alpha = 0.1", r"data.partition is a key; call the list otherwise"),
        ("[[cases.'a b']]\nname = 'x'\nrounds = 1", r"the name of a list is made of letters"),
        (
            "[[cases.a]]\nname = 'x'\nserver.learning-rate = 0.1\n[[cases.a]]\nname = 'y'\nserver.learning-rate = 0.2",
            r"server.learning-rate is compared: the best of them would be chosen by the test rows",
        ),
        (
            "[[cases.a]]\nname = 'x'\ntune.train.learning-rate = [1.0]\n"
            "[[cases.b]]\nname = 'x'\ntune.train.learning-rate = [2.0]",
            r"which of them a cell would take is not said",
        ),
        ("[[cases.a]]\nname = 'x'\nstrategy.nam = 'fedavg'", r"unknown key 'strategy.nam'"),
    ],
)
def test_cases_that_cannot_be_swept_are_refused(cases: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        with_cases(tmp_path, cases, **{"grid.seed": [0, 1]}, **TUNE)


def test_a_sweep_in_one_process(tmp_path: Path) -> None:
    """Global and personal models; e2e/test_sweep.py holds the numbers against those under Flower."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "", "data.holdout": 0.2})
    file = tmp_path / "mini.toml"
    file.write_text(to_toml({**flat, "grid.strategy.name": ["fedavg", "fedsa-lora"], "grid.seed": [0, 1]}))
    console = Console(quiet=True)
    assert run(["sweep", str(file), "--in-process"], console) == 0
    results = pd.read_csv(tmp_path / "runs" / "mini" / "results.csv")
    assert (results["status"] == "ok").all()
    assert results["test_accuracy"].notna().tolist() == [True, True, False, False]
    assert results["personal_accuracy"].notna().tolist() == [False, False, True, True]
    cell = Path(results["folder"][0])
    assert not list(cell.glob("*.png")), "figures are drawn by fedlora report"
    assert json.loads((cell / "trainers.json").read_text())[0]["pid"] == os.getpid()


def test_in_one_process_there_is_one_trainer(tmp_path: Path) -> None:
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "", "engine.trainers": 2})
    file = tmp_path / "mini.toml"
    file.write_text(to_toml({**flat, "grid.seed": [0]}))
    assert run(["sweep", str(file), "--in-process"], Console(quiet=True)) == 1
    results = pd.read_csv(tmp_path / "runs" / "mini" / "results.csv")
    assert "one process holds one trainer; leave out --in-process" in results["error"][0]
    with pytest.raises(ConfigError, match="--federation-config is for Flower"):
        run(["sweep", str(file), "--in-process", "--federation-config", "num-supernodes=3"], Console(quiet=True))


def test_shares_are_all_groups_once(tmp_path: Path) -> None:
    one = sweep(tmp_path, **{**GRID, "grid.strategy.name": ["fedavg", "ffa-lora", "local", "rolora", "mos"]}, **TUNE)
    for of in (1, 2, 3, 5):
        shares = [one.groups(Share(number, of)) for number in range(1, of + 1)]
        together = [group for share in shares for group in share]
        assert sorted(map(str, together)) == sorted(map(str, one.groups()))
    assert Share.read("2/3") == Share(2, 3)
    assert str(Share(2, 3)) == "2/3"
    for text in ("0/3", "a", "1/", "1/0"):
        with pytest.raises(ConfigError, match=r"run.share = .*: must be a number and how many there are"):
            read_config({"run.share": text})


def test_options_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(to_toml({"run.dir": str(tmp_path), "rounds": 5, **GRID}))
    assert Sweep.read(str(file), DEFAULTS, {"rounds": 2}).base["rounds"] == 2
    with pytest.raises(ConfigError, match=r"seed: the sweep goes through values of it; change them in"):
        Sweep.read(str(file), DEFAULTS, {"seed": 2})


def test_choices_are_made_on_dev_rows(tmp_path: Path) -> None:
    """By the best of the dev results that are there; a planted test result changes nothing."""
    one = sweep(tmp_path, **GRID, **TUNE)
    group = {"strategy.name": "fedavg"}
    with pytest.raises(ValueError, match="finished, so nothing can be chosen"):
        one.choose(group)
    for cell, dev, test in zip(one.tuning(group), (0.6, 0.7), (0.9, 0.1), strict=True):
        cell.folder.mkdir(parents=True)
        (cell.folder / "result.json").write_text(json.dumps({"dev_accuracy": dev, "test_accuracy": test}))
    assert one.choose(group) == {"train.learning-rate": 0.1}
    assert len(one.unfinished()) == 2 + 3, "the other strategy's tuning, and this one's final cells"


def test_a_finished_cell_has_no_error(tmp_path: Path) -> None:
    """Whatever was noted of it while another process was at work on it; a new call forgets errors and attempts."""
    one = sweep(tmp_path, **{"grid.seed": [0, 1]})
    done, failed = one.finals({}, {})
    done.folder.mkdir(parents=True)
    (done.folder / "result.json").write_text('{"test_accuracy": 0.5}')
    errors = {done.name: "ValueError: is being written", failed.name: "ValueError: of its own"}
    one.errors_file(Share()).write_text(json.dumps(errors))
    one.attempt_file(Share()).write_text(json.dumps({failed.name: 2}))
    assert one.errors() == {failed.name: "ValueError: of its own"}
    one.begin()
    assert one.errors() == {}
    assert one.state(Share()) == (1, "")


def finish_under_dp(cell: Cell, epsilon: float | None) -> None:
    """Write what a cell ends with, as a run does."""
    cell.folder.mkdir(parents=True)
    result = {"test_accuracy": 0.5, "trained_parameters": 8, "bytes_up": 32, "delta": 1e-5, "epsilon": epsilon}
    (cell.folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("spent", "shown"), [((2.0, 4.0), "3.0000"), ((2.0, None), "infinite"), ((None, None), "infinite")]
)
def test_an_epsilon_that_is_not_finite_is_not_averaged_away(
    spent: tuple[float | None, ...], shown: str, tmp_path: Path
) -> None:
    one = sweep(tmp_path, **{"privacy.mode": "dp", "privacy.epsilon": 4.0, "grid.seed": [0, 1]})
    for cell, value in zip(one.finals({}, {}), spent, strict=True):
        finish_under_dp(cell, value)
    write_tables(one)
    assert summary(one).endswith(f"| {shown} | 1e-05 |\n")


def test_what_is_not_private_in_a_sweep_is_said(tmp_path: Path) -> None:
    """A seed of the noise among the values of the grid: its epsilons have terms of their own."""
    keys = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "grid.privacy.seed": [0, 7], "grid.seed": [0]}
    one = sweep(tmp_path, **keys)
    for cell in one.finals({"privacy.seed": 0}, {}) + one.finals({"privacy.seed": 7}, {}):
        finish_under_dp(cell, 1.0)
    write_tables(one)
    lines = [line for line in summary(one).splitlines() if line.startswith("Epsilon with `privacy.seed` = ")]
    assert ["NOT PRIVATE" in line for line in lines] == ["`7` is" in line for line in lines] == [False, True]


def test_a_search_reads_no_test_row(tmp_path: Path) -> None:
    """Test files are not opened, dev rows are not trained on, and clients hold out other rows than at the end."""
    flat = {**tiny_flat(tmp_path), "data.test-path": str(tmp_path / "no-such-file.csv"), "data.dev-share": 0.25}
    whole = {**flat, "data.test-path": flat["data.path"], "data.dev-share": 0.0}
    search = read_config({**flat, "eval.test": False, "data.holdout": 0.3})
    corpus = load_corpus(search)
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (90, 30, 0)
    assert sorted(corpus.train.texts + corpus.dev.texts) == sorted(load_corpus(read_config(whole)).train.texts)
    with pytest.raises(ValueError, match=r"no-such-file\.csv"):
        load_corpus(read_config(flat))
    final = read_config({**flat, "data.test-path": flat["data.path"], "data.holdout": 0.3})
    tuned, ended = load_federated(search, 4), load_federated(final, 4)
    for client in range(4):
        judged = set(ended.holdout[client])
        assert judged
        assert not judged & set(tuned.holdout[client])
        assert not judged & set(tuned.training_rows(client))
        assert set(tuned.clients[client]) | judged == set(ended.clients[client])


def test_a_process_that_dies_in_the_same_place_is_not_started_again(tmp_path: Path) -> None:
    one = sweep(tmp_path, **GRID)
    again = one.again(2)
    assert again(1), "it has cells left"
    assert not again(1), "nothing has moved since"
    one.folder.mkdir(parents=True, exist_ok=True)
    one.attempt_file(Share(1, 2)).write_text('{"a": 2}')
    assert again(1)


def test_cells_in_which_the_process_died_run_one_by_one_and_the_third_time_not_at_all(tmp_path: Path) -> None:
    one = sweep(tmp_path, **{"grid.seed": [0, 1, 2, 3]})
    cells, packs = one.finals({}, {}), []
    one.folder.mkdir(parents=True, exist_ok=True)
    one.attempt_file(Share()).write_text(json.dumps({cells[1].name: 1, cells[2].name: 2}))

    def run_cells(chosen: Sequence[Callable[[Session], None]]) -> None:
        packs.append(len(chosen))
        for each in chosen:
            each(session)

    session: Any = SimpleNamespace(run=lambda config, console: {"test_accuracy": 0.5})
    console = Console(record=True, quiet=True)
    run_share(one, run_cells, console, Share())
    assert packs == [1, 1, 2]
    assert list(one.errors()) == [cells[2].name]
    assert "the whole process ended 2 times" in one.errors()[cells[2].name]
    assert json.loads(one.attempt_file(Share()).read_text()) == {}, "none is at work"
