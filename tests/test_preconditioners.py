"""LoRA+, LoRA-Pro and ALLoRA against least squares, numpy and PEFT's optimizers; in packs, under DP; refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from torch.nn import functional

from fedlora.config import Config, ConfigError, LocalConfig, StrategyConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.engine.optimizers import build_optimizer
from fedlora.engine.preconditioners import LoraPro
from fedlora.engine.stack import Stack
from fedlora.methods import LowRank, Method, ScaledPair, WeightDecomposed
from simulations.audit.site import unit_steps
from simulations.rates import rate_line
from simulations.setup import resolve
from strategies.build import build_strategy
from tests.support.matrix import CONFIGS, Arrays, engine_of, method_of, random_start
from tests.test_dp_step import private_step, ragged
from tests.test_packing import peft_model
from tests.test_ragged_ranks import sliced

SGD = TrainConfig(optimizer="sgd", learning_rate=0.1)
ADAMW = TrainConfig(learning_rate=0.02, weight_decay=0.1)
PRO = {"gradient": "lora-pro"}
ALLORA = {"gradient": "allora", "eta": 3.0}


def off(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


# -- from the formulas --------------------------------------------------------------------------------


def update_of(method: Method, layer: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what a layer adds to its weight, whatever the method says of products."""
    factor = method.factors(tensors)[layer]
    update = factor.update if isinstance(factor, WeightDecomposed) else factor
    assert isinstance(update, LowRank)
    return update.scaled_b() @ update.A


def nearest(
    method: Method, layer: str, tensors: Arrays, trained: Sequence[str], grads: Arrays, damping: float
) -> Arrays:
    """Steps x of the trained factors of a layer that minimise |J x - G|^2 + s^2 delta |x|^2, by J from autograd.

    Only J^T G, the gradients, is known of G, and all that normal equations need.
    """
    product = next(one for one in method.scaled_pairs() if one.a.rpartition(".")[0] == layer)
    fixed = {name: torch.tensor(value) for name, value in tensors.items()}
    names = [name for name in (product.a, product.b) if name in trained]
    blocks = torch.autograd.functional.jacobian(
        lambda *own: update_of(method, layer, {**fixed, **dict(zip(names, own, strict=True))}),
        tuple(fixed[name] for name in names),
    )
    sizes = [tensors[name].size for name in names]
    jacobian = np.concatenate([b.reshape(-1, size).numpy() for b, size in zip(blocks, sizes, strict=True)], 1)  # type: ignore[no-untyped-call]
    a = tensors[product.a]
    ridge = product.scale**2 * damping * (a**2).sum() / len(a)
    normal = jacobian.T @ jacobian + ridge * np.eye(sum(sizes))
    flat = np.linalg.solve(normal, np.concatenate([grads[name].ravel() for name in names]))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {name: part.reshape(tensors[name].shape) for name, part in zip(names, parts, strict=True)}


def by_rows(product: ScaledPair, tensors: Arrays, grads: Arrays, eta: float) -> Arrays:
    """ALLoRA, row by row."""
    rows = zip(grads[product.b], tensors[product.b], strict=True)
    return {product.b: np.stack([grad / np.sqrt(np.linalg.norm(row) + 1 / eta**2) for grad, row in rows])}


def stepped(engine: Engine, works: list[ClientWork], common: Arrays, train: TrainConfig, *private: Any) -> list[Arrays]:
    """The gradients that a step of SGD went along, by client."""
    results = train_pack(engine, works, common, train, *private)
    return [
        {name: (value - result.tensors[name]) / train.learning_rate for name, value in work.start.items()}
        for work, result in zip(works, results, strict=True)
    ]


def one_step(engine: Engine, fixed: str, b: float = 1.0, ranks: Sequence[int] = ()) -> tuple[list[ClientWork], Arrays]:
    """Two clients with a step each, and what they do not train; B of a size."""
    specs = engine.method.specs()
    whole = {name: value * (b if specs[name].kind == "B" else 1.0) for name, value in random_start(engine).items()}
    works = ragged(whole, "bert", [[[0, 3, 1]], [[2, 4]]])
    own = [{name: value for name, value in whole.items() if specs[name].kind != fixed}] * 2
    if ranks:
        own = [sliced(engine, one, rank) for one, rank in zip(own, ranks, strict=True)]
    works = [replace(work, start=start) for work, start in zip(works, own, strict=True)]
    return works, {name: value for name, value in whole.items() if specs[name].kind == fixed}


def check_step(engine: Engine, fixed: str, train: TrainConfig, ranks: Sequence[int] = (), *private: Any) -> float:
    """Compare the step along a changed gradient with the plain step's, changed by the formula; return what that did."""
    works, common = one_step(engine, fixed, ranks=ranks)
    plain = stepped(
        engine, works, common, replace(train, gradient="plain", damping=0.1, eta=2.0), *(p() for p in private)
    )
    changed = stepped(engine, works, common, train, *(p() for p in private))
    method, made = engine.method, 0.0
    for work, before, after in zip(works, plain, changed, strict=True):
        own = sliced(engine, common, ranks[work.client]) if ranks else common
        tensors, expected = {**own, **work.start}, dict(before)
        for product in method.scaled_pairs():
            layer = product.a.rpartition(".")[0]
            if train.gradient == "allora":
                expected |= by_rows(product, tensors, before, train.eta)
            else:
                expected |= nearest(method, layer, tensors, list(work.start), before, train.damping)
        assert off(after, expected) < 1e-9 * max(np.abs(value).max() for value in expected.values())
        made = max(made, off(before, expected))
    return made


@pytest.mark.parametrize("method", ["lora", "block-lora", "dora"])
@pytest.mark.parametrize("fixed", ["", "A", "B"])
def test_lora_pro_comes_nearest_to_the_whole_gradient(method: str, fixed: str) -> None:
    """With both factors trained, or one; of a layer the scale is not one, and rows of block-lora's A are repeated."""
    engine = engine_of(method, "bert")
    assert check_step(engine, fixed, replace(SGD, clip_norm=0.05, damping=0.02, **PRO)) > 1e-4


@pytest.mark.parametrize("fixed", ["", "A", "B"])
def test_ranks_by_client(fixed: str) -> None:
    """Padding makes A A^T singular, and is no part of what it is measured by."""
    assert check_step(engine_of("lora", "bert"), fixed, replace(SGD, **PRO), (1, 3)) > 1e-4


def test_rows_of_b_by_their_norms() -> None:
    for method in ("lora", "block-lora"):
        assert check_step(engine_of(method, "bert"), "", replace(SGD, clip_norm=0.05, **ALLORA)) > 1e-4
    assert check_step(engine_of("lora", "bert"), "", replace(SGD, **ALLORA), (1, 3)) > 1e-4


def test_under_dp_noise_is_there_before() -> None:
    """Of the noisy gradient, for which g_A A^T and B^T g_B differ: ALLoRA as it is, LoRA-Pro with A fixed."""
    engine = engine_of("lora", "bert")
    assert check_step(engine, "A", replace(SGD, **PRO), (), lambda: private_step(2)) > 1e-4
    assert check_step(engine, "", replace(SGD, **ALLORA), (), lambda: private_step(2)) > 1e-4
    works, _ = one_step(engine, "", b=0.1)
    plain, changed = (stepped(engine, works, {}, train, private_step(2)) for train in (SGD, replace(SGD, **PRO)))
    for work, before, after in zip(works, plain, changed, strict=True):
        for product in engine.method.scaled_pairs():
            names = product.a, product.b
            u, v = by_formulas(*(work.start[n] for n in names), *(before[n] for n in names), product.scale, 0.1)
            size = max(np.abs(u).max(), np.abs(v).max())
            assert max(np.abs(after[product.a] - u).max(), np.abs(after[product.b] - v).max()) < 1e-9 * size
            assert np.abs(before[product.a] @ work.start[product.a].T).max() > 1e-2, "control: there is noise"


Matrix = np.ndarray[Any, np.dtype[np.float64]]


def by_formulas(
    a: Matrix, b: Matrix, grad_a: Matrix, grad_b: Matrix, scale: float, damping: float
) -> tuple[Matrix, Matrix]:
    """U and V as the docstring has them, with scipy's solver of Sylvester equations."""
    delta = damping * (a**2).sum() / len(a)
    eye, p, q = np.eye(len(a)), b.T @ b, a @ a.T
    first = np.linalg.solve(p + delta * eye, grad_a) / scale**2
    y = scipy.linalg.solve_sylvester(p + delta / 2 * eye, q + delta / 2 * eye, -first @ a.T)
    u = first + y @ a
    return u, (grad_b / scale**2 - b @ u @ a.T) @ np.linalg.inv(q + delta * eye)


def preconditioned(start: Arrays, grads: Arrays, fixed: Arrays, scale: float, damping: float) -> Arrays:
    """What LoRA-Pro makes of the gradients of one client's A and B."""
    shapes = {name: value.shape for name, value in start.items()}
    stack = Stack([start], shapes, torch.float64, torch.device("cpu"))
    own = {name: torch.tensor(value) for name, value in fixed.items()}
    changed = stack.rows([grads])
    LoraPro(stack, [ScaledPair("A", "B", scale)], lambda groups: own, damping)(changed, slice(0, 1))
    return stack.split(changed)[0]


def drawn(seed: int, *shapes: tuple[int, int]) -> list[Matrix]:
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def test_without_damping_it_is_the_papers() -> None:
    """Its closed forms with their X, and its claim: s (B U + V A) is G projected to what B and A can reach."""
    a, b, g = drawn(1, (4, 9), (11, 4), (11, 9))
    scale = 1.7
    grads = {"A": scale * b.T @ g, "B": scale * g @ a.T}
    made = preconditioned({"A": a, "B": b}, grads, {}, scale, 1e-10)
    p, q = np.linalg.inv(b.T @ b), np.linalg.inv(a @ a.T)
    x = scipy.linalg.solve_sylvester(b.T @ b, a @ a.T, -p @ grads["A"] @ a.T / scale**2)
    u = p @ grads["A"] / scale**2 + x @ a
    v = (np.eye(11) - b @ p @ b.T) @ grads["B"] @ q / scale**2 - b @ x
    assert off(made, {"A": u, "B": v}) < 1e-7
    equivalent = scale * (b @ made["A"] + made["B"] @ a)
    left, right = b @ p @ b.T, a.T @ q @ a
    assert np.abs(equivalent - (left @ g + g @ right - left @ g @ right)).max() < 1e-7
    plain = scale * (b @ grads["A"] + grads["B"] @ a)
    assert np.linalg.norm(equivalent - g) < 0.9 * np.linalg.norm(g) < np.linalg.norm(plain - g), "control: nearer"


def test_with_a_fixed_it_is_pefts_lora_fa() -> None:
    """PEFT divides by the root of the second moment, which a huge epsilon takes out."""
    a, b, grad = drawn(2, (4, 9), (11, 4), (11, 4))
    one, other = (torch.nn.Parameter(torch.tensor(value)) for value in (a, b))
    other.grad = torch.tensor(grad)
    group = {"params": [one, other], "names": ["x.lora_A", "x.lora_B"], "scaling_factors": [1.7, 1.7]}
    LoraFAOptimizer([group], lr=1e9, betas=(0.0, 0.0), eps=1e9, correct_bias=False).step()  # type: ignore[list-item]
    made = preconditioned({"B": b}, {"B": grad}, {"A": a}, 1.7, 1e-9)
    assert np.abs(made["B"] - (b - other.detach().numpy())).max() < 1e-7


def test_where_b_is_zero_a_stays() -> None:
    a, g = drawn(3, (4, 9), (11, 9))
    made = preconditioned({"A": a, "B": np.zeros((11, 4))}, {"A": np.zeros((4, 9)), "B": g @ a.T}, {}, 1.0, 0.1)
    assert not made["A"].any()
    assert np.abs(made["B"]).max() > 0.1
    nothing = preconditioned({"A": 0 * a, "B": np.zeros((11, 4))}, {"A": 0 * a, "B": 0 * g @ a.T}, {}, 1.0, 0.1)
    assert off(nothing, {"A": 0 * a, "B": np.zeros((11, 4))}) == 0.0, "no division by zero"


@pytest.mark.parametrize("damping", [0.1, 1.0])
@pytest.mark.parametrize("size", [0.0, 1e-3, 0.1, 1.0])
def test_damping_bounds_what_noise_does(size: float, damping: float) -> None:
    """Noise of A moves B A by less than noise of B does, times 1 / (2 sqrt(damping)), and A by 1 / damping at most."""
    a, b, *noise = drawn(4, (4, 60), (60, 4), (4, 60), (60, 4))
    a, b = np.linalg.qr(a.T).Q.T, size * np.linalg.qr(b).Q
    in_a = preconditioned({"A": a, "B": b}, {"A": noise[0], "B": 0 * noise[1]}, {}, 1.0, damping)
    in_b = preconditioned({"A": a, "B": b}, {"A": 0 * noise[0], "B": noise[1]}, {}, 1.0, damping)
    assert np.linalg.norm(in_a["A"]) <= np.linalg.norm(noise[0]) / damping
    moved, beside = (np.linalg.norm(b @ one["A"] + one["B"] @ a) for one in (in_a, in_b))
    assert moved <= 1.5 * beside * max(1.0, 1 / (2 * damping**0.5))


def left_of_a_target(damping: float, rate: float) -> float:
    """What docs/learning_rates.md has a table of: AdamW towards a target of rank 8, with noise on the gradients."""
    generator = np.random.default_rng(0)
    target = generator.standard_normal((64, 8)) @ generator.standard_normal((8, 64)) / 8
    start = {"A": generator.uniform(-1, 1, (8, 64)) / 8, "B": np.zeros((64, 8))}
    stack = Stack([start], {"A": (8, 64), "B": (64, 8)}, torch.float64, torch.device("cpu"))
    pro = LoraPro(stack, [ScaledPair("A", "B", 2.0)], lambda groups: {}, damping)
    train = TrainConfig(learning_rate=rate)
    optimizer = build_optimizer(stack.values, train, torch.tensor([120]), precondition=pro)
    off_by = target
    for _ in range(120):
        (now,) = stack.split(stack.values)
        off_by = 2 * now["B"] @ now["A"] - target
        whole = off_by / max(1.0, float(np.linalg.norm(off_by)))
        grads = {"A": 2 * now["B"].T @ whole, "B": 2 * whole @ now["A"].T}
        noisy = {name: grad + 0.02 * generator.standard_normal(grad.shape) for name, grad in grads.items()}
        optimizer.step(stack.rows([noisy]), slice(0, 1))
    return float(np.linalg.norm(off_by) / np.linalg.norm(target))


def test_the_default_damping_learns_under_noise() -> None:
    assert left_of_a_target(0.1, 0.01) < 0.1
    assert all(left_of_a_target(1e-4, rate) > 0.3 for rate in (0.003, 0.01, 0.03)), "control: less of it does not"


# -- in the engine ------------------------------------------------------------------------------------

CHANGED = {
    "lora+": {"b_rate_ratio": 4.0},
    "lora-pro": PRO,
    "allora": ALLORA,
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_pack_equals_each_client_alone(case: str) -> None:
    """Over several steps, at ranks of their own, with AdamW and its weight decay."""
    engine, train = engine_of("lora", "llama-lm"), replace(ADAMW, **CHANGED[case])
    works = [
        replace(work, start=sliced(engine, dict(work.start), rank))
        for work, rank in zip(ragged(random_start(engine), "llama-lm"), (1, 3, 2), strict=True)
    ]
    results = train_pack(engine, works, {}, train)
    plain = train_pack(engine, works, {}, ADAMW)
    for result, work, other in zip(results, works, plain, strict=True):
        alone = train_pack(engine, [work], {}, train)[0]
        assert result.error == alone.error == ""
        assert off(result.tensors, alone.tensors) < 1e-10
        moved = any(len(batch) for batch in work.batches)
        assert not moved or off(result.tensors, other.tensors) > 1e-4, "control: it makes a difference"


def test_padding_that_counts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: what is beyond a client's ranks of a fixed A is taken for its own."""
    pairs = LoraPro._pairs

    def careless(self: LoraPro, values: Any, groups: Any) -> Any:
        found = pairs(self, values, groups)
        return [(values[one.a], b, rank) for one, (_, b, rank) in zip(self.products, found, strict=True)]

    monkeypatch.setattr(LoraPro, "_pairs", careless)
    with pytest.raises(AssertionError):
        check_step(engine_of("lora", "bert"), "A", replace(SGD, **PRO), (1, 3))


def test_lora_plus_is_pefts() -> None:
    """Three steps of AdamW with weight decay; the head is fixed, since PEFT takes B's rate for its biases."""
    engine, train = engine_of("lora", "bert"), replace(ADAMW, b_rate_ratio=4.0)
    whole = random_start(engine)
    start = {name: value for name, value in whole.items() if "lora_" in name}
    common = {name: value for name, value in whole.items() if name not in start}
    work = replace(ragged(whole, "bert", [[[0, 3, 1], [2], [5, 4]]])[0], start=start)
    adapted, named = peft_model("bert", whole, CONFIGS["lora"].method)
    for name in common:
        named[name].requires_grad_(False)
    optimizer = create_loraplus_optimizer(
        adapted, torch.optim.AdamW, lr=train.learning_rate, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    for batch in work.batches:
        inputs = engine.task.collate(work.examples, batch.tolist(), engine.device)
        logits = adapted(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        optimizer.zero_grad()
        functional.cross_entropy(logits, inputs["labels"]).backward()
        optimizer.step()
    result = train_pack(engine, [work], common, train)[0]
    assert off(result.tensors, {name: named[name].detach().numpy() for name in start}) < 1e-10
    assert off(result.tensors, train_pack(engine, [work], common, ADAMW)[0].tensors) > 1e-2


def test_sixteen_bits_beside_float32() -> None:
    """Gradients come as the base has them; inverses are of what is trained."""
    a, b, grad_a, grad_b = (value.astype(np.float32) for value in drawn(5, (4, 9), (11, 4), (4, 9), (11, 4)))
    grad_a, grad_b = b.T @ grad_b @ np.linalg.pinv(a).T, grad_b
    shapes = {"A": a.shape, "B": b.shape}
    stack = Stack([{"A": a, "B": b}], shapes, torch.float32, torch.device("cpu"))
    grads = stack.rows([{"A": grad_a, "B": grad_b}])
    LoraPro(stack, [ScaledPair("A", "B", 1.0)], lambda groups: {}, 1e-4)(grads, slice(0, 1))
    u, v = by_formulas(*(value.astype(np.float64) for value in (a, b, grad_a, grad_b)), 1.0, 1e-4)
    made = stack.split(grads)[0]
    assert np.abs(made["A"] - u).max() < 1e-3 * np.abs(u).max()
    assert np.abs(made["B"] - v).max() < 1e-3 * np.abs(v).max()


# -- what is refused ----------------------------------------------------------------------------------

MINE = {"data.name": "docstrings", "method.rank": 4}


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"train.gradient": "lorapro"}, "train.gradient = 'lorapro': must be one of plain, lora-pro, allora"),
        ({"train.b-rate-ratio": 0.0}, "train.b-rate-ratio = 0.0: must be greater than 0"),
        ({"train.gradient": "lora-pro", "train.damping": 1e-8}, "train.damping = 1e-08: must be between"),
        ({"train.damping": 0.5}, "train.damping = 0.5: is read with train.gradient = 'lora-pro' only"),
        ({"train.gradient": "lora-pro", "train.eta": 3.0}, "train.eta = 3.0: is read with train.gradient = 'allora'"),
        (
            {"train.gradient": "lora-pro", "strategy.name": "mos"},
            "train.gradient = 'lora-pro': is of a product B A of two tensors, and .* none with 'mos'",
        ),
        (
            {"train.gradient": "allora", "strategy.name": "fedavg", "method.name": "uni-lora"},
            "train.gradient = 'allora': is of a product",
        ),
        (
            {"train.gradient": "lora-pro", "strategy.name": "fedavg", "method.init": "pissa"},
            "none with 'lora' and method.init = 'pissa'",
        ),
        (
            {"train.b-rate-ratio": 4.0, "strategy.name": "fed-sb"},
            "train.b-rate-ratio = 4.0: is for tensors whose kind begins with B, and strategy 'fed-sb' trains none",
        ),
        (
            {"train.gradient": "lora-pro", "strategy.name": "fedavg", "local.term": "prox"},
            "train.gradient = 'lora-pro': takes .* FedProx's term",
        ),
        (
            {"train.gradient": "lora-pro", "strategy.name": "hetlora", "method.ranks": "uniform:2-4"},
            "train.gradient = 'lora-pro': takes .* HetLoRA's penalty",
        ),
        (
            {"train.gradient": "lora-pro", "local.term": "scaffold", "train.optimizer": "sgd"},
            "train.gradient = 'lora-pro': local.term = 'scaffold' takes",
        ),
        (
            {"train.b-rate-ratio": 2.0, "local.term": "scaffold", "train.optimizer": "sgd"},
            "train.b-rate-ratio = 2.0: local.term = 'scaffold' takes",
        ),
        (
            {
                "train.gradient": "lora-pro",
                "train.damping": 0.01,
                "strategy.name": "fedavg",
                "privacy.mode": "dp",
                "privacy.epsilon": 8.0,
            },
            "train.damping = 0.01: multiplies the noise in A",
        ),
    ],
)
def test_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({**MINE, **flat})


def test_accepted() -> None:
    """Of the same, what is sound: with A fixed the noise is in B alone; a method's own products are all there are."""
    dp = {"privacy.mode": "dp", "privacy.epsilon": 8.0}
    own = {"train.gradient": "lora-pro", "train.damping": 0.01, "strategy.name": "ffa-lora"}
    for method in ("lora", "dora", "block-lora"):
        config = resolve({**MINE, **own, **dp, "method.name": method})
        assert len(method_of(method).scaled_pairs()) == len(method_of("lora").scaled_pairs()) > 0
    words = rate_line(replace(config, privacy=Config().privacy))
    assert words.endswith("nothing was measured with train.gradient = 'lora-pro'")
    plain = build_strategy(
        Config(strategy=StrategyConfig("fedavg"), local=LocalConfig("prox")), method_of("lora").specs()
    )
    assert plain.local(1).proximal > 0, "control: with the plain gradient the term is taken"


def test_an_audit_sees_the_gradient_as_it_is() -> None:
    """It reads gradients off what tensors moved by."""
    for changes in CHANGED.values():
        assert unit_steps(replace(ADAMW, **changes), 1, 2) == unit_steps(ADAMW, 1, 2)
