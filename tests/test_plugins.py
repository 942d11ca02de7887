"""Plug-ins: the tutorial's files train with the real trainer, and what is refused of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clients.limits import SiteLimits
from clients.site import Job
from clients.worker import Worker
from fedlora import plugins
from fedlora.config import ConfigError, from_toml
from fedlora.exchange import Instruction, Outcome
from fedlora.methods import METHODS, LowRank, build_method
from fedlora.plugins import read_config, schema
from fedlora.registry import Registry
from fedlora.roles import Role
from simulations.app_config import with_defaults
from simulations.launch import with_keys
from simulations.rates import found_rate
from simulations.setup import resolve, settle
from strategies.build import build_strategy
from tests.support.formulas import LAYERS
from tests.support.plugged import forgotten, tutorial_flat

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    with forgotten():
        yield


def test_the_tutorial_trains(tmp_path: Path) -> None:
    """A method, a strategy, a task and a data set of one file each, in the trainers' own worker."""
    flat = tutorial_flat(tmp_path)
    config, data = settle(resolve(flat), 3)
    assert (config.method.name, config.task, config.to_flat()["tied.strength"]) == ("tied", "smooth", 2.0)
    assert config.train.learning_rate == found_rate(config).rate, "of fedavg on lora: theirs nobody has measured"
    job = Job(config.to_flat(), data, SiteLimits(str(tmp_path / "sites")))
    worker = Worker(lambda: job, 1)
    described = worker.describe()
    assert described.fingerprint == plugins.fingerprint(config.run.plugins)
    assert all(name in described.fingerprint[1] for name in ("tied.py", "tied_ffa.py", "smooth.py", "sums.py"))
    assert worker.loaded.model.engine.task.amount == 0.2  # type: ignore[attr-defined]
    strategy = build_strategy(config, described.specs)
    sent = strategy.initial(worker.loaded.model.initial).tensors
    assert {name.rpartition(".")[2] for name in sent} == {"tied_B", "weight", "bias"}
    updates = worker.train(Instruction(1, (0, 1, 2), strategy.all_roles(1), sent))
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 3
    for update in updates:
        assert all(np.abs(value - sent[name]).max() > 0 for name, value in update.tensors.items())


def test_own_keys_reach_the_method(tmp_path: Path) -> None:
    flat = tutorial_flat(tmp_path)
    method = build_method(resolve(flat), LAYERS, [])
    tensors = {name: np.ones(spec.shape) for name, spec in method.specs().items()}
    factors = method.factors(tensors)  # type: ignore[arg-type]
    assert len(factors) == len(LAYERS)
    for factor in factors.values():
        assert isinstance(factor, LowRank)
        assert factor.scale == 2.0 * 16.0 / 2
    assert resolve({**flat, "strategy.name": "fedavg", "method.name": "tied"}).method.name == "tied"
    assert resolve({**flat, "strategy.name": "fedavg"}).method.name == "lora"
    for changes, message in (
        (
            {"strategy.name": "rolora", "method.name": "tied"},
            r"'tied': strategy 'rolora' works with lora",
        ),
        ({"tied.strength": -1.0}, r"tied.strength = -1.0: must be greater than 0"),
        ({"tied.strenght": 1.0}, r"unknown key 'tied.strenght'. Did you mean 'tied.strength'"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve({**flat, **changes})


def test_flower_is_shown_the_keys(tmp_path: Path) -> None:
    """Flower refuses what the app's table does not have: the copy that fedlora ships has it."""
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    flat = resolve(tutorial_flat(tmp_path)).to_flat()
    before, after = from_toml(pyproject), from_toml(with_keys(pyproject, flat))
    assert set(after) - set(before) == {f"tool.flwr.app.config.{key}" for key in ("tied.strength", "smooth.amount")}
    assert with_keys(pyproject, {"seed": 3}) == pyproject
    assert "tied" in with_defaults(pyproject), "what is imported has its place in the generated table"


STRATEGY = """
from dataclasses import dataclass
from fedlora.config import Options
from fedlora.plugins import STRATEGIES
from fedlora.roles import Role
from fedlora.strategy import Strategy
@dataclass(frozen=True)
class KeepOptions(Options):
    section = "keep"
    kind: str = "B"
@STRATEGIES.register("keep", KeepOptions)
class Keep(Strategy):
    name, methods, exact, personal = "keep", ("lora",), None, True
    def roles(self, kinds, server_round):
        kept = self.setting.config.options(KeepOptions).kind
        return {kind: Role.PERSONAL if kind == kept else Role.SHARED for kind in kinds}
"""


def test_own_keys_reach_the_strategy(tmp_path: Path) -> None:
    file = tmp_path / "keep.py"
    file.write_text(STRATEGY)
    config = resolve({"run.plugins": str(file), "strategy.name": "keep", "keep.kind": "A", "method.rank": 2})
    specs = build_method(config, LAYERS, []).specs()
    assert build_strategy(config, specs).all_roles(1) == {"A": Role.PERSONAL, "B": Role.SHARED}


METHOD = """
from fedlora.exchange import Instruction, Outcome
from fedlora.methods import METHODS, Lora
METHODS.register({name!r})(Lora)
"""
OPTIONS = """
from dataclasses import dataclass
from fedlora.config import Options
from fedlora.exchange import Instruction, Outcome
from fedlora.methods import METHODS, Lora
@dataclass(frozen=True)
class Own(Options):
    section = {section!r}
METHODS.register("own", Own)(Lora)
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_like_it", r"cannot be imported: ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def broken(:", r"cannot be imported: SyntaxError"),
        (METHOD.format(name="half") + "1 / 0", r"cannot be imported: ZeroDivisionError: division by zero"),
        ("x = 1", r"registers nothing for strategy.name, method.name, task, data.name"),
        (METHOD.format(name="lora"), r"method.name = 'lora' is registered already; choose another name"),
        (OPTIONS.format(section="mos"), r"Own.section = 'mos': is MosOptions's section; choose another name"),
        (OPTIONS.format(section="train"), r"Own.section = 'train': is fedlora's section; choose another name"),
    ],
)
def test_plugins_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    """One clear error, nothing half registered, and the file works once it is mended."""
    file, names = tmp_path / "own.py", set(METHODS)
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"run.plugins = '.*own.py': {message}"):
        read_config({"run.plugins": str(file)})
    assert set(METHODS) == names
    file.write_text(METHOD.format(name="own"))
    read_config({"run.plugins": str(file)})
    assert set(METHODS) == {*names, "own"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("no.py", r"run.plugins = 'no.py': no such file \(/.*no.py\)"),
        ("no_such_module", r"run.plugins = 'no_such_module': cannot be imported: ModuleNotFoundError"),
        ("json", r"run.plugins = 'json': registers nothing"),
        (".relative", r"run.plugins = '.relative': cannot be imported"),
    ],
)
def test_names_that_are_no_plugins(names: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config({"run.plugins": names})


def test_installed_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry points in their metadata, in every process, without a key."""
    (tmp_path / "toy_package").mkdir()
    (tmp_path / "toy_package" / "__init__.py").write_text("")
    (tmp_path / "toy_package" / "own.py").write_text(OPTIONS.format(section="toy"))
    (tmp_path / "toy-1.0.dist-info").mkdir()
    (tmp_path / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    points = tmp_path / "toy-1.0.dist-info" / "entry_points.txt"
    points.write_text("[fedlora.plugins]\ntoy = toy_package.own\n")
    monkeypatch.syspath_prepend(tmp_path)
    plugins._installed.cache_clear()
    try:
        config = read_config({})
        assert "own" in set(METHODS)
        assert "toy" in schema().sections
        assert str(tmp_path / "toy_package" / "own.py") in plugins.fingerprint(config.run.plugins)[1]
    finally:
        plugins._installed.cache_clear()
        sys.modules.pop("toy_package.own", None)


def test_a_changed_file_changes_the_digest(tmp_path: Path) -> None:
    """Server and trainers compare what each has imported, whatever stands in the file by now."""
    file = tmp_path / "own.py"
    digests = []
    for comment in ("# one\n", "# another\n"):
        with forgotten():
            file.write_text(METHOD.format(name="own") + comment)
            read_config({"run.plugins": str(file)})
            digests.append(plugins.fingerprint(str(file))[0])
            file.write_text("")
            assert plugins.fingerprint(str(file))[0] == digests[-1]
    assert len({*digests, plugins.fingerprint("")[0]}) == 3


def test_former_names_warn() -> None:
    registry: Registry[int] = Registry("strategy.name")
    registry.register("new")(1)
    registry.alias("old", "new")
    with pytest.warns(FutureWarning, match=r"strategy.name = 'old' is now called 'new'"):
        assert registry["old"] == 1
    assert list(registry) == ["new"]
    with pytest.raises(ConfigError, match=r"'old' is registered already"):
        registry.register("old")
