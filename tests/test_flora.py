"""FLoRA: stacking is the exact mean at any ranks, compression loses nothing, and every byte is counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlora.exchange import ClientReport, Update
from fedlora.methods import Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.methods.residual import compress, residual_specs
from fedlora.reduce import ClientUpdate, OneByOne, Reduced
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server import Federation, FlowerStrategy
from fedlora.server.traffic import ACCUMULATED
from fedlora.state import ServerState
from fedlora.strategy import Setting
from fedlora.wire import read_instruction
from strategies import FLoRA
from tests.support.federation import run, seeded_of
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of

# The first is never compressed here, the second from the third round on; neither is square.
LAYERS = [Layer("wide", 60, 50, True, False), Layer("narrow", 30, 14, True, False)]
SPECS = Lora(LAYERS, rank=4, alpha=8.0, rslora=False).specs()
RANKS = (1, 4, 2)
SHARES = np.array([examples_of(k) for k in range(3)]) / sum(examples_of(k) for k in range(3))


def strategy_of(ranks: Sequence[int] = RANKS) -> FLoRA:
    return FLoRA(Setting(SPECS, ranks=tuple(ranks)))


def server_of(ranks: Sequence[int] = RANKS, **changes: Any) -> FlowerStrategy:
    strategy = strategy_of(ranks)
    federation = Federation(**{"num_clients": 3, "dtype": "float64", **changes})
    return FlowerStrategy(strategy, federation, strategy.initial(initial_tensors(SPECS, Seeded(0))))


def updates_of(number: int, ranks: Sequence[int] = RANKS) -> list[Arrays]:
    return [update_of(k, number, strategy_of(ranks).expected(number, k)) for k in range(3)]


def reduced(number: int = 1, order: Sequence[int] = (0, 1, 2)) -> Reduced:
    """Return a round's updates as they were folded in some order."""
    reduction = OneByOne()
    for client in order:
        reduction.add(Update(ClientReport(client), updates_of(number)[client]), examples_of(client))
    return reduction.reduced()


def product(tensors: Any, layer: str) -> Any:
    return tensors[f"{layer}.residual_B"] @ tensors[f"{layer}.residual_A"]


def mean_product(layer: str, number: int = 1) -> Any:
    """Return sum_k p_k B_k A_k of a round."""
    own = updates_of(number)
    return sum(p * one[f"{layer}.lora_B"] @ one[f"{layer}.lora_A"] for p, one in zip(SHARES, own, strict=True))


def error(state: ServerState) -> float:
    """Return how far a first round's result is from the clients' mean, relative."""
    return max(
        float(np.linalg.norm(product(state.tensors, layer.name) - mean) / np.linalg.norm(mean))
        for layer in LAYERS
        for mean in [mean_product(layer.name)]
    )


def test_all_rounds_add_up() -> None:
    """After five rounds the stacked product is the sum of the rounds' exact means, compressed or not."""
    server = server_of()
    ended = run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 5)
    for layer in LAYERS:
        expected = sum(mean_product(layer.name, number) for number in range(1, 6))
        assert np.linalg.norm(product(ended, layer.name) - expected) < 1e-12 * np.linalg.norm(expected)
    assert ended["wide.residual_A"].shape == (35, 60)
    assert ended["narrow.residual_B"].shape == (14, 14)


def test_a_layer_is_stacked_as_it_is_until_it_has_as_many_ranks_as_features() -> None:
    """A = [p_1 A_1; ...], B = [B_1, ...], in the order of clients, behind what was there."""
    strategy = strategy_of()
    state = strategy.apply(ServerState({}), reduced(), 1)
    state = strategy.apply(state, reduced(2), 2)
    own = [*zip(SHARES, updates_of(1), strict=True), *zip(SHARES, updates_of(2), strict=True)]
    a = np.vstack([share * one["wide.lora_A"] for share, one in own])
    b = np.hstack([one["wide.lora_B"] for _, one in own])
    assert np.array_equal(state.tensors["wide.residual_A"], a)
    assert np.array_equal(state.tensors["wide.residual_B"], b)


# -- planted bugs -------------------------------------------------------------------------------------


def each(change: Callable[[ClientUpdate, float], dict[str, Any]]) -> Reduced:
    """Return the round's updates with some tensors of each client changed, given its share."""
    whole = reduced()
    return replace(
        whole,
        updates=tuple(
            replace(one, tensors={**one.tensors, **change(one, float(share))})
            for one, share in zip(whole.updates, SHARES, strict=True)
        ),
    )


def scaled(letter: str, one: ClientUpdate, factor: float) -> dict[str, Any]:
    return {name: factor * value for name, value in one.tensors.items() if name.endswith(f"lora_{letter}")}


PLANTED = {
    "weights on both sides": lambda one, share: scaled("B", one, share),
    "weights on none": lambda one, share: scaled("A", one, 1 / share),
    "scale twice": lambda one, _: scaled("B", one, 8.0 / 4),
    "the first client alone": lambda one, share: scaled("A", one, 1 / share if one.client == 0 else 0.0),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_weights_and_scales_are_far_off(bug: str) -> None:
    strategy = strategy_of()
    assert error(strategy.apply(ServerState({}), reduced(), 1)) < 1e-13
    assert error(strategy.apply(ServerState({}), each(PLANTED[bug]), 1)) > 0.1


def test_planted_order_of_arrival_changes_bits() -> None:
    """The reduction sorts; a strategy that stacked as updates arrive would broadcast other tensors each time."""
    strategy = strategy_of()
    states = [strategy.apply(ServerState({}), reduced(order=order), 1) for order in ((0, 1, 2), (2, 0, 1))]
    assert all(np.array_equal(states[0].tensors[name], value) for name, value in states[1].tensors.items())
    arrived = replace(reduced(), updates=reduced().updates[::-1])
    planted = strategy.apply(ServerState({}), arrived, 1)
    assert not np.array_equal(planted.tensors["wide.residual_A"], states[0].tensors["wide.residual_A"])
    assert error(planted) < 1e-13, "the product does not show it"


# -- bytes --------------------------------------------------------------------------------------------


def numbers(ranks: int) -> int:
    """Elements of what is stacked after so many ranks."""
    return sum(min(ranks, layer.d_in, layer.d_out) * (layer.d_in + layer.d_out) for layer in LAYERS)


def lacked(before: int, now: int) -> int:
    """Elements that one lacks who has those of ``before`` ranks: the new ranks, or all of a compressed layer."""
    total = 0
    for layer in LAYERS:
        features, sides = min(layer.d_in, layer.d_out), layer.d_in + layer.d_out
        total += sides * ((now - before) if now <= features else (features if now > before else 0))
    return total


def test_what_is_broadcast_grows_by_the_ranks_of_those_that_did_not_fail() -> None:
    """Two of three clients a round, client 1 fails in round 2: bytes by round as the formula says, resumed or not."""
    server = server_of(clients_per_round=2, failure_threshold=0.5)
    whole = node_of(server)

    def node(message: Any) -> Any:
        instruction = read_instruction(message.content)
        assert len(instruction.clients) == 1
        return RuntimeError("lost") if (instruction.round, instruction.clients[0]) in failing else whole(message)

    cohorts = {number: server.federation.cohort(number) for number in range(1, 8)}
    failing = {(2, cohorts[2][0]), (4, cohorts[4][1])}
    seen: list[tuple[int, int]] = []

    def note(number: int, _result: Any) -> None:
        if number and server.replies is not None:
            seen.append((server.replies.traffic.bytes_down, server.replies.traffic.bytes_down_cached))

    server.start(LoopGrid({1: node, 2: node}), server.arrays, num_rounds=7, on_round=note)
    history, received = [0], dict.fromkeys(range(3), 0)
    for number, cohort in cohorts.items():
        down = 8 * 2 * numbers(history[-1])
        cached = 8 * sum(lacked(history[received[client]], history[-1]) for client in cohort)
        assert seen[number - 1] == (down, cached)
        received |= dict.fromkeys(cohort, number - 1)
        history.append(history[-1] + sum(RANKS[k] for k in cohort if (number, k) not in failing))
    assert server.state.extra[ACCUMULATED].tolist() == [[rank, rank] for rank in history]
    assert history[-1] > 14, "control: the narrow layer is compressed on the way"


def test_as_many_ranks_as_features_are_not_compressed_yet() -> None:
    """At exactly 14 ranks the narrow layer still has its old ranks in front; with the fifteenth all is new."""
    server = server_of()
    per_rank = 60 + 50 + 30 + 14
    ranks = [(rank, rank) for rank in (0, 7, 14, 21, 28)]
    assert server.payloads.down(3, 1, 0, ranks[:3])[1] == 8 * 7 * per_rank
    assert server.payloads.down(4, 2, 0, ranks[:4])[1] == 8 * (7 * 110 + 14 * 44)
    assert server.payloads.down(4, 3, 0, ranks[:4]) == (8 * numbers(21), 0), "it has been sent the round's already"
    assert server.payloads.up(1, 1) == 8 * 4 * per_rank
    assert server.payloads.evaluation(4, 2, 0, ranks[:4]) == server.payloads.down(4, 2, 0, ranks[:4])


def test_clients_are_sent_what_is_stacked_and_no_a_or_b() -> None:
    server = server_of()
    grid = LoopGrid({1: node_of(server)})
    run(server, grid, 3)
    for number, message in enumerate(grid.sent, 1):
        instruction = read_instruction(message.content)
        held = residual_specs(SPECS, [7 * (number - 1)] * 2)
        assert {name: value.shape for name, value in instruction.tensors.items()} == {
            name: spec.shape for name, spec in held.items()
        }
        assert instruction.ranks == RANKS
        assert instruction.reduction == "one-by-one"
        assert instruction.roles == {"A": Role.UPLOAD, "B": Role.UPLOAD}


# -- compression and the fresh start ------------------------------------------------------------------


@pytest.mark.parametrize(("d_out", "d_in", "ranks"), [(12, 30, 40), (30, 12, 13), (9, 9, 18), (12, 30, 5)])
def test_compression_keeps_the_product(d_out: int, d_in: int, ranks: int) -> None:
    """Also where the product has fewer ranks than factors: half of them are there twice."""
    generator = np.random.default_rng(5)
    a, b = generator.standard_normal((ranks, d_in)), generator.standard_normal((d_out, ranks))
    a[ranks // 2 :] = a[: ranks - ranks // 2]
    rank = min(d_in, d_out, ranks)
    short_a, short_b = compress(a, b, rank=rank)
    assert (short_a.shape, short_b.shape) == ((rank, d_in), (d_out, rank))
    assert np.linalg.norm(short_b @ short_a - b @ a) < 1e-12 * np.linalg.norm(b @ a)


def test_compression_below_the_rank_keeps_the_largest_singular_values() -> None:
    generator = np.random.default_rng(6)
    a, b = generator.standard_normal((8, 20)), generator.standard_normal((15, 8))
    short_a, short_b = compress(a, b, rank=3)
    u, s, vt = np.linalg.svd(b @ a)
    assert np.allclose(short_b @ short_a, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-12)


def test_residual_shapes() -> None:
    assert residual_specs(SPECS, ()) == residual_specs(SPECS, (0, 0)) == {}
    assert {name: spec.shape for name, spec in residual_specs(SPECS, (20, 20)).items()} == {
        "wide.residual_A": (20, 60),
        "wide.residual_B": (50, 20),
        "narrow.residual_A": (14, 30),
        "narrow.residual_B": (14, 14),
    }
    assert list(residual_specs(SPECS, (0, 3))) == ["narrow.residual_A", "narrow.residual_B"]
    assert {spec.kind for spec in residual_specs(SPECS, (20, 20)).values()} == {"residual"}


def test_a_fresh_start_differs_by_round() -> None:
    """And is neither the run's own start nor another seed's; B starts at zero each time."""
    starts = [initial_tensors(SPECS, Seeded(seed), "float64", number) for seed in (0, 1) for number in range(3)]
    matrices = [start["wide.lora_A"].tobytes() for start in starts]
    assert len(set(matrices)) == len(matrices)
    assert all(not start["wide.lora_B"].any() for start in starts)
    again = initial_tensors(SPECS, Seeded(0), "float64", 2)
    assert again["wide.lora_A"].tobytes() == matrices[2]
    assert seeded_of("lora")["m.0.q.lora_A"].any(), "control: A does not start at zero"
