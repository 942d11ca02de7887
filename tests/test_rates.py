"""A run that names no learning rate takes the one that was found, and says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import BUNDLED, SMALL_LLAMA, Config, ConfigError, ModelConfig
from fedlora.hub import layer_width
from fedlora.models import own_config
from fedlora.plugins import methods_of
from simulations import found, rates
from simulations.rates import found_rate, rate_line, settle_rate
from simulations.setup import resolve, settle
from strategies import STRATEGIES
from tests.support.plans import shown
from tests.support.tiny import save_tiny_model
from tests.support.trainers import EQUAL_PARTS, tiny_flat, tiny_worker
from tools import learning_rates

ROOT = Path(__file__).parents[1]


def configured(**changes: Any) -> Config:
    return resolve({"federation.num-clients": 10, **changes})


def test_module_is_made_by_its_command() -> None:
    made = learning_rates.source(learning_rates.found_rates(), learning_rates.thresholds(learning_rates.schedules()))
    assert (ROOT / "simulations" / "found.py").read_text(encoding="utf-8") == made, "run `make tables`"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_every_strategy_on_every_method_has_one(task: str, optimizer: str) -> None:
    model = SMALL_LLAMA if task == "causal-lm" else BUNDLED
    own = {"task": task, "model.name": model, "train.optimizer": optimizer, "method.rank": 4, "s2.sparsity": 0.0}
    for strategy in STRATEGIES:
        for method in methods_of(strategy):
            config = settle_rate(configured(**own, **{"strategy.name": strategy, "method.name": method}))
            assert 0 < config.train.learning_rate < 10
            assert f"by {optimizer} in" in rate_line(config)


def test_the_choice_decides() -> None:
    """The user's 77 classes under fedavg did better at 0.004 than at the 0.01 that served FFA-LoRA."""
    fedavg, ffa = (settle_rate(configured(**{"strategy.name": name})) for name in ("fedavg", "ffa-lora"))
    assert fedavg.train.learning_rate < 0.01 < ffa.train.learning_rate
    words = rate_line(fedavg)
    assert (
        words
        == f"learning rate: {fedavg.train.learning_rate:g}, found for fedavg on lora by adamw in tasks with a head"
    )
    alike = settle_rate(configured(**{"strategy.name": "zero-padding", "method.ranks": ",".join(["8"] * 10)}))
    assert alike.train.learning_rate == fedavg.train.learning_rate


def test_a_rate_that_is_given_stays_and_is_told_from_the_one_that_was_found() -> None:
    config = settle_rate(configured(**{"train.learning-rate": 0.02, "strategy.name": "fedavg"}))
    assert config.train.learning_rate == 0.02
    assert rate_line(config).startswith("learning rate: 0.02, as given; ")
    assert f"{found_rate(config).rate:g} was found for fedavg on lora" in rate_line(config)


def test_a_strategy_from_outside_takes_its_methods_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(**{"strategy.name": "mos"})
    other = replace(config, strategy=replace(config.strategy, name="of-mine"))
    assert found_rate(other).rate == found_rate(config).rate
    unheard = replace(other, method=replace(config.method, name="of-mine"))
    assert found_rate(unheard).rate == found.RATES["lora", "fedavg", "adamw", "classes"]


def test_adamw_goes_by_the_models_width(tmp_path: Path) -> None:
    config = configured(**{"model.name": save_tiny_model(tmp_path), "strategy.name": "fedavg"})
    width = own_config(config.model).hidden_size
    assert layer_width(config.model) == width
    expected = found.RATES["lora", "fedavg", "adamw", "classes"] * 384 / width
    assert found_rate(config).rate == pytest.approx(expected, rel=0.05)
    assert f"times 384/{width}" in found_rate(config).words
    sgd = replace(config, train=replace(config.train, optimizer="sgd"))
    assert found_rate(sgd).rate == found.RATES["lora", "fedavg", "sgd", "classes"]


@pytest.mark.parametrize("name", [BUNDLED, SMALL_LLAMA])
def test_widths_that_come_with_fedlora_are_those_of_the_models(name: str) -> None:
    assert rates._BUNDLED_WIDTHS[name] == own_config(ModelConfig(name)).hidden_size


@pytest.mark.parametrize(
    ("content", "width"),
    [
        ({"hidden_size": 24}, 24),
        ({"vision_config": {"hidden_size": 7}, "text_config": {"hidden_size": 32}}, 32),
        ({"d_model": 12}, 12),
        ({"n_embd": 20}, 20),
        ({"dim": 28}, 28),
        ({"model_type": "unheard-of"}, None),
    ],
)
def test_width_is_read_of_the_text_part(tmp_path: Path, content: dict[str, Any], width: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert layer_width(ModelConfig(str(tmp_path))) == width


def test_a_model_out_of_reach_has_no_width_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert layer_width(ModelConfig("nobody/such-model")) is None


def test_plan_says_which_and_the_run_takes_it(tmp_path: Path) -> None:
    from simulations.preflight import preflight

    flat = tiny_flat(tmp_path, **{"train.learning-rate": 0.0})
    plan, _ = preflight(resolve(flat), 2)
    assert plan.config.train.learning_rate == found_rate(plan.config).rate > 0
    assert rate_line(plan.config) in shown(plan)
    assert plan.record()["learning_rate"] == rate_line(plan.config)
    assert plan.federation.learning_rate == plan.config.train.learning_rate
    again, _ = settle(plan.config, 2)
    assert again == plan.config  # a run that is continued with its own configuration


def test_a_job_without_a_rate_is_refused(tmp_path: Path) -> None:
    """The planted bug: a configuration that nobody settled would train nothing, step by step."""
    worker = tiny_worker(tmp_path, **{"train.learning-rate": 0.0})
    with pytest.raises(ValueError, match=r"train.learning-rate = 0: whoever starts the run has to say which"):
        worker.load()


def test_negative_rates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.learning-rate = -0.1"):
        configured(**{"train.learning-rate": -0.1})


def test_under_dp_the_steps_together_keep_their_length(tmp_path: Path) -> None:
    dp = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "train.optimizer": "sgd", "train.learning-rate": 0.0}
    one, _ = settle(resolve(tiny_flat(tmp_path, **dp, **EQUAL_PARTS, **{"rounds": 80, "train.local-steps": 3})), 2)
    assert one.train.learning_rate == pytest.approx(found_rate(one).rate)
    wide = replace(one, privacy=replace(one.privacy, max_grad_norm=4.0))
    assert found_rate(wide).rate == pytest.approx(one.train.learning_rate / 4, rel=0.05)
    twice = replace(one, rounds=2 * one.rounds)
    assert found_rate(twice).rate == pytest.approx(one.train.learning_rate / 2, rel=0.05)
    few = replace(one, rounds=1)
    assert found_rate(few).rate == 3.0  # longer ones were not seen to learn
