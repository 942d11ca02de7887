"""Bugs that published code has in what clients send and servers average; numbers as in ``test_known_bugs.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.exchange import ClientReport, Update
from fedlora.reduce import REDUCTIONS, Reduction
from fedlora.roles import Role, Roles
from fedlora.strategy import Strategy
from fedlora.wire import Reply, read_instruction
from strategies import STRATEGIES, FedAvg, FFALora
from tests.support.federation import run, server_of
from tests.support.loop import LoopGrid, Node, answer, examples_of, node_of, update_of
from tests.support.matrix import setting
from tests.support.plans import plan


def of_client(client: int, tensors: Any) -> Update:
    return Update(ClientReport(client, examples=examples_of(client), steps=3, metrics={"loss": 1.0}), tensors)


def test_2_a_frozen_factor_that_trains_all_the_same() -> None:
    """A is frozen before it exists, so a client trains and sends it (FedEx-LoRA): refused, by name."""
    strategy = FFALora(setting("lora"))
    server = server_of(strategy, "lora")
    specs = {**strategy.expected(1), "m.0.q.lora_A": strategy.setting.specs["m.0.q.lora_A"]}

    def thawed(message: Message) -> RecordDict:
        instruction = read_instruction(message.content)
        return answer(instruction, [of_client(k, update_of(k, 1, specs)) for k in instruction.clients])

    nodes: dict[int, Node] = dict.fromkeys(range(1, 5), node_of(server)) | {5: thawed}
    run(server, LoopGrid(nodes), 1)
    assert server.replies is not None
    assert server.replies.refused == {4: "m.0.q.lora_A is not expected"}


def counted(change: Callable[[Reduction, Sequence[Update]], None]) -> dict[int, str]:
    """Have one of two nodes fold its clients wrongly; return who is refused."""
    strategy = FedAvg(setting("lora"))
    server = server_of(strategy, "lora", weights="examples", failure_threshold=0.9)

    def wrong(message: Message) -> RecordDict:
        instruction = read_instruction(message.content)
        updates = [of_client(k, update_of(k, 1, strategy.expected(1))) for k in instruction.clients]
        reduction = REDUCTIONS[instruction.reduction]()
        change(reduction, updates)
        return Reply([update.report for update in updates], reduction).to_content()

    run(server, LoopGrid({1: node_of(server), 2: wrong}), 1)
    assert server.replies is not None
    return dict(server.replies.refused)


def test_4_a_client_that_is_left_out_of_the_sum() -> None:
    """A misspelt variable: only the first client counts (FLoRA)."""

    def first_each_time(reduction: Reduction, updates: Sequence[Update]) -> None:
        for _ in updates:
            reduction.add(updates[0], updates[0].report.examples)

    def first_only(reduction: Reduction, updates: Sequence[Update]) -> None:
        reduction.add(updates[0], updates[0].report.examples)

    for change, reason in (
        (first_only, "it holds one update for several clients"),
        (first_each_time, "the weight of its sum is not that of its clients"),
    ):
        assert counted(change) == dict.fromkeys((2, 3, 4), reason)
    one, two = (
        run(server, LoopGrid({1: node_of(server)}), 1)
        for server in (server_of(FedAvg(setting("lora")), "lora", clients=clients) for clients in (5, 4))
    )
    assert all(np.abs(one[name] - two[name]).max() > 1e-3 for name in one), "the last client counts"


def test_5_weights_that_are_not_those_agreed() -> None:
    """Equal weights where examples were agreed (FedEx-LoRA), or a weight on A only (FLoRA)."""

    def equal(reduction: Reduction, updates: Sequence[Update]) -> None:
        for update in updates:
            reduction.add(update, 1)

    refused = counted(equal)
    assert set(refused) == {2, 3, 4}
    assert all("the weight of its sum is not that of its clients" in reason for reason in refused.values())


def test_12_a_head_that_nobody_averaged(tmp_path: Path) -> None:
    """A head that clients keep is not reported as a global result: FedSA's numbers are not FFA's.

    Planted: clients keep their heads and the strategy denies it; what it declares is held against its roles.
    """
    strategy = plan(tmp_path, **{"method.head": "personal"}).strategy
    assert strategy.has_personal
    assert not strategy.personal, "the adapter itself is global"
    denied = FFALora(replace(strategy.setting, head=Role.SHARED))
    assert "classifier.weight" in denied.expected(1), "what is reported as global is sent"
    assert "classifier.weight" not in strategy.expected(1)
    measures = {head: plan(tmp_path, **{"method.head": head}).measure for head in ("shared", "personal", "frozen")}
    assert measures == {"shared": "test_accuracy", "personal": "personal_accuracy", "frozen": "test_accuracy"}


def test_13_roles_that_fix_the_zero_factor() -> None:
    """S2-LoRA with s frozen at zero would train B and A for nothing: refused before the first round."""

    class Frozen(Strategy):
        name, methods, exact = "frozen-s", ("s2-lora",), True

        def roles(self, kinds: Any, server_round: int) -> Roles:
            return {kind: Role.FROZEN if kind == "s" else Role.SHARED for kind in kinds}

    with pytest.raises(ValueError, match=r"trains A of s2.10x6 in round 1 while s, .* is fixed at zero"):
        Frozen(setting("s2-lora"))
    for name in STRATEGIES:
        for method in STRATEGIES[name].methods:
            assert STRATEGIES[name](setting(method)).trained_kinds
