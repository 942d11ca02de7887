"""Configuration: types, ranges, names, and that garbage never gets past it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, ConfigError, MethodConfig, from_toml, to_toml
from fedlora.plugins import read_config, schema
from fedlora.ranks import client_ranks
from simulations.app_config import reference, with_defaults
from simulations.setup import resolve

ROOT = Path(__file__).parents[1]
KEYS = sorted(schema().defaults())


DP = {"privacy.mode": "dp", "privacy.epsilon": 8.0}
SCAFFOLD = {"local.term": "scaffold", "train.optimizer": "sgd"}
KNOWN_RANKS = (6, 5, 4, 2, 3, 4, 4, 5)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"train.batchsize": 8}, r"unknown key 'train.batchsize'. Did you mean 'train.batch-size'"),
        ({"seed": True}, r"seed = True: must be a whole number, not bool"),
        ({"seed": -1}, r"seed = -1: must be at least 0"),
        ({"rounds": 1.0}, r"rounds = 1.0: must be a whole number"),
        ({"rounds": 0}, r"rounds = 0: must be at least 1"),
        ({"train.learning-rate": "0.1"}, r"train.learning-rate = '0.1': must be a number, not str"),
        ({"train.learning-rate": -1}, r"train.learning-rate = -1.0: must be at least 0"),
        ({"train.learning-rate": float("nan")}, r"train.learning-rate = nan: must be a finite number"),
        ({"data.partition": "irid"}, r"data.partition = 'irid': must be one of iid, dirichlet, .* Did you mean 'iid'"),
        ({"data.header": "yes"}, r"data.header = 'yes': must be true or false"),
        ({"data.name": "file"}, r"data.path = '': must name a file"),
        (
            {"data.name": "docstrings", "data.path": "x.csv"},
            r"data.path = 'x.csv': is only read with data.name = 'file'",
        ),
        ({"data.path": "no file"}, r"data.path = 'no file': there is no such file or folder, and it is no name of"),
        (
            {"data.name": "file", "data.path": "x.tsv", "data.header": False, "data.text-column": "review"},
            r"data.text-column = 'review': must be a column",
        ),
        ({"federation.clients-per-round": 11}, r"federation.clients-per-round = 11: must be at most .* = 10"),
        ({"run.name": "a/b"}, r"run.name = 'a/b': must be a plain folder name"),
        ({"privacy.mode": "dp"}, r"privacy.mode = 'dp': needs privacy.epsilon, .* or privacy.noise-multiplier"),
        ({"privacy.mode": "pd"}, r"privacy.mode = 'pd': must be one of none, dp"),
        ({"privacy.epsilon": 3.0}, r"privacy.epsilon = 3.0: is read with privacy.mode = 'dp' only.* no privacy"),
        ({**DP, "privacy.unit": "client"}, r"privacy.unit = 'client': a whole client .* does not exist yet"),
        ({**DP, "privacy.unit": "row"}, r"privacy.unit = 'row': must be one of record"),
        ({**DP, "privacy.trust": "central"}, r"privacy.trust = 'central': .* does not exist yet; use 'local'"),
        ({**DP, "privacy.trust": "distributed"}, r"privacy.trust = 'distributed': .* does not exist yet"),
        ({**DP, "privacy.accountant": "gdp"}, r"privacy.accountant = 'gdp': reports less than was spent"),
        ({**DP, "privacy.accountant": "rdp"}, r"privacy.accountant = 'rdp': is a looser bound"),
        ({**DP, "privacy.delta": 1.0}, r"privacy.delta = 1.0: must be at least 0 and below 1"),
        ({**DP, "privacy.max-grad-norm": 0.0}, r"privacy.max-grad-norm = 0.0: must be greater than 0"),
        ({**DP, "train.clip-norm": 1.0}, r"train.clip-norm = 1.0: each row's gradient is clipped to privacy.max"),
        ({"method.head": "shard"}, r"method.head = 'shard': .* Did you mean 'shared'"),
        ({"train.momentum": 0.9}, r"train.momentum = 0.9: is read by train.optimizer = 'sgd' only"),
        (
            {"train.local-epochs": 2, "train.local-steps": 5},
            r"train.local-epochs = 2: is only read with train.local-steps = 0",
        ),
        ({"method.target-modules": "query,,value"}, r"method.target-modules = 'query,,value': must be module names"),
        ({"strategy.name": "fedavgg"}, r"strategy.name: unknown name 'fedavgg'. Did you mean 'fedavg'"),
        ({"method.name": "lorra"}, r"method.name: unknown name 'lorra'. Did you mean 'lora'"),
        ({"eval.target": 84.0}, r"eval.target = 84.0: is an accuracy here, between 0 and 1"),
        ({"strategy.name": "mos", "method.rslora": True}, r"method.rslora = true: is read by lora; mos scales by"),
        ({"data.chat-template": True}, r"data.chat-template = True: is read with task = 'causal-lm' and the like"),
        ({"local.mu": 0.1}, r"local.mu = 0.1: is read with local.term = 'prox' only, not 'none'"),
        ({"local.term": "prox", "local.option": 1}, r"local.option = 1: is read with local.term = 'scaffold' only"),
        (
            {"local.term": "scaffold"},
            r"train.optimizer = 'adamw': local.term = 'scaffold' .* set train.optimizer = 'sgd'",
        ),
        ({**SCAFFOLD, "train.momentum": 0.9}, r"train.momentum = 0.9: .*set train.momentum = 0.0"),
        ({**SCAFFOLD, "train.weight-decay": 0.1}, r"train.weight-decay = 0.1: .*set train.weight-decay = 0.0"),
        ({**SCAFFOLD, "train.clip-norm": 1.0}, r"train.clip-norm = 1.0: .*set train.clip-norm = 0.0"),
        ({**SCAFFOLD, **DP, "local.option": 1}, r"local.option = 1: a gradient of all rows .* use 2"),
        ({"server.tau": 0.1}, r"server.tau = 0.1: is read with server.optimizer = 'adam' or .* only, not 'none'"),
        ({"server.learning-rate": 1.0}, r"server.learning-rate = 1.0: is read with server.optimizer = 'momentum' or"),
        (
            {"server.optimizer": "adam", "server.momentum": 0.5},
            r"server.momentum = 0.5: .*'momentum' only, not",
        ),
        ({"train.warmup-rounds": 3}, r"train.warmup-rounds = 3: must be below rounds = 3"),
        ({"method.ranks": "1,2"}, r"method.ranks = '1,2': has 2 ranks for federation.num-clients = 10"),
        ({"method.ranks": "1;2"}, r"method.ranks = '1;2': must be one rank a client with commas between, or uniform"),
        (
            {"method.ranks": "uniform:2-9"},
            r"method.ranks = 'uniform:2-9': must go from 1 .* up to method.rank = 8",
        ),
        ({"method.ranks": "uniform:2-8"}, r"method.ranks = .*: strategy 'ffa-lora' takes tensors of one shape"),
        (
            {"strategy.name": "local", "method.name": "mos", "method.ranks": "uniform:2-8"},
            r"method.ranks = .*: is read by lora and sora only, not by 'mos'",
        ),
        (
            {"strategy.name": "local", "method.name": "ravan", "method.ranks": "uniform:2-4"},
            r"method.ranks = .*: is read by lora and sora only, not by 'ravan' under 'local'",
        ),
        (
            {"strategy.name": "ravan", "method.ranks": "uniform:2-8"},
            r"method.ranks = 'uniform:2-8': must go from 1 .* up to ravan.heads = 4",
        ),
        (
            {"strategy.name": "flora", "server.optimizer": "adam"},
            r"server.optimizer = 'adam': strategy 'flora'",
        ),
        (
            {"strategy.name": "fedsvd", "server.optimizer": "yogi"},
            r"server.optimizer = 'yogi': strategy 'fedsvd'",
        ),
        ({"strategy.name": "local", "local.term": "prox"}, r"local.term = 'prox': strategy 'local' shares no tensors"),
        (
            {"strategy.name": "fedsvd", "local.term": "scaffold", "train.optimizer": "sgd"},
            r"local.term = 'scaffold': strategy 'fedsvd' does not average in a fixed basis",
        ),
        ({"task": "classify"}, r"task: unknown name 'classify'. Did you mean 'classification'"),
        ({"data.name": "docstring"}, r"data.name: unknown name 'docstring'. Did you mean 'docstrings'"),
    ],
)
def test_errors_name_key_value_and_cure(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(flat)


scalars = st.one_of(st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.none(), st.lists(st.integers()))


@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=20)), scalars, max_size=5))
def test_garbage_is_refused_with_our_own_error(flat: dict[str, Any]) -> None:
    """Whatever comes in: a valid configuration, or a ConfigError; never a traceback from deep inside."""
    try:
        config = resolve(flat)
    except ConfigError:
        return
    for key, value in flat.items():
        if key not in ("method.name", "run.name"):  # filled in
            expected = str(value) if key.endswith("-column") else value  # a column may be a number
            assert config.to_flat()[key] == expected


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    st.fixed_dictionaries(
        {}, optional={"model.name": texts, "data.alpha": st.floats(1e-6, 1e6), "seed": st.integers(0, 2**40)}
    )
)
def test_toml_round_trip(flat: dict[str, Any]) -> None:
    """``config.toml`` of a run folder configures the same run again."""
    try:
        config = read_config(flat)
    except ConfigError:
        return  # a model name of white space
    assert read_config(from_toml(to_toml(config.to_flat()))) == config


def test_app_table_is_generated_from_the_defaults() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert with_defaults(text) == text, "run `make config`"


def test_reference_is_generated_from_the_docstrings() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert reference() == text, "run `make config`"
    assert text.count("\n| `") == len(KEYS)


def test_sweeps_can_be_read() -> None:
    from simulations.sweeps.file import Sweep

    files = sorted((ROOT / "simulations" / "sweeps").glob("*.toml"))
    assert files
    for file in files:
        sweep = Sweep.read(str(file), schema().defaults())
        assert sweep.size() > 1
        assert sweep.first.rounds >= 1


def test_recipes_are_configurations() -> None:
    recipes = sorted((ROOT / "simulations" / "recipes").rglob("*.toml"))
    assert recipes
    for recipe in recipes:
        text = recipe.read_text(encoding="utf-8")
        flat = from_toml(text)
        assert set(flat) <= set(KEYS)
        resolve(flat)
        if recipe.parent.name == "papers":
            assert "# Differs: " in text, "what is not as in the paper"
            assert f"simulations/recipes/papers/{recipe.name}" in text


def test_auto_names_are_filled_in() -> None:
    config = resolve({"strategy.name": "ffa-lora"})
    assert config.method.name == "lora"
    assert config.run.name.endswith("-ffa-lora")


def test_ranks_by_client() -> None:
    """A list as it stands; drawn ranks by seed and client, the same on every machine, however many clients."""

    def ranks(text: str, clients: int, seed: int = 0) -> tuple[int, ...]:
        return client_ranks(Config(seed=seed, method=MethodConfig("lora", rank=8, ranks=text)), clients)

    assert ranks("", 3) == ()
    assert ranks("1, 8,2", 3) == (1, 8, 2)
    assert ranks("uniform:2-8", 8) == KNOWN_RANKS
    assert ranks("uniform:2-8", 3) == KNOWN_RANKS[:3]
    assert ranks("uniform:2-8", 8, seed=1) != KNOWN_RANKS
    many = ranks("uniform:3-5", 3000)
    assert all(900 < many.count(rank) < 1100 for rank in (3, 4, 5))
    for text in ("0,1,2", "1,2,9", "uniform:0-2", "uniform:3-2", "uniform:2", "1,,2", " "):
        with pytest.raises(ConfigError, match=r"method.ranks = "):
            ranks(text, 3)


def test_version_is_written_once_more_only_in_pyproject() -> None:
    from fedlora import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] == __version__
