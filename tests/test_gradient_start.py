"""LoRA-SB's starts: orthonormal A and B, and singular vectors of weights' gradients on public rows, and no others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.config import Config, ConfigError, DataConfig, MethodConfig
from fedlora.engine import Engine
from fedlora.engine.gradients import weight_gradients
from fedlora.engine.starts import computed_start
from fedlora.methods import RavanOptions, build_method, initial_tensors
from fedlora.methods.products import pairs
from fedlora.plugins import read_config
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server.traffic import Payloads
from fedlora.tasks import Rows
from simulations.preflight import preflight
from simulations.setup import resolve
from strategies.build import build_strategy
from tests.support.families import LANGUAGE, random_examples, small_model, without_float32
from tests.support.formulas import LAYERS
from tests.support.in_process import federation
from tests.support.matrix import HEAD, MODELS, Arrays, engine_of
from tests.support.tiny import save_texts
from tests.support.trainers import tiny_flat

RANK = 3


# -- orthonormal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora-sb", "ravan"])
def test_a_and_b_start_orthonormal(method: str) -> None:
    """The rows of A and the columns of B, of all heads together; the core is zero, so the model starts as its base."""
    config = Config(method=MethodConfig(method, rank=2, init="orthonormal")).with_options(RavanOptions(heads=2))
    specs = build_method(config, LAYERS, HEAD).specs()
    plain = build_method(replace(config, method=replace(config.method, init="auto")), LAYERS, HEAD).specs()
    tensors, drawn = initial_tensors(specs, Seeded(0)), initial_tensors(plain, Seeded(0))
    assert {name: spec.shape for name, spec in specs.items()} == {name: spec.shape for name, spec in plain.items()}

    def off(tensors: Any) -> float:
        grams = [m @ m.T for _, a, b in pairs(specs) for m in (tensors[a], tensors[b].T)]
        return max(float(np.abs(gram - np.eye(len(gram))).max()) for gram in grams)

    assert off(tensors) < 1e-14
    assert off(drawn) > 0.1, "planted: the draw as it is"
    others = [name for name, spec in specs.items() if spec.kind not in ("A", "B")]
    assert all(np.array_equal(tensors[name], drawn[name]) for name in others)


def test_more_vectors_than_a_layer_has_features_are_refused() -> None:
    config = Config(method=MethodConfig("ravan", rank=2, init="orthonormal")).with_options(RavanOptions(heads=3))
    with pytest.raises(ConfigError, match=r"method.init = 'orthonormal': 6 orthonormal vectors do not fit into the 4 "):
        build_method(config, LAYERS, HEAD)


# -- gradients ----------------------------------------------------------------------------------------


def gradient_by_hand(family: str, engine: Engine, tensors: Arrays, rows: Rows, layer: Any) -> Any:
    """The mean gradient of a plain model's losses, row by row, by torch's own differentiation of the weight."""
    model = without_float32(small_model(family))
    placed = {name: value.detach() for name, value in model.named_parameters()}
    placed |= {name: torch.tensor(value) for name, value in tensors.items() if name in placed}
    weight = placed[f"{layer.name}.weight"] = placed[f"{layer.name}.weight"].clone().requires_grad_()
    for tokens, target in zip(rows.tokens, rows.targets, strict=True):  # type: ignore[attr-defined]
        ids = torch.from_numpy(tokens)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = torch.func.functional_call(model, placed, kwargs=inputs).logits
        if family in LANGUAGE:
            learned = torch.from_numpy(target)[1:]
            loss = torch.nn.functional.cross_entropy(logits[0, :-1][learned], ids[0, 1:][learned])
        else:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(target)]))
        (loss / len(rows)).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    gradient = weight.grad.numpy()
    return gradient.T if layer.fan_in_fan_out else gradient


GRADIENT = Config(method=MethodConfig("lora-sb", rank=RANK, init="gradient"), data=DataConfig(public_path="public.csv"))


def exact(family: str) -> tuple[Engine, Arrays]:
    engine = engine_of("lora-sb", family)
    without_float32(engine.base.model)
    structure = engine.base.structure
    engine = replace(engine, method=build_method(GRADIENT, structure.adapted, structure.head))
    return engine, initial_tensors(engine.method.specs(), Seeded(1))


@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_those_of_the_weights(family: str) -> None:
    """In one pass of padded rows and in one for each; one row left out is another gradient."""
    engine, initial = exact(family)
    rows = random_examples(7, seed=2, family=family)
    layers = {layer.name: layer for layer in engine.base.structure.adapted}
    whole = dict(weight_gradients(engine, initial, rows))
    cut = dict(weight_gradients(replace(engine, max_cost=1), initial, rows))
    fewer = dict(weight_gradients(engine, initial, random_examples(6, seed=2, family=family)))
    for name, layer in layers.items():
        expected = gradient_by_hand(family, engine, initial, rows, layer)
        size = np.linalg.norm(expected)
        assert np.linalg.norm(whole[name].numpy() - expected) < 1e-9 * size
        assert np.linalg.norm(cut[name].numpy() - expected) < 1e-9 * size
        assert np.linalg.norm(fewer[name].numpy() - expected) > 1e-3 * size, "planted: a row is left out"


@pytest.mark.parametrize("family", MODELS)
def test_a_and_b_are_the_first_singular_vectors(family: str) -> None:
    """B S A is the best approximation of rank r that there is: its error is what the other singular values hold."""
    engine, initial = exact(family)
    rows = random_examples(7, seed=2, family=family)
    start = computed_start(engine, GRADIENT, initial, rows)
    for name, a, b in pairs(engine.method.specs()):
        layer = next(one for one in engine.base.structure.adapted if one.name == name)
        gradient = gradient_by_hand(family, engine, initial, rows, layer)
        s = np.linalg.svd(gradient, compute_uv=False)
        core = start[b].T @ gradient @ start[a].T
        assert np.abs(core - np.diag(s[:RANK])).max() < 1e-9 * s[0]
        error = np.linalg.norm(gradient - start[b] @ core @ start[a])
        assert abs(error - np.linalg.norm(s[RANK:])) < 1e-9 * s[0]
        assert (np.take_along_axis(start[a], np.abs(start[a]).argmax(1)[:, None], 1) > 0).all()
        drawn = initial[b] @ np.linalg.lstsq(initial[b], gradient, rcond=None)[0]
        assert np.linalg.norm(gradient - drawn) > error + 1e-3 * s[0], "planted: the seed's B"


def test_rows_that_are_too_few_are_refused() -> None:
    """One row of a classifier that reads one place gives its last layers a gradient of rank one."""
    engine, initial = exact("bert")
    with pytest.raises(ConfigError, match=r"the 1 rows of data.public-path give .* a gradient of rank 1, below method"):
        computed_start(engine, GRADIENT, initial, random_examples(1, seed=2))


# -- runs ---------------------------------------------------------------------------------------------


def flat_of(folder: Path, **changes: Any) -> dict[str, Any]:
    public = save_texts(folder / "public.csv", rows=12, seed=5)
    keys = {"strategy.name": "fed-sb", "method.init": "gradient", "data.public-path": public}
    return tiny_flat(folder, **keys, **changes)


def test_the_server_sends_what_clients_rows_have_no_part_in(tmp_path: Path) -> None:
    """A and B do not change with clients' rows; clients train with those that were sent, and they stay as they are."""
    flat = flat_of(tmp_path)
    run = federation(flat, tmp_path)
    started = dict(run.core.state.tensors)
    fixed = {name for name in started if name.endswith((".sb_A", ".sb_B"))}
    cores = {name for name in started if name.endswith(".sb_R")}
    others = {**flat, "data.path": save_texts(tmp_path / "others.csv", seed=8)}
    again = federation(others, tmp_path).core.state.tensors
    assert all(np.array_equal(started[name], again[name]) for name in fixed)
    private = {**flat, "data.public-path": flat["data.path"]}
    assert not any(
        np.array_equal(started[name], federation(private, tmp_path).core.state.tensors[name]) for name in fixed
    )
    run.train(1)
    assert all(np.array_equal(started[name], run.core.state.tensors[name]) for name in fixed)
    seeds = federation({**flat, "method.init": "auto", "data.public-path": ""}, tmp_path)
    seeds.train(1)
    assert all(np.abs(run.core.state.tensors[name] - seeds.core.state.tensors[name]).max() > 1e-4 for name in cores)


def test_it_is_sent_once_to_a_client_that_keeps_it(tmp_path: Path) -> None:
    """The bytes of fed-sb, and in the first round those of A and B."""
    run = federation(flat_of(tmp_path), tmp_path)
    strategy, specs = run.core.strategy, run.core.strategy.setting.specs
    drawn = {name: replace(spec, computed=False) for name, spec in specs.items()}
    plain = build_strategy(resolve(tiny_flat(tmp_path, **{"strategy.name": "fed-sb"})), drawn)
    assert {kind: role for kind, role in strategy.all_roles(1).items() if kind in "AB"} == dict.fromkeys(
        "AB", Role.BROADCAST
    )
    sizes = {kind: sum(8 * np.prod(s.shape) for s in specs.values() if s.kind == kind) for kind in ("A", "B")}
    one, other = (Payloads(which, "float64") for which in (strategy, plain))
    extra = sizes["A"] + sizes["B"]
    assert one.up(1) == other.up(1)
    assert one.down(1)[0] == other.down(1)[0] + extra
    first, later = (one.down(number, number - 2)[1] - other.down(number, number - 2)[1] for number in (1, 2))
    assert (first, later) == (extra, 0)


def test_the_plan_says_whose_rows_they_are(tmp_path: Path) -> None:
    plan, _ = preflight(resolve(flat_of(tmp_path)), 2)
    assert any("which are taken to be public; no epsilon covers those rows" in line for line in plan.remarks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.public-path": ""}, r"method.init = 'gradient': takes a gradient of rows that are public: name their"),
        ({"method.init": "auto"}, r"data.public-path = '.*': is only read with method.init = 'gradient'"),
        ({"method.init": "pissa", "data.public-path": ""}, r"method 'lora-sb' knows auto, orthonormal, gradient"),
        ({"strategy.name": "fedavg"}, r"method.init = 'gradient': method 'lora' knows auto"),
        ({"strategy.name": "ravan"}, r"method.init = 'gradient': method 'ravan' knows auto, orthonormal"),
        ({"eval.baselines": True}, r"eval.baselines = True: its baselines would start otherwise than the run"),
    ],
)
def test_what_would_be_lost_or_cost_privacy_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({**flat_of(tmp_path), **changes})


def test_deployed_sites_are_not_asked_for_it() -> None:
    flat = {"data.name": "sites", "federation.sites": "a,b", "data.classes": "x,y", "federation.roster": "roster"}
    flat |= {"data.public-path": "public.csv", "method.init": "gradient"}
    with pytest.raises(ConfigError, match=r"method.init = 'gradient': is computed by a simulation's trainers only"):
        read_config(flat)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text,label\nw1 w2,good\nw3,other\n", r"the label 'other' of .* is none of them"),
        ("words,label\nw1 w2,good\n", r"data.public-path"),
    ],
)
def test_public_rows_that_do_not_fit_are_refused_before_a_run(text: str, message: str, tmp_path: Path) -> None:
    flat = flat_of(tmp_path)
    Path(flat["data.public-path"]).write_text(text)
    with pytest.raises(ValueError, match=message):
        preflight(resolve(flat), 2)
