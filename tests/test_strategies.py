"""Strategies: exactness, sampling, the streaming fold, and what is refused."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy

from fedlora.methods import Head, Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.roles import Role
from fedlora.seeded import Seeded
from fedlora.wire import Instruction, Reply, encode, from_named_arrays, message_bytes, named_arrays, payload_bytes
from strategies import FedAvg, FederationError, FedSVD, FFALora, RoleStrategy, Setting
from strategies.base import deal
from tests.support.loop import Arrays, LoopGrid, Node, examples_of, node_of, update_of

LAYERS = [Layer("a", 6, 10, bias=True, fan_in_fan_out=False), Layer("b", 8, 4, bias=False, fan_in_fan_out=True)]
SPECS = Head(Lora(LAYERS, rank=2, alpha=4.0, rslora=False), [Layer("head", 4, 3, True, False)]).specs()


def setting(clients: int = 4, **changes: Any) -> Setting:
    return replace(Setting(specs=SPECS, num_clients=clients, dtype="float64"), **changes)


def start_arrays(strategy: RoleStrategy) -> ArrayRecord:
    initial = initial_tensors(SPECS, Seeded(0), strategy.setting.dtype)
    return named_arrays({name: initial[name] for name in strategy.exchanged(1)})


def one_round(strategy: RoleStrategy, grid: LoopGrid) -> Arrays:
    result = strategy.start(grid, start_arrays(strategy), num_rounds=1, timeout=1.0)
    assert result.arrays is not None
    return from_named_arrays(result.arrays)


def test_fedsvd_needs_room_for_orthonormal_rows() -> None:
    narrow = Lora([Layer("n", 16, 4, True, False)], rank=8, alpha=8.0, rslora=False).specs()
    with pytest.raises(ValueError, match=r"the rank 8 of n.lora_A is above the layer's 4 features.* lower method.rank"):
        FedSVD(setting(specs=narrow))


def test_frozen_tensors_never_cross_the_wire() -> None:
    """FFA-LoRA sends and accepts no A, and half the bytes of FedAvg for square layers."""
    strategy = FFALora(setting())
    grid = LoopGrid({1: node_of(strategy)})
    one_round(strategy, grid)
    sent = Instruction.from_content(grid.sent[0].content).tensors
    assert sorted(sent) == ["a.lora_B", "b.lora_B", "head.bias", "head.weight"]
    square = Lora([Layer("s", 16, 16, True, False)], rank=4, alpha=8.0, rslora=False).specs()
    sizes = [payload_bytes(cls(setting(specs=square)).exchanged(1), "float32") for cls in (FFALora, FedAvg)]
    assert sizes == [4 * 16 * 4, 2 * 4 * 16 * 4]


@pytest.mark.parametrize("head", list(Role)[:3])
def test_head_policies(head: Role) -> None:
    strategy = FFALora(setting(head=head))
    sent = strategy.exchanged(1)
    assert ("head.weight" in sent) == (head is Role.SHARED)
    assert strategy.all_roles(1)["head"] is head


def test_sampling_depends_on_seed_and_round_alone() -> None:
    strategy = FedAvg(setting(20, clients_per_round=5, seed=3))
    again = FedAvg(setting(20, clients_per_round=5, seed=3))
    rounds = [strategy.sample(n) for n in (1, 2, 3)]
    assert rounds == [again.sample(n) for n in (1, 2, 3)]
    assert len({tuple(clients) for clients in rounds}) == 3
    assert rounds[0] != FedAvg(setting(20, clients_per_round=5, seed=4)).sample(1)
    assert all(len(set(clients)) == 5 and clients == sorted(clients) for clients in rounds)
    assert len({client for n in range(1, 60) for client in strategy.sample(n)}) == 20


def test_runs_under_flowers_own_loop() -> None:
    """A plain Strategy: Flower's own ``start`` gives what ours gives."""
    ours, theirs = FedAvg(setting()), FedAvg(setting())
    expected = one_round(ours, LoopGrid({1: node_of(ours), 2: node_of(ours)}))
    result = Strategy.start(
        theirs, LoopGrid({1: node_of(theirs), 2: node_of(theirs)}), start_arrays(theirs), num_rounds=1
    )
    assert result.arrays is not None
    arrays = from_named_arrays(result.arrays)
    assert all(np.array_equal(arrays[name], expected[name]) for name in expected)
    assert result.train_metrics_clientapp[1]["clients_ok"] == 4


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
    strategy = FFALora(setting())
    grid = LoopGrid({k: node_of(strategy, spoiled(kind)) for k in range(1, 5)})
    server = one_round(strategy, grid)
    assert strategy.tally is not None
    assert list(strategy.tally.refused) == [2]
    assert "client 2 is left out" in caplog.text
    assert re.search(REFUSALS[kind], strategy.tally.refused[2])
    shared = strategy.exchanged(1, Role.SHARED)
    good = [k for k in range(4) if k != 2]
    weights = np.array([examples_of(k) for k in good], dtype=float)
    mean = sum(w * update_of(k, 1, shared)["a.lora_B"] for w, k in zip(weights / weights.sum(), good, strict=True))
    assert np.abs(server["a.lora_B"] - mean).max() < 1e-14


def failing(_message: Message) -> Exception:
    return RuntimeError("out of memory")


def silent(_message: Message) -> None:
    return None


def liar(strategy: RoleStrategy, field: str) -> Node:
    """A node whose reply is well formed, but not an answer to its question."""
    node = node_of(strategy)

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
                del content["update"]
            case "cut":
                data = content["update"]["data"]  # type: ignore[index]
                content["update"]["data"] = type(data)("uint8", (3,), data.stype, data.data[:3])  # type: ignore[index]
        return content

    return answer


@pytest.mark.parametrize("field", ["clients", "examples", "lists", "loss", "no-reply", "no-update", "cut"])
def test_a_reply_that_is_no_answer_is_refused(field: str) -> None:
    strategy = FFALora(setting())
    nodes = {k: node_of(strategy) for k in range(1, 5)}
    one_round(strategy, LoopGrid({**nodes, 3: liar(strategy, field)}))
    assert strategy.tally is not None
    assert list(strategy.tally.refused) == [2]
    assert strategy.tally.total.count == 3


@pytest.mark.parametrize(
    ("node", "reason"), [(failing, "its node failed: out of memory"), (silent, "no reply arrived in time")]
)
def test_a_node_that_fails_or_never_answers(node: Node, reason: str) -> None:
    strategy = FFALora(setting())
    one_round(strategy, LoopGrid({**{k: node_of(strategy) for k in range(1, 5)}, 4: node}))
    assert strategy.tally is not None
    assert strategy.tally.refused == {3: reason}


def test_past_the_threshold_the_run_stops() -> None:
    strategy = FFALora(setting(failure_threshold=0.25))
    nodes: dict[int, Node] = {1: node_of(strategy), 2: node_of(strategy), 3: failing, 4: failing}
    with pytest.raises(FederationError, match=r"2 of 4 clients failed.*client 2: its node failed: out of memory"):
        one_round(strategy, LoopGrid(nodes))
    strategy = FFALora(setting(failure_threshold=0.9))
    with pytest.raises(FederationError, match="4 of 4 clients failed"):
        one_round(strategy, LoopGrid(dict.fromkeys(range(1, 5), failing)))


def test_server_memory_does_not_grow_with_clients() -> None:
    """Replies are folded as they arrive: sixteen times the clients, the same peak."""
    wide = Lora([Layer("w", 4000, 4000, True, False)], rank=8, alpha=8.0, rslora=False).specs()

    def peak(clients: int) -> int:
        strategy = FFALora(setting(clients, specs=wide, dtype="float32"))
        update = update_of(0, 1, strategy.exchanged(1, Role.SHARED), "float32")

        def node(message: Message) -> RecordDict:
            reply = Reply(update=update)
            reply.add(Instruction.from_content(message.content).clients[0], examples=3, steps=1, metrics={"loss": 1.0})
            return reply.to_content()

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

        initial = initial_tensors(wide, Seeded(0), "float32")
        arrays = named_arrays({name: initial[name] for name in strategy.exchanged(1)})
        tracemalloc.start()
        strategy.start(Lazy(dict.fromkeys(range(1, clients + 1), node)), arrays, num_rounds=1, timeout=60.0)
        _, high = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return high

    peak(4)
    few, many = peak(4), peak(64)
    payload = 4000 * 8 * 4
    assert many - few < 4 * payload, f"{few} to {many} bytes; a reply holds {payload}"


def test_bytes_are_theory_and_messages_of_one_client_agree() -> None:
    """Payload is elements times size; in a pack of one Flower carries that plus an envelope."""
    strategy = FedAvg(setting(4, dtype="float32"))
    grid = LoopGrid({k: node_of(strategy) for k in range(1, 5)})
    one_round(strategy, grid)
    tally = strategy.tally
    assert tally is not None
    elements = sum(int(np.prod(spec.shape)) for spec in SPECS.values())
    assert tally.bytes_up == tally.bytes_down == 4 * 4 * elements
    for carried, payload in ((tally.message_bytes_up, tally.bytes_up), (tally.message_bytes_down, tally.bytes_down)):
        assert payload < carried <= payload * 1.02 + 4 * 1024
    assert tally.message_bytes_down == sum(message_bytes(message.content) for message in grid.sent)


def test_dealing() -> None:
    assert deal([0, 1, 2, 3, 4], [30, 10, 20]) == {10: (0, 1), 20: (2,), 30: (3, 4)}
    assert deal([4, 9], [1, 2, 3]) == {1: (4,), 2: (9,)}
    with pytest.raises(FederationError, match="no SuperNode"):
        deal([0], [])


def test_initial_arrays_must_be_whole() -> None:
    strategy = FedAvg(setting())
    with pytest.raises(ValueError, match=r"the initial arrays lack a\.lora_A and 5 more"):
        strategy.start(LoopGrid({1: node_of(strategy)}), ArrayRecord(), num_rounds=1)


@pytest.mark.parametrize("part", ["fine", "coarse"])
def test_a_sum_that_cannot_be_one_is_refused(part: str) -> None:
    """A node for two clients sends parts that are off their grids: finite, of the right shape, and wrong."""
    strategy = FFALora(setting(4))
    node = node_of(strategy)

    def forged(message: Message) -> RecordDict:
        reply = Reply.from_content(node(message))  # type: ignore[arg-type]
        assert reply.total is not None
        getattr(reply.total, part)["a.lora_B"][0, 0] = 1e10 + 1e-5 if part == "coarse" else 1e30
        return reply.to_content()

    one_round(strategy, LoopGrid({1: node_of(strategy), 2: forged}))
    assert strategy.tally is not None
    assert set(strategy.tally.refused) == {2, 3}
    assert all("cannot come from that many updates" in reason for reason in strategy.tally.refused.values())


def personal(strategy: RoleStrategy, answer: Node | None = None) -> Node:
    """A node that trains, and evaluates its clients on 10 rows each."""

    def node(message: Message) -> Any:
        if message.metadata.message_type == "train":
            return node_of(strategy)(message)
        if answer is not None:
            return answer(message)
        reply = Reply()
        for client in Instruction.from_content(message.content).clients:
            reply.add(client, examples=10, metrics={"accuracy": float(client), "loss": 5.0})
        return reply.to_content()

    return node


def test_personal_evaluation_asks_who_has_trained_and_counts_who_fails() -> None:
    """Two of four clients are sampled a round; one node fails to evaluate."""
    strategy = FFALora(setting(4, head=Role.PERSONAL, clients_per_round=2))
    result = strategy.start(LoopGrid({1: personal(strategy)}), start_arrays(strategy), num_rounds=1, timeout=1.0)
    metrics = result.evaluate_metrics_clientapp[1]
    sampled = strategy.sample(1)
    assert metrics["personal_clients"] == 2
    assert metrics["personal_accuracy"] == pytest.approx(sum(sampled) / 20)
    assert metrics["personal_loss"] == pytest.approx(0.5)
    strategy = FFALora(setting(4, head=Role.PERSONAL))
    nodes = {k: personal(strategy, failing if k == 4 else None) for k in range(1, 5)}
    result = strategy.start(LoopGrid(nodes), start_arrays(strategy), num_rounds=1, timeout=1.0)
    assert result.evaluate_metrics_clientapp[1]["personal_clients"] == 3


def test_a_run_whose_evaluations_all_fail_stops() -> None:
    strategy = FFALora(setting(4, head=Role.PERSONAL))
    nodes = {k: personal(strategy, silent if k == 1 else failing) for k in range(1, 5)}
    with pytest.raises(FederationError, match=r"4 of 4 clients failed.*evaluation: no reply arrived in time"):
        strategy.start(LoopGrid(nodes), start_arrays(strategy), num_rounds=1, timeout=1.0)
