"""Strategies: exactness, sampling, the streaming fold, and what is refused."""

from __future__ import annotations

import doctest
import re
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import fedlora.strategy
from fedlora.codec import payload_bytes
from fedlora.exchange import ClientReport, Update
from fedlora.methods import Head, Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.reduce import WeightedMean
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.server import Federation, FederationError, FlowerStrategy, assigned
from fedlora.server.replies import Replies
from fedlora.strategy import Setting, Specs, Strategy
from fedlora.wire import (
    Reply,
    encode,
    from_named_arrays,
    message_bytes,
    read_instruction,
    read_reduction,
    read_reports,
)
from strategies import FedAvg, FedSVD, FFALora
from tests.support.loop import Arrays, LoopGrid, Node, answer, examples_of, node_of, update_of

LAYERS = [Layer("a", 6, 10, bias=True, fan_in_fan_out=False), Layer("b", 8, 4, bias=False, fan_in_fan_out=True)]
SPECS = Head(Lora(LAYERS, rank=2, alpha=4.0, rslora=False), [Layer("head", 4, 3, True, False)]).specs()


def server_of(
    kind: type[Strategy], clients: int = 4, *, specs: Specs = SPECS, head: Role = Role.SHARED, **changes: Any
) -> FlowerStrategy:
    federation = Federation(**{"num_clients": clients, "dtype": "float64", **changes})
    strategy = kind(Setting(specs, head))
    return FlowerStrategy(strategy, federation, strategy.initial(initial_tensors(specs, Seeded(0), federation.dtype)))


def one_round(server: FlowerStrategy, grid: LoopGrid) -> Arrays:
    result = server.start(grid, server.arrays, num_rounds=1, timeout=1.0)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


def replies_of(server: FlowerStrategy) -> Replies:
    """The last round's replies."""
    assert server.replies is not None
    return server.replies


@pytest.mark.parametrize("module", [fedlora.strategy])
def test_the_example_of_the_contract_runs(module: Any) -> None:
    assert doctest.testmod(module).attempted > 5
    assert doctest.testmod(module).failed == 0


def test_fedsvd_needs_room_for_orthonormal_rows() -> None:
    narrow = Lora([Layer("n", 16, 4, True, False)], rank=8, alpha=8.0, rslora=False).specs()
    with pytest.raises(ValueError, match=r"the rank 8 of n.lora_A is above the layer's 4 features.* lower method.rank"):
        FedSVD(Setting(narrow))


def test_frozen_tensors_never_cross_the_wire() -> None:
    """FFA-LoRA sends and accepts no A, and half the bytes of FedAvg for square layers."""
    server = server_of(FFALora)
    grid = LoopGrid({1: node_of(server)})
    one_round(server, grid)
    sent = read_instruction(grid.sent[0].content).tensors
    assert sorted(sent) == ["a.lora_B", "b.lora_B", "head.bias", "head.weight"]
    square = Lora([Layer("s", 16, 16, True, False)], rank=4, alpha=8.0, rslora=False).specs()
    sizes = [payload_bytes(cls(Setting(square)).sent(1), "float32") for cls in (FFALora, FedAvg)]
    assert sizes == [4 * 16 * 4, 2 * 4 * 16 * 4]


@pytest.mark.parametrize("head", list(Role)[:3])
def test_head_policies(head: Role) -> None:
    strategy = FFALora(Setting(SPECS, head))
    sent = strategy.sent(1)
    assert ("head.weight" in sent) == (head is Role.SHARED)
    assert strategy.all_roles(1)["head"] is head


def test_sampling_depends_on_seed_and_round_alone() -> None:
    federation = Federation(20, clients_per_round=5, seed=3)
    again = Federation(20, clients_per_round=5, seed=3)
    rounds = [federation.cohort(n) for n in (1, 2, 3)]
    assert rounds == [again.cohort(n) for n in (1, 2, 3)]
    assert len({tuple(clients) for clients in rounds}) == 3
    assert rounds[0] != Federation(20, clients_per_round=5, seed=4).cohort(1)
    assert all(len(set(clients)) == 5 and clients == sorted(clients) for clients in rounds)
    assert len({client for n in range(1, 60) for client in federation.cohort(n)}) == 20


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


def failing(_message: Message) -> Exception:
    return RuntimeError("out of memory")


def silent(_message: Message) -> None:
    return None


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
                data = content["reduced.update"]["data"]  # type: ignore[index]
                content["reduced.update"]["data"] = type(data)("uint8", (3,), data.stype, data.data[:3])  # type: ignore[index]
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


def test_server_memory_does_not_grow_with_clients() -> None:
    """Replies are folded as they arrive: sixteen times the clients, the same peak."""
    wide = Lora([Layer("w", 4000, 4000, True, False)], rank=8, alpha=8.0, rslora=False).specs()

    def peak(clients: int) -> int:
        server = server_of(FFALora, clients, specs=wide, dtype="float32")
        tensors = update_of(0, 1, server.strategy.expected(1), "float32")

        def node(message: Message) -> RecordDict:
            instruction = read_instruction(message.content)
            report = ClientReport(instruction.clients[0], examples=3, steps=1, metrics={"loss": 1.0})
            return answer(instruction, [Update(report, tensors)])

        class Lazy(LoopGrid):
            """Makes each reply when it is pulled, as a real transport does, and keeps no message."""

            def push_messages(self, messages: Any) -> list[str]:
                self.waiting = {}
                for number, message in enumerate(messages):
                    name = f"message-{number}"
                    message.metadata.__dict__["_message_id"] = name
                    message.content["tensors"] = encode({})
                    self.waiting[name] = message
                return list(self.waiting)

            def pull_messages(self, message_ids: Any) -> list[Message]:
                name = next(iter(sorted(message_ids)))
                message = self.waiting.pop(name)
                return [self._reply(message, node(message))]

        arrays = server.arrays
        tracemalloc.start()
        server.start(Lazy(dict.fromkeys(range(1, clients + 1), node)), arrays, num_rounds=1, timeout=60.0)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    peak(4)
    few, many = peak(4), peak(64)
    payload = 4000 * 8 * 4
    assert many - few < 4 * payload, f"{few} to {many} bytes; a reply holds {payload}"


def test_bytes_are_theory_and_messages_of_one_client_agree() -> None:
    """Payload is elements times size; in a pack of one Flower carries that plus an envelope."""
    server = server_of(FedAvg, dtype="float32")
    grid = LoopGrid({k: node_of(server) for k in range(1, 5)})
    one_round(server, grid)
    traffic = replies_of(server).traffic
    elements = sum(int(np.prod(spec.shape)) for spec in SPECS.values())
    assert traffic.bytes_up == traffic.bytes_down == 4 * 4 * elements
    for carried, payload in (
        (traffic.message_bytes_up, traffic.bytes_up),
        (traffic.message_bytes_down, traffic.bytes_down),
    ):
        assert payload < carried <= payload * 1.02 + 4 * 1024
    assert traffic.message_bytes_down == sum(message_bytes(message.content) for message in grid.sent)


def test_clients_are_assigned_to_nodes_in_runs() -> None:
    assert assigned([0, 1, 2, 3, 4], [30, 10, 20]) == {10: (0, 1), 20: (2,), 30: (3, 4)}
    assert assigned([4, 9], [1, 2, 3]) == {1: (4,), 2: (9,)}
    with pytest.raises(FederationError, match="no SuperNode"):
        assigned([0], [])


def test_initial_arrays_must_be_whole() -> None:
    server = server_of(FedAvg)
    with pytest.raises(ValueError, match=r"the initial arrays lack a\.lora_A and 5 more"):
        server.start(LoopGrid({1: node_of(server)}), ArrayRecord(), num_rounds=1)


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
        getattr(reduction.tensors, part)["a.lora_B"][0, 0] = 1e10 + 1e-5 if part == "coarse" else 1e30
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
