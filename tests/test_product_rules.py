"""Rules for products of clients' factors, held against whole matrices in float64; bugs of published code planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora.config import Config, Options
from fedlora.methods import Lora, RavanOptions, initial_tensors
from fedlora.methods import Ravan as RavanMethod
from fedlora.methods.base import Layer
from fedlora.methods.products import decompose, pairs
from fedlora.methods.residual import extend
from fedlora.reduce import ClientUpdate, Reduced, weighted_mean
from fedlora.seeded import Seeded
from fedlora.server.traffic import Payloads
from fedlora.state import ServerState
from fedlora.strategy import Setting, Strategy
from strategies import (
    FedAvg,
    FedExLoRA,
    FedExOptions,
    FedRotLoRA,
    FedRotOptions,
    FlexLoRA,
    FlexLoraOptions,
    FLoRIST,
    FloristOptions,
    LoRAFair,
    LoraFairOptions,
    Ravan,
    fedex_lora,
    fedrot_lora,
    florist,
)
from strategies.fedrot_lora import partly, rotation
from strategies.lora_fair import least_squares, nearest_direction

# Neither is square, and the second has so few features that residuals are whole matrices there.
LAYERS = [Layer("wide", 30, 20, True, False), Layer("narrow", 12, 5, True, False)]
RANK = 4
SPECS = Lora(LAYERS, rank=RANK, alpha=8.0, rslora=False).specs()
WEIGHTS = np.array([3, 1, 6])
SHARES = WEIGHTS / WEIGHTS.sum()
RANKS = (1, 4, 2)


def normal(*key: int, shape: tuple[int, ...]) -> Any:
    return np.random.default_rng(key).standard_normal(shape)


def reduced(
    strategy: Strategy, number: int = 1, change: Callable[[int, dict[str, Any]], None] | None = None
) -> Reduced:
    """Return a round's updates, each a client's own numbers around common ones."""
    updates = []
    for client, weight in enumerate(WEIGHTS):
        tensors = {}
        for at, (name, spec) in enumerate(strategy.expected(number, client).items()):
            whole = strategy.setting.specs[name].shape
            value = normal(at, shape=whole) + 2.0 * normal(number, client, at, shape=whole)
            tensors[name] = value[tuple(slice(n) for n in spec.shape)]
        if change:
            change(client, tensors)
        updates.append(ClientUpdate(client, int(weight), tensors))
    return Reduced(len(updates), updates=tuple(updates))


def setting(*options: Options, ranks: tuple[int, ...] = ()) -> Setting:
    return Setting(SPECS, ranks=ranks, config=Config().with_options(*options))


def start_of(strategy: Strategy) -> ServerState:
    return strategy.initial(initial_tensors(strategy.setting.specs, Seeded(0)))


def mean_products(found: Reduced) -> dict[str, Any]:
    """Return sum_k p_k B_k A_k of each layer, [d_out, d_in]."""
    return {
        layer: sum(p * one.tensors[b] @ one.tensors[a] for p, one in zip(SHARES, found.updates, strict=True))
        for layer, a, b in pairs(SPECS)
    }


def products(tensors: Any) -> dict[str, Any]:
    """Return B A of each layer, with the residual."""
    found = {layer: tensors[b] @ tensors[a] for layer, a, b in pairs(SPECS)}
    for layer in found:
        if f"{layer}.residual_A" in tensors:
            found[layer] = found[layer] + tensors[f"{layer}.residual_B"] @ tensors[f"{layer}.residual_A"]
    return found


def best(whole: Any, rank: int) -> Any:
    """Return the nearest matrix of a rank (Eckart and Young)."""
    u, s, vt = np.linalg.svd(whole, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def off(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("rank", [1, 3, 9, 40])
def test_singular_values_of_a_product_are_those_of_the_whole_matrix(rank: int) -> None:
    """Also with more ranks than features, and with zeros."""
    for a, b in (
        (normal(rank, shape=(rank, 12)), normal(rank, 1, shape=(5, rank))),
        (normal(rank, shape=(rank, 5)), normal(rank, 1, shape=(12, rank))),
        (normal(rank, shape=(rank, 12)), np.zeros((5, rank))),
    ):
        u, s, vt = decompose(a, b)
        assert np.allclose(s, np.linalg.svd(b @ a, compute_uv=False)[: len(s)], atol=1e-12)
        assert np.allclose((u * s) @ vt, b @ a, atol=1e-12)
        assert np.allclose(u.T @ u, np.eye(len(s)))
        assert np.allclose(vt @ vt.T, np.eye(len(s)))
        assert all(row[np.abs(row).argmax()] > 0 for row in vt)


# -- flexlora -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["A", "B"])
@pytest.mark.parametrize("ranks", [(), RANKS])
def test_flexlora_sends_each_client_the_best_of_its_rank(values: str, ranks: tuple[int, ...]) -> None:
    strategy = FlexLoRA(setting(FlexLoraOptions(values), ranks=ranks))
    found = reduced(strategy)
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    for (layer, a, b), whole in zip(pairs(SPECS), mean_products(found).values(), strict=True):
        for rank in {RANK, *ranks}:
            assert off(tensors[b][:, :rank] @ tensors[a][:rank], best(whole, rank)) < 1e-12, layer
        orthonormal = tensors[b].T if values == "A" else tensors[a]
        assert np.allclose(orthonormal @ orthonormal.T, np.eye(RANK))


@pytest.mark.parametrize("values", ["A", "B"])
def test_flexlora_with_fewer_ranks_than_the_server_has(values: str) -> None:
    """Ranks that nobody in the round holds add nothing, and one of their factors is not zero: they can be trained.

    After a round without any update, too, where the factor with the singular values is zero in every rank.
    """
    strategy = FlexLoRA(setting(FlexLoraOptions(values), ranks=(1, 4, 2)))
    whole = reduced(strategy)
    nothing = [
        replace(one, tensors={n: 0 * v if "_B" in n else v for n, v in one.tensors.items()}) for one in whole.updates
    ]
    for before in ((), (whole,), (replace(whole, updates=tuple(nothing)),)):
        state = start_of(strategy)
        for found in before:
            state = strategy.apply(state, found, 1)
        one = replace(whole, updates=(whole.updates[2],))
        tensors = strategy.apply(state, one, 2).tensors
        for _, a, b in pairs(SPECS):
            own = one.updates[0].tensors
            assert off(tensors[b] @ tensors[a], own[b] @ own[a]) < 1e-12
            alive_a, alive_b = np.abs(tensors[a]).max(1) > 1e-3, np.abs(tensors[b]).max(0) > 1e-3
            assert (alive_a | alive_b).all()
            assert (alive_a & alive_b)[:2].all()


# -- florist ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("ranks", [(), RANKS])
def test_florist_keeps_the_energy_and_no_more_than_it_needs(energy: float, ranks: tuple[int, ...]) -> None:
    """A rank for each layer; rounds add up, and bytes count what was kept."""
    strategy = FLoRIST(setting(FloristOptions(energy), ranks=ranks))
    state, expected, history = start_of(strategy), dict[str, Any](), np.zeros(2, dtype=np.int64)
    for number in (1, 2):
        found = reduced(strategy, number)
        state = strategy.apply(state, found, number)
        kept = strategy.added_ranks(range(3), state)
        for rank, (layer, whole) in zip(kept, mean_products(found).items(), strict=True):
            s = np.square(np.linalg.svd(whole, compute_uv=False))
            needed = next(p for p in range(1, len(s) + 1) if s[:p].sum() >= energy * s.sum() * (1 - 1e-12))
            assert rank == needed if energy < 1 else rank >= needed
            expected[layer] = expected.get(layer, 0.0) + best(whole, rank)
        assert all(np.less_equal(kept, strategy.added_ranks(range(3))))
        history += kept
        for layer, whole in expected.items():
            name = f"{layer}.residual_A"
            assert off(state.tensors[f"{layer}.residual_B"] @ state.tensors[name], whole) < 1e-10
            assert state.tensors[name].shape == strategy.accumulated(history.tolist())[name].shape


def uneven(strategy: Strategy) -> Reduced:
    """One client, whose update of the wide layer has four strong ranks, and that of the narrow one a single one."""
    (one, *_), strength = reduced(strategy).updates, {"wide": np.ones(4), "narrow": np.array([1.0, 0.01, 0.01, 0.01])}
    sent = {a: np.linalg.qr(one.tensors[a].T)[0].T for _, a, _ in pairs(SPECS)}
    sent |= {b: np.linalg.qr(one.tensors[b])[0] * strength[layer] for layer, _, b in pairs(SPECS)}
    return Reduced(1, updates=(replace(one, tensors={**one.tensors, **sent}),))


def test_layers_keep_ranks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks and one: the server counts, sends and saves as many; planted: one rank for all, the largest."""
    strategy = FLoRIST(setting(FloristOptions(0.99)))
    state = strategy.apply(start_of(strategy), uneven(strategy), 1)
    kept = strategy.added_ranks([0], state)
    assert kept == (4, 1)
    sizes = {name: value.shape for name, value in state.tensors.items() if "residual" in name}
    assert sizes == {name: spec.shape for name, spec in strategy.accumulated(kept).items()}
    payloads = Payloads(strategy, "float64")
    numbers = {
        layer: sum(spec.shape[axis] for axis, spec in ((1, SPECS[a]), (0, SPECS[b]))) for layer, a, b in pairs(SPECS)
    }
    history = [(0, 0), kept, (8, 2)]
    assert payloads.evaluation(2, 1, None, history[:2])[0] == 8 * (4 * numbers["wide"] + numbers["narrow"])
    assert payloads.evaluation(3, 1, None, history)[1] == 8 * (4 * numbers["wide"] + numbers["narrow"])
    whole = FLoRIST._needed
    monkeypatch.setattr(FLoRIST, "_needed", lambda self, product: max(4, whole(self, product)))
    wrong = strategy.added_ranks([0], strategy.apply(start_of(strategy), uneven(strategy), 1))
    assert wrong == (4, 4)
    assert payloads.evaluation(2, 1, None, [(0, 0), wrong])[0] > payloads.evaluation(2, 1, None, history[:2])[0]


def test_planted_energy_of_values_that_are_not_squared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threshold is on squares (the paper says so): on the values themselves more ranks are kept."""
    strategy = FLoRIST(setting(FloristOptions(0.9)))
    found = reduced(strategy)
    right = strategy.added_ranks(range(3), strategy.apply(start_of(strategy), found, 1))
    monkeypatch.setattr(florist.np, "square", lambda values: values)
    wrong = strategy.added_ranks(range(3), strategy.apply(start_of(strategy), found, 1))
    assert all(np.greater(wrong, right))


# -- fedex-lora ---------------------------------------------------------------------------------------


def test_fedex_is_exact_in_every_round_and_goes_on_from_the_means() -> None:
    """What clients trained on was means and residual of the round before; the residuals add up."""
    strategy = FedExLoRA(setting())
    state, added = start_of(strategy), np.zeros(2, dtype=np.int64)
    for number in range(1, 4):
        found = reduced(strategy, number)
        before = {layer: value - state.tensors[b] @ state.tensors[a] for (layer, a, b), value in
                  zip(pairs(SPECS), products(state.tensors).values(), strict=True)}  # fmt: skip
        state = strategy.apply(state, found, number)
        added += strategy.added_ranks(range(3))
        for layer, whole in mean_products(found).items():
            assert off(products(state.tensors)[layer], before[layer] + whole) < 1e-12
        for name in SPECS:
            mean = sum(p * one.tensors[name] for p, one in zip(SHARES, found.updates, strict=True))
            assert np.allclose(state.tensors[name], mean, atol=1e-14)
        for name, spec in strategy.accumulated(added.tolist()).items():
            assert state.tensors[name].shape == spec.shape
    assert state.tensors["wide.residual_A"].shape == (20, 30), "3 rounds of (K - 1) r = 8 ranks, 20 features"


def test_fedex_of_one_client_has_no_residual() -> None:
    strategy = FedExLoRA(setting())
    found = reduced(strategy)
    state = strategy.apply(start_of(strategy), replace(found, updates=found.updates[:1]), 1)
    assert strategy.added_ranks([0]) == (0, 0)
    assert set(state.tensors) == set(SPECS)


@pytest.mark.parametrize("kept", [1, 3, 8, 20])
def test_a_truncated_residual_is_the_best_of_its_rank(kept: int) -> None:
    strategy = FedExLoRA(setting(FedExOptions(kept)))
    assert not strategy.exact
    found = reduced(strategy)
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    for layer, a, b in pairs(SPECS):
        residual = mean_products(found)[layer] - tensors[b] @ tensors[a]
        own = tensors[f"{layer}.residual_B"] @ tensors[f"{layer}.residual_A"]
        assert off(own, best(residual, kept)) < 1e-10
        shape = strategy.accumulated(strategy.added_ranks(range(3)))[f"{layer}.residual_A"].shape
        assert tensors[f"{layer}.residual_A"].shape == shape


def weights_of_one(updates: Any, names: Any) -> Any:
    return weighted_mean([replace(one, weight=1) for one in updates], names)


PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "means by equal weights, the residual by others": lambda patch: patch.setattr(
        fedex_lora, "weighted_mean", weights_of_one
    ),
    "the residual replaced instead of added": lambda patch: patch.setattr(
        fedex_lora, "extend", lambda _, layer, a, b: {f"{layer}.residual_A": a, f"{layer}.residual_B": b}
    ),
    "the residual scaled once more": lambda patch: patch.setattr(
        fedex_lora, "extend", lambda held, layer, a, b: extend(held, layer, a, 2.0 * b)
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_of_fedex_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks the equality of the rounds' sum."""
    PLANTED[bug](monkeypatch)
    with pytest.raises(AssertionError):
        test_fedex_is_exact_in_every_round_and_goes_on_from_the_means()


# -- lora-fair ----------------------------------------------------------------------------------------


def fair_case(layer: int = 0) -> tuple[Any, Any, Any, Any, Any]:
    """Return factors of D, the means A and B, and D."""
    strategy = FedAvg(setting())
    found = reduced(strategy)
    _, name_a, name_b = pairs(SPECS)[layer]
    of_a = np.vstack([p * one.tensors[name_a] for p, one in zip(SHARES, found.updates, strict=True)])
    of_b = np.hstack([one.tensors[name_b] for one in found.updates])
    a, b = (
        sum(p * one.tensors[name] for p, one in zip(SHARES, found.updates, strict=True)) for name in (name_a, name_b)
    )
    return of_a, of_b, a, b, of_b @ of_a


@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
def test_the_closed_form_is_least_squares(weight: float) -> None:
    """Against numpy's solver on the whole matrix, with the weight as rows of its own."""
    of_a, of_b, a, b, whole = fair_case()
    rows = np.vstack([a.T, np.sqrt(weight) * np.eye(RANK)])
    sides = np.vstack([(whole - b @ a).T, np.zeros((RANK, len(b)))])
    expected = np.linalg.lstsq(rows, sides, rcond=None)[0].T
    assert np.allclose(least_squares(of_a, of_b, a, b, weight), expected, atol=1e-10)


def fair_loss(c: Any, a: Any, b: Any, whole: Any, weight: float) -> float:
    moved = (b + c) @ a
    cosine = np.sum(moved * whole) / np.linalg.norm(moved) / np.linalg.norm(whole)
    return float(1 - cosine + weight * np.linalg.norm(c))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_no_small_change_improves_the_correction_by_cosine(layer: int, weight: float) -> None:
    """It is better than none, and than the closed form by its own measure; the loss is that of the whole matrices."""
    of_a, of_b, a, b, whole = fair_case(layer)
    c = nearest_direction(of_a, of_b, a, b, weight)
    here = fair_loss(c, a, b, whole, weight)
    assert here < fair_loss(0 * b, a, b, whole, weight) - 0.01
    assert here <= fair_loss(least_squares(of_a, of_b, a, b, 0.01), a, b, whole, weight) + 1e-6
    for number in range(50):
        step = normal(number, shape=b.shape)
        tried = c + 0.05 * np.linalg.norm(b) * step / np.linalg.norm(step)
        assert here < fair_loss(tried, a, b, whole, weight) + 1e-6


def test_a_large_weight_leaves_fedavg() -> None:
    strategy = LoRAFair(setting(LoraFairOptions(weight=100.0)))
    found = reduced(strategy)
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    means = {name: sum(p * one.tensors[name] for p, one in zip(SHARES, found.updates, strict=True)) for name in SPECS}
    assert all(np.allclose(tensors[name], means[name], atol=1e-12) for name in SPECS)


@pytest.mark.parametrize("objective", ["cosine", "least-squares"])
def test_lora_fair_comes_nearer_to_the_mean_product_than_fedavg(objective: str) -> None:
    strategy = LoRAFair(setting(LoraFairOptions(objective)))
    found = reduced(strategy)
    tensors = strategy.apply(start_of(strategy), found, 1).tensors
    for (layer, a, b), whole in zip(pairs(SPECS), mean_products(found).values(), strict=True):
        mean_b = sum(p * one.tensors[b] for p, one in zip(SHARES, found.updates, strict=True))

        def angle(own: Any, whole: Any = whole) -> float:
            return float(1 - np.sum(own * whole) / np.linalg.norm(own) / np.linalg.norm(whole))

        assert angle(tensors[b] @ tensors[a]) < angle(mean_b @ tensors[a]) - 0.02, layer


def test_zero_updates_are_left_alone() -> None:
    """B is zero before the first step: there is no direction, and nothing is divided by zero."""
    of_a, of_b, a, b, _ = fair_case()
    for one, other in ((0 * of_b, b), (of_b, 0 * b)):
        assert not nearest_direction(of_a, one, a, other, 0.01).any()


# -- fedrot-lora --------------------------------------------------------------------------------------


def test_a_rotation_is_the_best_of_many() -> None:
    for rank in (2, 4):
        m = normal(rank, shape=(rank, rank))
        q = rotation(m)
        assert np.allclose(q @ q.T, np.eye(rank))
        assert np.linalg.det(q) == pytest.approx(1)
        for number in range(200):
            other = rotation(normal(rank, number, shape=(rank, rank)))
            assert np.trace(other.T @ m) <= np.trace(q.T @ m) + 1e-12
        assert np.allclose(partly(q, 1.0), q)
        assert np.allclose(partly(q, 0.0), np.eye(rank))
    assert np.array_equal(rotation(np.zeros((3, 3))), np.eye(3))


@pytest.mark.parametrize("number", [1, 2])
def test_clients_that_differ_by_a_rotation_lose_nothing(number: int) -> None:
    """One product in three bases: turned wholly its mean is that product; half the way it is nearer than fedavg's."""
    base = reduced(FedAvg(setting())).updates[0].tensors

    def turn(client: int, tensors: dict[str, Any]) -> None:
        q = partly(rotation(normal(5, client, shape=(RANK, RANK))), 0.4)
        for _, a, b in pairs(SPECS):
            tensors |= {a: q @ base[a], b: base[b] @ q.T}

    lost = {}
    for share in (0.0, 0.5, 1.0):
        strategy = FedRotLoRA(setting(FedRotOptions(share)))
        state = replace(start_of(strategy), tensors=dict(base))
        tensors = strategy.apply(state, reduced(strategy, number, turn), number).tensors
        lost[share] = max(off(tensors[b] @ tensors[a], base[b] @ base[a]) for _, a, b in pairs(SPECS))
    assert lost[1.0] < 1e-4, "but for what keeps open directions"
    assert lost[1.0] < lost[0.5] < 0.7 * lost[0.0]


def test_no_client_is_changed_by_its_turn() -> None:
    strategy = FedRotLoRA(setting())
    found = reduced(strategy)
    for one in found.updates:
        alone = strategy.apply(start_of(strategy), replace(found, updates=(one,)), 1).tensors
        for _, a, b in pairs(SPECS):
            assert off(alone[b] @ alone[a], one.tensors[b] @ one.tensors[a]) < 1e-13


def test_planted_a_reflection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sign of the last direction half of all matrices give a reflection, which the tests above refuse."""
    monkeypatch.setattr(fedrot_lora.np, "sign", lambda value: 1.0)
    with pytest.raises(AssertionError):
        test_a_rotation_is_the_best_of_many()


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_nothing_determines_stays_as_it_is(number: int, ranks: int) -> None:
    """B and A of few ranks leave directions open: a client that returns what it was sent is not turned at all."""
    strategy = FedRotLoRA(setting(FedRotOptions(1.0)))
    sent = {}
    for _, a, b in pairs(SPECS):
        low = normal(1, shape=(RANK, ranks)) @ normal(2, shape=(ranks, SPECS[a].shape[1]))
        sent |= {a: low, b: normal(3, shape=(SPECS[b].shape[0], ranks)) @ normal(4, shape=(ranks, RANK))}
    state = replace(start_of(strategy), tensors={name: value.astype(np.float32) for name, value in sent.items()})
    moved = {name: value + 1e-6 * normal(5, at, shape=value.shape) for at, (name, value) in enumerate(sent.items())}
    update = ClientUpdate(0, 1, {name: value.astype(np.float32) for name, value in moved.items()})
    after = strategy.apply(state, Reduced(1, updates=(update,)), number).tensors
    assert all(off(after[name], sent[name]) < 0.01 for name in sent)


# -- ravan --------------------------------------------------------------------------------------------


def test_ravan_averages_the_products_of_scales_and_cores() -> None:
    """The means of each apart are something else, and scales start at one again."""
    method = RavanMethod.build(LAYERS, Config().with_options(RavanOptions(heads=3)))
    strategy = Ravan(Setting(method.specs()))
    found = reduced(strategy)
    state = strategy.apply(start_of(strategy), found, 1)
    for layer in ("wide", "narrow"):
        h, s = f"{layer}.ravan_H", f"{layer}.ravan_s"
        whole = sum(
            p * one.tensors[s][:, None, None] * one.tensors[h] for p, one in zip(SHARES, found.updates, strict=True)
        )
        apart = sum(p * one.tensors[s] for p, one in zip(SHARES, found.updates, strict=True))[:, None, None] * sum(
            p * one.tensors[h] for p, one in zip(SHARES, found.updates, strict=True)
        )
        assert off(state.tensors[h], whole) < 1e-14
        assert off(apart, whole) > 0.1
        assert s not in state.tensors
        assert s not in strategy.sent(2)
