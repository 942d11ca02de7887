"""Strategies: roles on the wire, sampling, assignment, memory and bytes."""

from __future__ import annotations

import doctest
import tracemalloc
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

import fedlora.strategy
from fedlora.exchange import ClientReport, Update
from fedlora.methods import Lora, payload_bytes
from fedlora.methods.base import Layer
from fedlora.roles import Role
from fedlora.server import Federation, FederationError, assigned
from fedlora.strategy import Setting
from fedlora.wire import (
    encode,
    message_bytes,
    read_instruction,
)
from strategies import FedAvg, FedSVD, FFALora
from tests.support.loop import LoopGrid, answer, node_of, update_of
from tests.support.small import SPECS, one_round, replies_of, server_of


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

            waiting: ClassVar[dict[str, Message]] = {}

            def push_messages(self, messages: Any) -> list[str]:
                names = []
                for message in messages:
                    name = f"message-{message.metadata.dst_node_id}"
                    names.append(name)
                    message.metadata.__dict__["_message_id"] = name
                    message.content["tensors"] = encode({})
                    self.waiting[name] = message
                return names

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
