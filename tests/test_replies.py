"""Replies of a round: what is folded, what is refused by name, and when a run stops."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedlora.exchange import ClientReport
from fedlora.reduce import WeightedMean
from fedlora.roles import Role
from fedlora.server import FederationError, FlowerStrategy
from fedlora.wire import (
    Reply,
    read_instruction,
    read_reduction,
    read_reports,
)
from strategies import FFALora
from tests.support.loop import Arrays, LoopGrid, Node, examples_of, node_of, update_of
from tests.support.small import failing, one_round, replies_of, server_of, silent


def spoiled(kind: str) -> Callable[[int, Arrays], Arrays]:
    """What client 2 does to its update."""

    def change(client: int, update: Arrays) -> Arrays:
        if client != 2:
            return update
        name = "a.lora_B"
        value = update[name].copy()
        match kind:
            case "nan":
                value[0, 0] = np.nan
            case "infinity":
                value[0, 0] = -np.inf
            case "shape":
                value = value[:-1]
            case "transposed":
                value = np.ascontiguousarray(value.T)
            case "dtype":
                value = value.astype(np.float32)
            case "name":
                return {("a.lora_C" if key == name else key): v for key, v in update.items()}
            case "missing":
                return {key: v for key, v in update.items() if key != name}
            case "frozen-sent":
                return {**update, "a.lora_A": np.zeros((2, 6))}
            case "huge":
                value[0, 0] = 1e15
        return {**update, name: value}

    return change


REFUSALS = {
    "nan": "a.lora_B holds NaN or infinity",
    "infinity": "a.lora_B holds NaN or infinity",
    "shape": r"a.lora_B has shape \[9, 2\], not \[10, 2\]",
    "transposed": r"a.lora_B has shape \[2, 10\], not \[10, 2\]",
    "dtype": "a.lora_B has dtype float32, not float64",
    "name": "a.lora_B is missing",
    "missing": "a.lora_B is missing",
    "frozen-sent": "a.lora_A is not expected",
    "huge": "a.lora_B passed",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_wrong_reply_is_refused_named_and_counted(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Each client on a node of its own: the wrong one is left out, the round goes on with the others."""
    server = server_of(FFALora)
    grid = LoopGrid({k: node_of(server, spoiled(kind)) for k in range(1, 5)})
    ended = one_round(server, grid)
    assert list(replies_of(server).refused) == [2]
    assert "client 2 is left out" in caplog.text
    assert re.search(REFUSALS[kind], replies_of(server).refused[2])
    shared = server.strategy.expected(1)
    good = [k for k in range(4) if k != 2]
    weights = np.array([examples_of(k) for k in good], dtype=float)
    mean = sum(w * update_of(k, 1, shared)["a.lora_B"] for w, k in zip(weights / weights.sum(), good, strict=True))
    assert np.abs(ended["a.lora_B"] - mean).max() < 1e-14


def liar(server: FlowerStrategy, field: str) -> Node:
    """A node whose reply is well formed, but not an answer to its question."""
    node = node_of(server)

    def answer(message: Message) -> RecordDict:
        content = node(message)
        assert isinstance(content, RecordDict)
        head = content["reply"]
        assert isinstance(head, ConfigRecord)
        match field:
            case "clients":
                head["clients"] = [99]
            case "examples":
                head["examples"] = [0]
            case "lists":
                head["examples"] = [1, 2]
            case "loss":
                head["metric.loss"] = [float("nan")]
            case "no-reply":
                del content["reply"]
            case "no-update":
                del content["reduced.update"]
            case "weight":
                head["values"] = [7, 1]
            case "beside":
                content["reduced.coarse"] = content["reduced.update"]
            case "cut":
                data = content["reduced.update"]["0"]  # type: ignore[index]
                content["reduced.update"]["0"] = type(data)("uint8", (3,), data.stype, data.data[:3])  # type: ignore[index]
        return content

    return answer


@pytest.mark.parametrize(
    "field", ["clients", "examples", "lists", "loss", "no-reply", "no-update", "weight", "beside", "cut"]
)
def test_a_reply_that_is_no_answer_is_refused(field: str) -> None:
    server = server_of(FFALora)
    nodes = {k: node_of(server) for k in range(1, 5)}
    one_round(server, LoopGrid({**nodes, 3: liar(server, field)}))
    assert list(replies_of(server).refused) == [2]
    assert replies_of(server).total.count == 3


@pytest.mark.parametrize(
    ("node", "reason"), [(failing, "its node failed: out of memory"), (silent, "no reply arrived in time")]
)
def test_a_node_that_fails_or_never_answers(node: Node, reason: str) -> None:
    server = server_of(FFALora)
    one_round(server, LoopGrid({**{k: node_of(server) for k in range(1, 5)}, 4: node}))
    assert replies_of(server).refused == {3: reason}


def test_past_the_threshold_the_run_stops() -> None:
    server = server_of(FFALora, failure_threshold=0.25)
    nodes: dict[int, Node] = {1: node_of(server), 2: node_of(server), 3: failing, 4: failing}
    with pytest.raises(FederationError, match=r"2 of 4 clients failed.*client 2: its node failed: out of memory"):
        one_round(server, LoopGrid(nodes))
    server = server_of(FFALora, failure_threshold=0.9)
    with pytest.raises(FederationError, match="4 of 4 clients failed"):
        one_round(server, LoopGrid(dict.fromkeys(range(1, 5), failing)))


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_a_sum_that_cannot_be_one_is_refused(part: str) -> None:
    """A node for two clients sends parts that are off their grids: finite, of the right shape, and wrong."""
    server = server_of(FFALora)
    node = node_of(server)

    def forged(message: Message) -> RecordDict:
        content = node(message)
        assert isinstance(content, RecordDict)
        reduction = read_reduction(content, "mean")
        assert isinstance(reduction, WeightedMean)
        parts = getattr(reduction.tensors, part)
        parts["a.lora_B"] = parts["a.lora_B"].copy()
        parts["a.lora_B"][0, 0] = 1e10 + 1e-5 if part == "coarse" else 1e30
        return Reply(read_reports(content), reduction).to_content()

    one_round(server, LoopGrid({1: node_of(server), 2: forged}))
    assert set(replies_of(server).refused) == {2, 3}
    assert all("cannot come from that many updates" in reason for reason in replies_of(server).refused.values())


def personal(server: FlowerStrategy, answers: Node | None = None, **metrics: float) -> Node:
    """A node that trains, and evaluates its clients on 10 rows each."""

    def node(message: Message) -> Any:
        if message.metadata.message_type == "train":
            return node_of(server)(message)
        if answers is not None:
            return answers(message)
        clients = read_instruction(message.content).clients
        facts = [{"accuracy": float(client), "loss": 5.0, **metrics} for client in clients]
        return Reply(
            [ClientReport(c, examples=10, metrics=own) for c, own in zip(clients, facts, strict=True)]
        ).to_content()

    return node


def evaluated(server: FlowerStrategy, nodes: dict[int, Node]) -> Any:
    """Run a round and return what its clients' evaluations came to."""
    return server.start(LoopGrid(nodes), server.arrays, num_rounds=1, timeout=1.0).evaluate_metrics_clientapp[1]


def test_personal_evaluation_asks_who_has_trained_and_counts_who_fails() -> None:
    """Two of four clients are sampled a round; one node fails to evaluate."""
    server = server_of(FFALora, head=Role.PERSONAL, clients_per_round=2)
    metrics = evaluated(server, {1: personal(server)})
    assert metrics["personal_clients"] == 2
    assert metrics["personal_accuracy"] == pytest.approx(sum(server.federation.cohort(1)) / 20)
    assert metrics["personal_loss"] == pytest.approx(0.5)
    server = server_of(FFALora, head=Role.PERSONAL)
    nodes = {k: personal(server, failing if k == 4 else None) for k in range(1, 5)}
    assert evaluated(server, nodes)["personal_clients"] == 3


def test_a_personal_report_cannot_change_another_clients() -> None:
    """Names of its own are means over those that report them; NaN and metrics called like ours change nothing."""
    server = server_of(FFALora, head=Role.PERSONAL)
    nodes = {k: personal(server) for k in (1, 2, 3)}
    plain = evaluated(server, {**nodes, 4: personal(server, failing)})
    assert evaluated(server, {**nodes, 4: personal(server, loss=float("nan"))}) == plain
    strange = evaluated(server, {**nodes, 4: personal(server, strange=7.0, examples=1e9, clients=9.0)})
    assert strange["personal_clients"] == 4
    assert strange["personal_strange"] == pytest.approx(0.7)
    assert strange["personal_loss"] == plain["personal_loss"] == pytest.approx(0.5)


def test_a_run_whose_evaluations_all_fail_stops() -> None:
    server = server_of(FFALora, head=Role.PERSONAL)
    nodes = {k: personal(server, silent if k == 1 else failing) for k in range(1, 5)}
    with pytest.raises(FederationError, match=r"4 of 4 clients failed.*evaluation: no reply arrived in time"):
        evaluated(server, nodes)


def test_a_second_reply_of_a_node_is_ignored(caplog: pytest.LogCaptureFixture) -> None:
    server = server_of(FFALora)
    grid = LoopGrid({1: node_of(server), 2: node_of(server)}, order=lambda replies: [*replies, *replies[:1]])
    ended = one_round(server, grid)
    assert "a reply of node 1, of which none is awaited, is ignored" in caplog.text
    again = server_of(FFALora)
    assert all(np.array_equal(v, ended[n]) for n, v in one_round(again, LoopGrid({1: node_of(again)})).items())


def test_a_failed_round_changes_no_tensor_and_can_be_repeated() -> None:
    """The state after it is that of before, but for what clients were sent; the round run again gives its bits."""
    server, calm = server_of(FFALora), server_of(FFALora)
    before = dict(server.state.tensors)
    with pytest.raises(FederationError):
        one_round(server, LoopGrid(dict.fromkeys(range(1, 5), failing)))
    assert all(np.array_equal(value, server.state.tensors[name]) for name, value in before.items())
    assert server.state.clients.trained == frozenset()
    expected = one_round(calm, LoopGrid({1: node_of(calm)}))
    ended = one_round(server, LoopGrid({1: node_of(server)}))
    assert all(np.array_equal(ended[name], value) for name, value in expected.items())
