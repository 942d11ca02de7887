"""LoRA from PiSSA's and LoRA-GA's factors: they start as their base, train as the papers' do, and are sent once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from torch import nn

import clients.worker
import fedlora.engine.starts as starts
from fedlora.config import Config, ConfigError, DataConfig, MethodConfig, TrainConfig
from fedlora.engine import Engine, evaluate, train_pack
from fedlora.engine.starts import computed_start, leading
from fedlora.methods import build_method, initial_tensors
from fedlora.methods.products import pairs
from fedlora.plugins import read_config
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from fedlora.seeded import Seeded
from fedlora.server.errors import FederationError
from fedlora.server.traffic import Payloads
from simulations.in_process import InProcess
from simulations.preflight import Preflight
from simulations.setup import resolve
from tests.support.families import random_examples, small_model, without_float32
from tests.support.federation import saved
from tests.support.formulas import LAYERS
from tests.support.in_process import federation
from tests.support.matrix import HEAD, MODELS, Arrays, engine_of, works
from tests.support.tiny import save_texts
from tests.support.trainers import tiny_flat
from tests.test_dp_step import private_step
from tests.test_gradient_start import gradient_by_hand

RANK, ALPHA = 3, 6.0
INITS = ("pissa", "lora-ga")
PLAIN = TrainConfig(learning_rate=0.02)
inits = pytest.mark.parametrize("init", INITS)


def config_of(init: str, **method: Any) -> Config:
    public = DataConfig(public_path="public.csv" if init == "lora-ga" else "")
    return Config(method=MethodConfig("lora", **{"rank": RANK, "alpha": ALPHA, "init": init, **method}), data=public)


def started(init: str, family: str, **method: Any) -> tuple[Engine, Arrays]:
    """An engine in float64, and the tensors that a run starts with."""
    config, engine = config_of(init, **method), engine_of("lora", family)
    without_float32(engine.base.model)
    structure = engine.base.structure
    engine = replace(engine, method=build_method(config, structure.adapted, structure.head))
    seeded = initial_tensors(engine.method.specs(), Seeded(7))
    return engine, seeded | computed_start(engine, config, seeded, random_examples(9, seed=2, family=family))


def moved(start: Mapping[str, Any], seed: int = 11) -> Arrays:
    """Tensors that training might end at: all but A0 and B0 moved."""
    numbers = np.random.default_rng(seed)
    fixed = (".lora_A0", ".lora_B0")
    return {n: v if n.endswith(fixed) else v + 0.3 * numbers.standard_normal(v.shape) for n, v in start.items()}


def papers(engine: Engine, tensors: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
    """The factors that the papers train, A0 + A and B0 + B, and what they take off the base, as a residual."""
    trained = {name: value for name, value in tensors.items() if not name.endswith(("_A", "_B", "_A0", "_B0"))}
    offset: Arrays = {}
    for layer in engine.base.structure.adapted:
        a0, b0 = tensors[f"{layer.name}.lora_A0"], tensors[f"{layer.name}.lora_B0"]
        trained[f"{layer.name}.lora_A"] = a0 + tensors[f"{layer.name}.lora_A"]
        trained[f"{layer.name}.lora_B"] = b0 + tensors[f"{layer.name}.lora_B"]
        offset |= {f"{layer.name}.residual_A": a0, f"{layer.name}.residual_B": -b0}
    return trained, offset


# -- the factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_they_are_the_papers_factors(family: str) -> None:
    """Of PiSSA the best approximation of the weight, shared evenly; of LoRA-GA vectors of the gradient."""
    engine, pissa = started("pissa", family, alpha=5.0, rslora=True)
    _, ga = started("lora-ga", family)
    rows, tensors = random_examples(9, seed=2, family=family), initial_tensors(engine.method.specs(), Seeded(7))
    for layer in engine.base.structure.adapted:
        name, scale = layer.name, 5.0 / RANK**0.5
        weight = without_float32(small_model(family)).get_submodule(name).weight.detach().numpy()
        weight = weight.T if layer.fan_in_fan_out else weight
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        a, b = pissa[f"{name}.lora_A0"], pissa[f"{name}.lora_B0"]
        assert np.abs(scale * b @ a - (u[:, :RANK] * s[:RANK]) @ vt[:RANK]).max() < 1e-12
        assert np.abs(a @ a.T - np.diag(s[:RANK] / scale)).max() < 1e-12
        assert np.abs(b.T @ b - a @ a.T).max() < 1e-12
        u, s, vt = np.linalg.svd(gradient_by_hand(family, engine, tensors, rows, layer), full_matrices=False)
        a, b = (ga[f"{name}.lora_{kind}"] / (layer.d_out**0.25 / 4.0) for kind in ("A0", "B0"))
        assert np.abs(np.abs(a @ vt[:RANK].T) - np.eye(RANK)).max() < 1e-7
        assert np.abs(np.abs(u[:, RANK : 2 * RANK].T @ b) - np.eye(RANK)).max() < 1e-7
        assert np.abs(u[:, :RANK].T @ b).max() < 1e-7, "planted: the first vectors of both sides"


def test_peft_has_the_same_factors() -> None:
    """PEFT's LoRA-GA has its A without the scale, and B with the singular values beside it: in directions it agrees."""
    for init in INITS:
        engine, start = started(init, "bert")
        model: Any = small_model("bert").float()
        names, more = [layer.name for layer in engine.base.structure.adapted], {}
        if init == "lora-ga":
            more = {"lora_ga_config": LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16)}
            rows, seeded = random_examples(9, seed=2), initial_tensors(engine.method.specs(), Seeded(7))
            for layer in engine.base.structure.adapted:
                gradient = gradient_by_hand("bert", engine, seeded, rows, layer)
                model.get_submodule(layer.name)._peft_loraga_grad = torch.from_numpy(gradient)
        kind: Any = init.replace("-", "_")
        settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, init_lora_weights=kind, **more)
        peft = get_peft_model(model, settings)
        for name in names:
            own: Any = peft.get_submodule(f"base_model.model.{name}")
            a, b = (one["default"].weight.detach().double().numpy() for one in (own.lora_A, own.lora_B))
            own_a, own_b = start[f"{name}.lora_A0"], start[f"{name}.lora_B0"].T
            if init == "lora-ga":
                a, own_a, b, own_b = (m / np.linalg.norm(m, axis=-1, keepdims=True) for m in (a, own_a, b.T, own_b))
                b = b.T
            flips = np.sign((a * own_a).sum(1)), np.sign((b.T * own_b).sum(1))
            assert np.abs(flips[0][:, None] * a - own_a).max() < 1e-3
            assert np.abs(flips[1][:, None] * b.T - own_b).max() < 1e-3


def test_large_matrices_are_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leading triples of a projection, to rounding where singular values fall, and the same bits each time."""
    numbers = np.random.default_rng(0)
    u, v = (np.linalg.qr(numbers.standard_normal((size, 60)))[0] for size in (90, 70))
    matrix = torch.from_numpy((u * 0.5 ** np.arange(60)) @ v.T)
    whole = leading(matrix, 6)
    monkeypatch.setattr(starts, "_WHOLE", 8)
    before = torch.random.get_rng_state()
    part, again = leading(matrix, 6), leading(matrix, 6)
    assert torch.equal(torch.random.get_rng_state(), before)
    for one, other, same in zip(whole, part, again, strict=True):
        assert np.abs(one - other).max() < 1e-9
        assert np.array_equal(other, same)
    monkeypatch.setattr(starts, "_ITERATIONS", 0)
    assert np.abs(leading(matrix, 6).vt - whole.vt).max() > 1e-6, "planted: no power iterations"


def test_a_may_be_drawn_orthonormal() -> None:
    specs = build_method(config_of("orthonormal"), LAYERS, HEAD).specs()
    tensors = initial_tensors(specs, Seeded(0))
    for _, a, b in pairs(specs):
        assert np.abs(tensors[a] @ tensors[a].T - np.eye(RANK)).max() < 1e-14
        assert not tensors[b].any()


# -- the engine ---------------------------------------------------------------------------------------


@inits
@pytest.mark.parametrize("family", MODELS)
def test_the_model_starts_as_its_base(init: str, family: str) -> None:
    """To the last bit, and so do the bits of 16-bit factors; the papers' factors without their offset do not."""
    engine, start = started(init, family)
    rows = random_examples(6, seed=3, family=family)
    plain = engine_of("lora", family)
    base = evaluate(plain, initial_tensors(plain.method.specs(), Seeded(7)), rows, range(6))["loss"]
    assert np.array_equal(evaluate(engine, start, rows, range(6))["loss"], base)
    for name, factor in engine.method.factors({n: torch.from_numpy(v).bfloat16() for n, v in start.items()}).items():
        if name not in {layer.name for layer in engine.base.structure.head}:
            assert not (factor.scaled_b() @ factor.A).any()  # type: ignore[union-attr]
    trained, offset = papers(engine, start)
    with_offset = evaluate(plain, {**trained, **offset}, rows, range(6))["loss"]
    assert np.abs(with_offset - base).max() < 1e-10
    assert np.abs(evaluate(plain, trained, rows, range(6))["loss"] - base).max() > 1e-4, "planted: no offset"


@pytest.mark.parametrize(
    ("init", "family", "private"), [("pissa", "bert", False), ("lora-ga", "gpt2", True), ("pissa", "llama-lm", True)]
)
def test_training_is_that_of_the_papers_factors(init: str, family: str, private: bool) -> None:
    """A pack equals one of plain LoRA from A0 and B0 on a base that has their product taken off; under DP, too."""
    engine, start = started(init, family)
    plain = engine_of("lora", family)
    trained, offset = papers(engine, moved(start))
    names, fixed = {n for n in start if n in trained}, {n: v for n, v in start.items() if n not in trained}
    own = {name: value for name, value in moved(start).items() if name in names}
    here = train_pack(engine, works(own, family), fixed, PLAIN, private_step(3) if private else None)
    there = train_pack(plain, works(trained, family), offset, PLAIN, private_step(3) if private else None)
    for one, other in zip(here, there, strict=True):
        assert one.error == other.error == ""
        assert one.tensors.keys() == names, "A0 and B0 do not train"
        whole, _ = papers(engine, {**one.tensors, **fixed})
        assert max(float(np.abs(whole[name] - other.tensors[name]).max()) for name in whole) < 1e-9


def test_a_client_of_a_smaller_rank_in_a_pack() -> None:
    """As it is alone with the first ranks of A0 and B0: the other ranks stay in the base."""
    engine, start = started("pissa", "bert")
    tensors, rank = moved(start), 2
    shapes = build_method(config_of("pissa", rank=rank), engine.base.structure.adapted, engine.base.structure.head)
    small = {n: tensors[n][tuple(slice(k) for k in s.shape)] for n, s in shapes.specs().items()}
    fixed = (".lora_A0", ".lora_B0")
    own, few = ({n: v for n, v in one.items() if not n.endswith(fixed)} for one in (tensors, small))
    pack = works(own, "bert")
    pack[0] = replace(pack[0], start=few)
    common = {n: v for n, v in tensors.items() if n.endswith(fixed)}
    packed = train_pack(engine, pack, common, PLAIN)
    method = build_method(
        config_of("pissa", rank=rank, alpha=ALPHA * rank / RANK),
        engine.base.structure.adapted,
        engine.base.structure.head,
    )
    alone = train_pack(
        replace(engine, method=method), [pack[0]], {n: v for n, v in small.items() if n.endswith(fixed)}, PLAIN
    )
    assert packed[0].error == alone[0].error == ""
    for name, value in alone[0].tensors.items():
        assert np.abs(packed[0].tensors[name] - value).max() < 1e-10


@inits
def test_peft_reproduces_the_engine(init: str, tmp_path: Path) -> None:
    """As a LoRA of rank 2 r on the untouched base; of rank r where A stays as it starts."""
    engine, start = started(init, "gpt2")
    tensors = moved(start)
    files = adapter_files(engine, tensors, config_of(init))
    assert check_adapter(engine, tensors, files) < 1e-6
    assert json.loads(files["adapter_config.json"])["r"] == 2 * RANK
    b_alone = {name: start[name] if name.endswith(".lora_A") else value for name, value in tensors.items()}
    assert json.loads(adapter_files(engine, b_alone, config_of(init))["adapter_config.json"])["r"] == RANK
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, adapter_files(engine, b_alone, config_of(init)))


# -- refusals -----------------------------------------------------------------------------------------


def flat_of(folder: Path, init: str, **changes: Any) -> dict[str, Any]:
    keys = {"strategy.name": "fedavg", "method.init": init}
    if init == "lora-ga":
        keys["data.public-path"] = save_texts(folder / "public.csv", rows=12, seed=5)
    return tiny_flat(folder, **{**keys, **changes})


@pytest.mark.parametrize(
    ("init", "changes", "message"),
    [
        ("lora-ga", {"data.public-path": ""}, r"'lora-ga': takes a gradient of rows that are public: name their file"),
        (
            "pissa",
            {"data.public-path": "a.csv"},
            r"data.public-path = '.*': is only read with .*'gradient' or 'lo",
        ),
        ("pissa", {"method.name": "dora"}, r"method.init = 'pissa': method 'dora' knows auto"),
        ("pissa", {"method.start": "adapter"}, r"method.start = 'adapter': goes with method.init = 'auto' or 'orthon"),
        ("pissa", {"eval.baselines": True}, r"eval.baselines = True: its baselines would start otherwise"),
        *(
            (init, {"strategy.name": name}, rf"method.init = .* does not go with strategy '{name}', which may take B A")
            for init, name in zip(
                INITS * 5,
                ("flora", "florist", "flexlora", "hetlora", "lora-fair", "fedrot-lora", "fedsvd", "fed-plora"),
                strict=False,
            )
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_run(
    init: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(flat_of(tmp_path, init, **changes))


def test_more_vectors_than_a_layer_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'lora-ga': 6 orthonormal vectors do not fit into the 4 features of m.0.v"):
        build_method(config_of("lora-ga"), LAYERS, HEAD)
    flat = {"data.name": "sites", "federation.sites": "a,b", "data.classes": "x,y", "federation.roster": "roster"}
    with pytest.raises(ConfigError, match=r"method.init = 'pissa': is computed by a simulation's trainers only"):
        read_config({**flat, "strategy.name": "fedavg", "method.init": "pissa"})


def test_weights_that_give_no_factors_are_refused() -> None:
    """Weights of too small a rank, whose further ranks would never train, and weights that cannot be read."""
    engine, start = started("pissa", "bert")
    first = engine.base.structure.adapted[0].name
    slot: Any = engine.base.model.get_submodule(first)
    with torch.no_grad():
        slot.base.weight[2:] = 0.0
    with pytest.raises(ConfigError, match=rf"{first} has a weight of rank 2, below method.rank = 3; lower method.rank"):
        computed_start(engine, config_of("pissa"), start, None)
    slot.base = nn.Identity()
    with pytest.raises(ConfigError, match=rf"the weight of {first} \(Identity\) cannot be read; set 'orthonormal', or"):
        computed_start(engine, config_of("pissa"), start, None)


# -- runs ---------------------------------------------------------------------------------------------


def updates_of(run: InProcess, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return each layer's whole update under tensors."""
    model = run._worker.loaded.model
    whole = {name: torch.from_numpy(np.asarray(value)) for name, value in {**model.initial, **tensors}.items()}
    found = {}
    for name, factor in model.engine.method.factors(whole).items():
        if name in {layer.name for layer in model.engine.base.structure.adapted}:
            rest = factor.residual  # type: ignore[union-attr]
            found[name] = factor.scaled_b() @ factor.A  # type: ignore[union-attr]
            found[name] = found[name] if rest is None else found[name] + rest.scaled_b() @ rest.A
    return found


@pytest.mark.parametrize(
    ("strategy", "exact"), [("fedavg", False), ("ffa-lora", True), ("rolora", True), ("fedex-lora", True)]
)
def test_means_are_exact_where_they_are_for_lora(strategy: str, exact: bool, tmp_path: Path) -> None:
    """Over two rounds; A0 and B0 stay as they were computed."""
    run = federation(flat_of(tmp_path, "pissa", **{"strategy.name": strategy}), tmp_path)
    fixed = {name: value for name, value in run.core.state.tensors.items() if name.endswith(("_A0", "_B0"))}
    assert fixed
    off = 0.0
    for number in (1, 2):
        before, sent = run.core.state.tensors, run.released(number)
        weights = [float(update.report.examples) for update in sent]
        run.train(number)
        mean: dict[str, Any] = {}
        for update, weight in zip(sent, weights, strict=True):
            for name, value in updates_of(run, {**before, **update.tensors}).items():
                mean[name] = mean.get(name, 0.0) + weight / sum(weights) * value
        now = updates_of(run, run.core.state.tensors)
        off = max(off, *(float((now[name] - value).abs().max() / value.abs().max()) for name, value in mean.items()))
    assert all(np.array_equal(value, run.core.state.tensors[name]) for name, value in fixed.items())
    assert (off < 1e-10) is exact
    assert exact or off > 1e-6


@pytest.mark.parametrize("strategy_name", ["local", "zero-padding"])
def test_clients_with_ranks_of_their_own(strategy_name: str, tmp_path: Path) -> None:
    """Each is sent its ranks of A0 and B0, once where it keeps them, and trains as it does alone."""
    changes = {"strategy.name": strategy_name, "method.ranks": "1,2,2,1"}
    run = federation(flat_of(tmp_path, "pissa", **changes), tmp_path)
    strategy = run.core.strategy
    roles = strategy.all_roles(1)
    assert roles["A0"] == roles["B0"] == Role.BROADCAST
    payloads = Payloads(strategy, "float64")
    mine = strategy.specs(1, 0)
    computed = 8 * sum(int(np.prod(spec.shape)) for spec in mine.values() if spec.computed)
    trained = 8 * sum(int(np.prod(spec.shape)) for spec in strategy.expected(1, 0).values())
    assert payloads.up(1, 0) == trained
    assert payloads.down(1, -1, 0) == (trained + computed, computed)
    assert payloads.down(2, 0, 0) == (trained + computed, trained)
    alone = federation(flat_of(tmp_path, "pissa", **changes, **{"engine.pack": 1}), tmp_path / "alone")
    losses = []
    for number in (1, 2):
        run.train(number)
        alone.train(number)
        losses.append(run.measure(number)["loss"])
    assert abs(losses[1] - alone.measure(2)["loss"]) < 1e-9
    assert abs(losses[1] - losses[0]) > 1e-6, "control: it trains"


def test_a_resumed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """The server's A0 and B0 are in its state, and are not computed again."""
    flat = flat_of(tmp_path, "lora-ga", **{"strategy.name": "rolora"})
    whole, half = federation(flat, tmp_path), federation(flat, tmp_path)
    whole.train(1)
    half.core.state = saved(whole.core.state)
    whole.train(2)
    half.train(2)
    assert all(np.array_equal(value, half.core.state.tensors[n]) for n, value in whole.core.state.tensors.items())


def test_planted_a_start_that_the_server_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the seed gives in place of A0 and B0 is refused by every client; what was computed is not."""
    flat = flat_of(tmp_path, "lora-ga")
    federation(flat, tmp_path).train(1)
    monkeypatch.setattr(clients.worker, "computed_start", lambda *_: {})
    with pytest.raises(FederationError, match=r"lora_A0 is not sent as method.init = 'lora-ga' computes it"):
        federation(flat, tmp_path).train(1)


def test_the_plan_says_what_is_started_from(tmp_path: Path) -> None:
    words = {"pissa": "the leading singular triples of the base model's weights", "lora-ga": "no epsilon covers those"}
    tried = Preflight(2)
    plain, _ = tried.plan(resolve(flat_of(tmp_path, "auto")))
    for init, said in words.items():
        plan, _ = tried.plan(resolve(flat_of(tmp_path, init)))
        assert any(said in line for line in plan.remarks)
        (up, down), (plain_up, plain_down) = plan.traffic, plain.traffic
        assert up == plain_up
        assert min(np.subtract(down, plain_down)) > 0
