"""FedLEASE and LoRA experts: routing by token, clusters, their experts, planted bugs; both are in the matrix, too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import silhouette_score
from torch import Tensor

from clients.worker import Worker
from fedlora.config import Config
from fedlora.engine import layers
from fedlora.engine.layers import routed, router_weights
from fedlora.exchange import ClientReport, Instruction
from fedlora.experts import copied
from fedlora.methods import Experts, LowRank
from fedlora.reduce import ClientUpdate, Reduced
from fedlora.roles import Role
from fedlora.runs.export import adapter_files
from fedlora.server import FlowerStrategy, Payloads
from fedlora.server.observers.records import client_line
from fedlora.state import ServerState
from fedlora.wire import read_instruction
from simulations.setup import resolve
from simulations.trainers import TrainerEvaluator
from strategies import FedLEASE, fedlease
from strategies.build import build_strategy
from strategies.clusters import average_linkage, best_clusters, cosine_distances, silhouette
from strategies.fedprox import FedProx
from tests.support.federation import one_round, run, saved, seeded_of, server_of, strategy_of
from tests.support.formulas import BYTES
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import CONFIGS, MODELS, engine_of, method_of, random_start, setting
from tests.support.plans import plan, shown
from tests.support.trainers import dp_worker, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

TRAINED = frozenset({"A", "B", "router", "head"})


def normal(*key: int, shape: Sequence[int]) -> Any:
    return np.random.default_rng(key).standard_normal(tuple(shape))


# -- the method ---------------------------------------------------------------------------------------


def experts(count: int, groups: int = 2, own: int = 1) -> Experts:
    """Return experts of rank 3 from 6 to 5 features, in float64; the own one is trained by group, the others common."""

    def drawn(number: int, *shape: int) -> Tensor:
        return torch.tensor(normal(number, shape=shape))

    return Experts(
        LowRank(drawn(0, groups, 3, 6), drawn(1, groups, 5, 3), 2.0),
        LowRank(drawn(2, count * 3, 6), drawn(3, 5, count * 3), 2.0),
        drawn(4, groups, 2 * count - 1, 6),
        torch.eye(count, dtype=torch.float64)[own % count],
    )


TOKENS = torch.tensor(normal(9, shape=(2, 400, 6)))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_between_one_and_all_experts_act_on_a_token_and_the_own_one_always_does(count: int) -> None:
    made = experts(count)
    own, others = router_weights(made, TOKENS)
    assert torch.allclose(own[..., 0] + others.sum(-1), torch.ones(2, 400, dtype=torch.float64), atol=1e-14)
    assert bool((own > 0).all())
    assert not others[..., 1 % count].any(), "the copy that the own one started from has no weight"
    acting = 1 + (others > 0).sum(-1)
    assert set(acting.flatten().tolist()) == set(range(1, count + 1))


def test_one_expert_is_plain_lora_and_so_is_the_start() -> None:
    """Whatever the router says: with one output, and where all experts count as the own one."""
    lone, start = experts(1), replace_own(experts(4), torch.ones(4, dtype=torch.float64))
    for made in (lone, start):
        plain = TOKENS @ made.own.A.mT @ made.own.scaled_b().mT
        assert torch.allclose(routed(made, TOKENS), plain, atol=1e-13)
    assert not torch.allclose(routed(experts(4), TOKENS), TOKENS @ start.own.A.mT @ start.own.scaled_b().mT, atol=0.1)


def replace_own(made: Experts, own: Tensor) -> Experts:
    return made._replace(is_own=own)


def test_gradcheck_of_routed_updates() -> None:
    """Of tokens, both factors of the own expert and the router, by finite differences: no output is near another."""
    made = experts(3)
    values = [value.requires_grad_() for value in (TOKENS[:, :4].clone(), made.own.A, made.own.B, made.router)]

    def function(x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        return routed(Experts(LowRank(a, b, 2.0), made.all, router, made.is_own), x)

    assert torch.autograd.gradcheck(function, values)


@pytest.mark.parametrize("larger", [1, 2])
def test_router_outputs_of_sixteen_bits_are_told_apart(larger: int) -> None:
    """Of two outputs that are one number in bfloat16 the larger one is chosen beside the largest of all."""
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    router = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.bfloat16)
    router[larger, 1] = 2.0**-12
    assert len(set((x @ router.mT).flatten().tolist())) == 2, "control"
    own, others = router_weights(Experts(LowRank(x, x, 1.0), LowRank(x, x, 1.0), router, torch.zeros(2)), x)
    assert [bool(others[..., 1] > 0), bool(own > 0)] == [larger == 1, larger == 2]


def planted(change: Any) -> Any:
    """Return the weights with a bug in them."""
    right = router_weights

    def wrong(made: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
        return change(made, x, *right(made, x))  # type: ignore[no-any-return]

    return wrong


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda made, x, own, rest: (own, rest + own * made.is_own.unsqueeze(-2)), id="the copy counts too"
        ),
        pytest.param(lambda made, x, own, rest: (own, rest.roll(1, -1)), id="experts exchanged"),
        pytest.param(lambda made, x, own, rest: (own.mean(-2, True).expand_as(own), rest), id="one weight for a row"),
        pytest.param(lambda made, x, own, rest: (own.detach(), rest.detach()), id="a router without gradient"),
    ],
)
def test_planted_wrong_weights_are_seen(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "router_weights", planted(change))
    with pytest.raises(AssertionError):
        packed_equals_sequential("lora-experts", TRAINED, "bert")


def test_planted_all_outputs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax over all outputs in place of the M largest."""

    def soft(made: Experts, x: Tensor) -> tuple[Tensor, Tensor]:
        count = made.is_own.shape[-1]
        weight = (x @ made.router.mT).softmax(-1)
        first, is_own = weight[..., :count], made.is_own.unsqueeze(-2)
        own = (first * is_own).sum(-1, keepdim=True) + weight[..., count:].sum(-1, keepdim=True)
        return own, first * (1 - is_own)

    monkeypatch.setattr(layers, "router_weights", soft)
    with pytest.raises(AssertionError):
        packed_equals_sequential("lora-experts", TRAINED, "bert")


@pytest.mark.parametrize("family", MODELS)
def test_fewer_experts_than_there_may_be(family: str) -> None:
    """Two of three: the first three of the router's outputs count, and no other number does."""
    engine = engine_of("lora-experts", family)
    start = random_start(engine)
    few = {name: value[:2] if name.endswith("_all") else value for name, value in start.items()}
    factors = engine.method.factors({name: torch.tensor(value) for name, value in few.items()})
    made = next(factor for factor in factors.values() if isinstance(factor, Experts))
    assert made.router.shape[-2] == 3
    assert made.is_own.shape == (2,)
    assert made.all.A.shape[-2] == 2 * made.own.A.shape[-2]


def test_export_is_refused_with_the_reason() -> None:
    engine = engine_of("lora-experts", "bert")
    with pytest.raises(ValueError, match=r"the method cannot be exported to PEFT: its router weighs"):
        adapter_files(engine, random_start(engine), CONFIGS["lora-experts"])


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"lora-experts.max-experts": 1}, r"lora-experts.max-experts = 1: must be at least 2: a router has nothing"),
        ({"method.rslora": True}, r"method.rslora = true: is read by lora; lora-experts scales by alpha / rank"),
        ({"method.name": "lora"}, r"method.name = 'lora': strategy 'fedlease' works with lora-experts"),
        ({"method.ranks": "1,2"}, r"method.ranks"),
        ({"rounds": 1}, r"rounds = 1: must be at least 2: round 1 is for the clusters"),
        (
            {"federation.num-clients": 8, "federation.clients-per-round": 4},
            r"federation.clients-per-round = 4: strategy 'fedlease' makes clusters of the clients of round 1, so all",
        ),
        ({"strategy.name": "fedavg", "method.name": "lora-experts"}, r"method.name = 'lora-experts'"),
        ({"server.optimizer": "adam"}, r"server.optimizer = 'adam': strategy 'fedlease' does not average in a fixed"),
        ({"local.term": "scaffold"}, r"scaffold"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_strategy(resolve({"strategy.name": "fedlease", **flat}), method_of("lora-experts").specs())


# -- clusters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7, 12])
def test_clusters_are_those_of_scipy_and_their_silhouette_that_of_scikit_learn(count: int) -> None:
    tensors = [[normal(count, layer, client, shape=(4, 3)) for client in range(count)] for layer in range(3)]
    distances = cosine_distances(tensors)
    for one in range(count):
        for other in range(count):
            pairs = [(values[one].ravel(), values[other].ravel()) for values in tensors]
            cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in pairs]
            assert distances[one, other] == pytest.approx(1 - np.mean(cosines), abs=1e-14)
    tree = linkage(squareform(distances, checks=False), "average")
    for labels in average_linkage(distances):
        number = int(labels.max()) + 1
        theirs = fcluster(tree, number, "maxclust")
        assert (labels[:, None] == labels).tolist() == (theirs[:, None] == theirs).tolist()
        if 2 <= number < count:
            expected = silhouette_score(distances, labels, metric="precomputed")
            assert silhouette(distances, labels) == pytest.approx(expected, abs=1e-12)


GROUPS = (0, 1, 2, 0, 0, 1, 2)


def grouped(client: int, layer: int = 0) -> Any:
    """A B that clients of a group have nearly in common, each at a length of its own."""
    return (1.0 + client) * (normal(GROUPS[client], layer, shape=(5, 3)) + 0.1 * normal(99, client, shape=(5, 3)))


@pytest.mark.parametrize(("most", "found"), [(2, 2), (3, 3), (6, 3)])
def test_planted_groups_are_found_up_to_the_most(most: int, found: int) -> None:
    distances = cosine_distances([[grouped(client, layer) for client in range(7)] for layer in range(2)])
    labels = best_clusters(distances, most)
    assert labels.max() + 1 == found
    if found == 3:
        assert labels.tolist() == list(GROUPS), "numbered in the order of their first clients"


def test_clusters_of_clients_that_cannot_be_told_apart() -> None:
    """Equal ones make the fewest clusters, a zero one is far from all, and one client alone is one cluster."""
    one = normal(1, shape=(5, 3))
    same = cosine_distances([[one, 2 * one, 3 * one, one]])
    assert np.abs(same).max() < 1e-15
    assert best_clusters(same, 4).max() + 1 == 2
    assert cosine_distances([[one, 0 * one]])[0, 1] == 1.0
    assert best_clusters(np.zeros((1, 1)), 4).tolist() == [0]


# -- the server ---------------------------------------------------------------------------------------


def strategy() -> FedLEASE:
    made = strategy_of("fedlease", "lora-experts")
    assert isinstance(made, FedLEASE)
    return made


def grouped_updates(number: int, clients: Sequence[int] = range(7)) -> Reduced:
    """Updates of a round: B by group and round, A and head of each client; A in groups of its own."""
    specs, found = strategy().expected(number), []
    for client in clients:
        tensors = update_of(client, number, specs)
        for place, (_, a, b) in enumerate(strategy()._pairs):
            noise = 0.1 * tensors[b]
            tensors[b] = (1.0 + client) * (normal(number, GROUPS[client], place, shape=specs[b].shape) + noise)
            tensors[a] = normal(number, client % 2, place, shape=specs[a].shape) + 0.1 * tensors[a]
        found.append(ClientUpdate(client, examples_of(client), tensors))
    return Reduced(len(found), updates=tuple(found))


def after_round_1(clients: Sequence[int] = range(7)) -> ServerState:
    return strategy().apply(strategy().initial(seeded_of("lora-experts")), grouped_updates(1, clients), 1)


def check_experts(state: ServerState, found: Reduced, held: ServerState | None = None) -> None:
    """Check that each expert is the mean over its group, by examples, and the head that over all."""
    for name, spec in strategy().expected(1).items():
        groups = [GROUPS] if spec.kind != "head" else [(0,) * 7]
        for group in sorted(set(groups[0])):
            own = [one for one in found.updates if groups[0][one.client] == group]
            server = state.tensors[name] if spec.kind == "head" else state.tensors[f"{name}_all"][group]
            if own:
                total = sum(one.weight for one in own)
                expected = sum(one.weight * one.tensors[name] for one in own) / total
            else:
                assert held is not None
                expected = held.tensors[f"{name}_all"][group]
            assert np.abs(server - expected).max() < 1e-12
            assert server.shape == spec.shape


def test_experts_are_the_means_of_their_clusters() -> None:
    """In round 1, where clusters are found, and later; an expert without a client in a round stays as it is."""
    state = after_round_1()
    assert state.extra[fedlease.EXPERTS].tolist() == list(GROUPS)
    check_experts(state, grouped_updates(1))
    for clients in (range(7), (0, 2, 3)):
        found = grouped_updates(2, clients)
        now = strategy().at(state)
        assert [now.expert(client) for client in range(7)] == list(GROUPS)
        check_experts(now.apply(state, found, 2), found, state)


def by_a(tensors: Any) -> Any:
    """A planted bug: clients are compared by something else than their B."""
    shapes = [np.shape(values) for values in tensors]
    return cosine_distances([[normal(client, shape=(3,)) for client in range(shapes[0][0])]])


@pytest.mark.parametrize("bug", ["one mean for all", "clusters of other distances", "clusters of the last round"])
def test_planted_wrong_experts_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if bug == "one mean for all":
        right = fedlease.weighted_mean
        monkeypatch.setattr(fedlease, "weighted_mean", lambda _own, names: right(grouped_updates(1).updates, names))
    elif bug == "clusters of other distances":
        monkeypatch.setattr(fedlease, "cosine_distances", by_a)
    else:
        monkeypatch.setattr(FedLEASE, "expert", lambda _self, client: (client + 1) % 3)
    with pytest.raises(AssertionError):
        test_experts_are_the_means_of_their_clusters()


def test_clients_that_were_not_in_round_1_belong_to_the_largest_cluster() -> None:
    """One between others, and one behind the last."""
    state = after_round_1((0, 1, 3, 4))
    now = strategy().at(state)
    assert [now.expert(client) for client in range(7)] == [0, 1, 0, 0, 0, 0, 0]


def test_one_update_in_round_1_makes_an_expert_and_one_that_adds_nothing() -> None:
    state = after_round_1((2,))
    for _, a, b in strategy()._pairs:
        assert len(state.tensors[f"{a}_all"]) == len(state.tensors[f"{b}_all"]) == 2
        assert state.tensors[f"{b}_all"][0].any()
        assert not state.tensors[f"{b}_all"][1].any()


@pytest.mark.parametrize("head", [Role.SHARED, Role.PERSONAL, Role.FROZEN])
def test_roles(head: Role) -> None:
    made = FedLEASE(setting("lora-experts", head=head))
    for number in range(1, 6):
        roles = made.all_roles(number)
        assert roles == {
            **{
                "A": Role.UPLOAD,
                "B": Role.UPLOAD,
                "A_all": Role.BROADCAST,
                "B_all": Role.BROADCAST,
                "own": Role.FROZEN,
            },
            **{"router": Role.FROZEN if number == 1 else Role.PERSONAL, "head": head},
        }


def served(rounds: int) -> tuple[FlowerStrategy, LoopGrid]:
    server = server_of(strategy(), "lora-experts")
    grid = LoopGrid({1: node_of(server), 2: node_of(server)})
    run(server, grid, rounds)
    return server, grid


def test_instructions_name_each_clients_expert_and_hold_them_all() -> None:
    """One in round 1; then as many as there are clusters, in training and in evaluation alike."""
    server, grid = served(3)
    known = server.state.extra[fedlease.EXPERTS].tolist()
    assert len(set(known)) == 3
    for message in grid.sent:
        told = read_instruction(message.content)
        first = told.round == 1
        assert told.experts == tuple(0 if first else int(known[client]) for client in told.clients)
        counts = {len(value) for name, value in told.tensors.items() if name.endswith("_all")}
        assert counts == {1 if first else 3}
        some = told.part(told.clients[-1:])
        assert some.experts == (told.expert(told.clients[-1]),)
    assert {message.metadata.message_type for message in grid.sent} == {"train", "evaluate"}


def resumed(forget: bool) -> Arrays:
    first, _ = served(2)
    state = saved(first.state)
    if forget:  # a planted bug: clusters are not a part of what is saved
        state = replace(state, extra={})
    server = server_of(strategy(), "lora-experts", state)
    return run(server, LoopGrid({1: node_of(server), 2: node_of(server)}), 4, completed=2)


def test_clusters_are_resumed_and_a_resume_that_forgets_them_is_seen() -> None:
    whole, _ = served(4)
    ended = resumed(forget=False)
    assert all(np.array_equal(ended[name], value) for name, value in whole.state.tensors.items())
    forgot = resumed(forget=True)
    assert any(not np.array_equal(forgot[name], value) for name, value in whole.state.tensors.items())


def test_bytes_are_the_most_before_the_clusters_are_known() -> None:
    """A plan's strategy has three experts from round 2 on; a server with two clusters sends two."""
    numbers, down, _ = BYTES["fedlease", "lora-experts"]
    made = FedLEASE(setting("lora-experts", head=Role.FROZEN, config=Config(rounds=4)))
    payloads = Payloads(made, "float64")
    assert [payloads.up(number) for number in (1, 2, 3)] == [8 * numbers] * 3
    assert [payloads.down(number)[0] for number in (1, 2, 3)] == [8 * numbers, 8 * down, 8 * down]
    assert payloads.cycle() == (8 * numbers, 8 * (numbers + 3 * down) / 4, 8 * 3 * down / 4)
    two = replace(after_round_1((0, 1)), clients=after_round_1().clients)
    at = Payloads(made.at(two), "float64")
    assert at.down(2)[0] == 8 * 2 * numbers


def test_a_wrapper_passes_experts_on() -> None:
    inner = FedLEASE(setting("lora-experts"))
    around = FedProx(inner, 0.1)
    assert around.most_experts == 3
    assert around.at(after_round_1()).expert(2) == 2
    evaluator = TrainerEvaluator(None, 0, around)  # type: ignore[arg-type]
    assert evaluator._instruction({}, {}, 1, (1, 2)).experts == (0, 0)
    assert evaluator.at(around.at(after_round_1()))._instruction({}, {}, 2, (1, 2)).experts == (1, 2)


def test_max_change_counts_from_the_clients_expert() -> None:
    """A client that sends its expert back has changed nothing; one that sends another cluster's has."""
    state = after_round_1()
    server = server_of(
        strategy(), "lora-experts", state, clients=7, deployed=True, max_change=1e-3, failure_threshold=1.0
    )

    def spoil(client: int, update: Arrays) -> Arrays:
        other = copied(state.tensors, (GROUPS[client] + 1) % 3)
        return update if client != 4 else {name: other.get(name, value) for name, value in update.items()}

    grid = LoopGrid({client + 1: node_of(server, spoil, same={}) for client in range(7)})
    one_round(server, grid, 2)
    assert server.replies is not None
    assert list(server.replies.refused) == [4]
    assert "federation.max-change" in server.replies.refused[4]


def test_a_record_says_the_expert_that_a_client_trained() -> None:
    report = ClientReport(3, examples=5, steps=2, metrics={"loss": 0.5})
    assert client_line(2, report, None, expert=1)["expert"] == 1
    assert "expert" not in client_line(2, report, None)


def test_the_plan_says_what_is_not_known_yet(tmp_path: Path) -> None:
    said = shown(plan(tmp_path, **{"strategy.name": "fedlease", "method.rank": 2, "rounds": 5}))
    assert "experts: as many as round 1 shows clusters of clients, 2 to 4; bytes down are for the most" in said
    assert "means over 5 rounds" in said
    assert "down at most" in said
    assert "no adapter will be written: its router weighs" in said


# -- clients ------------------------------------------------------------------------------------------

KEYS = {"strategy.name": "fedlease", "rounds": 4, "train.learning-rate": 0.05, "lora-experts.max-experts": 3}


def second_round(worker: Worker, clients: Sequence[int] = (0, 1, 2, 3)) -> tuple[Instruction, ServerState]:
    """Return what is told in round 2, after a first round of all clients in three planted clusters."""
    model = worker.loaded.model
    made = build_strategy(model.config, model.specs)
    start = made.initial(model.initial)
    state = replace(start, extra={fedlease.EXPERTS: np.array([0.0, 1.0, 2.0, 1.0])})
    experts = {
        name: np.stack([value[0] + 0.2 * normal(number, len(name), shape=value.shape[1:]) for number in range(3)])
        if name.endswith("_all")
        else value
        for name, value in start.tensors.items()
    }
    state = replace(state, tensors=experts)
    own = tuple(made.at(state).expert(client) for client in clients)
    heads = ("",) * len(clients) if model.config.privacy.mode == "dp" else ()
    told = Instruction(2, tuple(clients), made.all_roles(2), experts, experts=own, ledger_heads=heads)  # type: ignore[arg-type]
    return told, state


def test_clients_of_several_clusters_in_one_pack_are_as_each_alone(tmp_path: Path) -> None:
    """Each starts from its own expert, trains it with the others fixed, and keeps its router for the next round."""
    worker = tiny_worker(tmp_path / "pack", **KEYS)
    told, _ = second_round(worker)
    together = worker.train(told)
    specs = worker.loaded.model.specs
    for place, update in enumerate(together):
        assert update.report.reason == ""
        alone = tiny_worker(tmp_path / f"alone-{place}", **KEYS)
        (expected,) = alone.train(told.part((place,)))
        assert update.tensors.keys() == expected.tensors.keys()
        off = max(np.abs(update.tensors[name] - value).max() for name, value in expected.tensors.items())
        assert off < 1e-10
        kept = worker.loaded.store.load(place, 3)
        assert kept is not None
        assert {specs[name].kind for name in kept} == {"router"}
        assert all(not np.array_equal(value, worker.loaded.model.initial[name]) for name, value in kept.items())
        start = copied(told.tensors, told.experts[place])
        moved = [np.abs(update.tensors[name] - start[name]).max() for name in update.tensors if name in start]
        assert 0 < max(moved) < 0.5, "three steps of AdamW at 0.05 from the client's own expert"
    sums = worker.evaluate_personal(replace(told, round=3), "test")
    assert len({report.metrics["loss"] for report in sums}) == 4


@pytest.mark.parametrize("what", ["another's expert", "the other experts", "its router"])
def test_what_a_client_computes_depends_on_all_that_it_has(what: str, tmp_path: Path) -> None:
    """So that a client which ignored one of them would be seen."""
    worker = tiny_worker(tmp_path, **KEYS)
    told, _ = second_round(worker, (0,))
    before = worker.evaluate_personal(told, "test")[0].metrics["loss"]
    if what == "another's expert":
        told = replace(told, experts=(1,))
    elif what == "the other experts":
        changed = {n: np.concatenate([v[:1], 2 * v[1:]]) if n.endswith("_all") else v for n, v in told.tensors.items()}
        told = replace(told, tensors=changed)
    else:
        routers = {n: -v for n, v in worker.loaded.model.initial.items() if n.endswith(".router")}
        worker.loaded.store.save(0, 1, routers)
    assert worker.evaluate_personal(told, "test")[0].metrics["loss"] != before


def test_an_expert_that_was_not_sent_is_refused(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **KEYS)
    told, _ = second_round(worker, (0,))
    (update,) = worker.train(replace(told, experts=(3,)))
    assert "expert 3 is not one of those that were sent, [3]" in update.report.reason
    torn = {n: v[:2] if n.endswith("_A_all") else v for n, v in told.tensors.items()}
    (update,) = worker.train(replace(told, tensors=torn))
    assert "expert 0 is not one of those that were sent, [2, 3]" in update.report.reason


def test_under_dp_the_router_is_noised_and_paid_for_and_stays(tmp_path: Path) -> None:
    worker = dp_worker(tmp_path, **KEYS, **{"train.local-steps": 1, "train.optimizer": "sgd"})
    told, _ = second_round(worker, (0, 1))
    specs = worker.loaded.model.specs
    for update in worker.train(told):
        assert update.report.reason == ""
        assert update.report.ledger_head
        assert {specs[name].kind for name in update.tensors} == {"A", "B", "head"}
        kept = worker.loaded.store.load(update.client, 3)
        assert kept is not None
        initial = worker.loaded.model.initial
        assert all((value != initial[name]).all() for name, value in kept.items()), "noise on every number"


def released(worker: Worker, told: Instruction) -> Mapping[str, Any]:
    (update,) = worker.train(told)
    assert update.report.reason == ""
    return update.tensors


def test_rows_stay_independent_under_dp(tmp_path: Path) -> None:
    """A client's noised sum is the same whoever is in its pack: no token of another row or client routes its own."""
    keys = {**KEYS, "train.local-steps": 2, "privacy.seed": 5}
    pack = dp_worker(tmp_path / "pack", **keys)
    told, _ = second_round(pack)
    together = {update.client: update.tensors for update in pack.train(told)}
    for client in (0, 2):
        alone = released(dp_worker(tmp_path / f"alone-{client}", **keys), told.part((client,)))
        assert max(np.abs(alone[name] - value).max() for name, value in together[client].items()) < 1e-10
