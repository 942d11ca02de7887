"""Servers of clients under DP: what they may be told, what they remember, and when they stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.exact_sum import ExactSum
from fedlora.roles import Role
from fedlora.wire import BUDGET_SPENT, Instruction, Reply, from_named_arrays
from strategies import BudgetSpentError, FedAvg, FederationError, FedSALora, RoleStrategy
from tests.support.loop import LoopGrid, Node, update_of
from tests.test_strategies import setting, start_arrays

Spoil = Callable[[Reply], None]


def private_node(strategy: RoleStrategy, budget: dict[int, int], spoil: Spoil | None = None) -> Node:
    """A node that answers as clients.app does under DP; each client has budget for so many rounds."""

    def node(message: Message) -> RecordDict:
        instruction = Instruction.from_content(message.content)
        assert message.metadata.message_type == "train", "nobody is asked to evaluate"
        assert len(instruction.ledger_heads) == len(instruction.clients)
        reply = Reply(total=ExactSum())
        for client in instruction.clients:
            if budget.get(client, 99) < 1:
                reply.add(client, error=f"{BUDGET_SPENT}: one more round would be too many")
                continue
            budget[client] = budget.get(client, 99) - 1
            shared = strategy.exchanged(instruction.round, Role.SHARED)
            update = update_of(client, instruction.round, shared, strategy.setting.dtype)
            reply.add(client, steps=3, ledger_head=f"head-{client}-{instruction.round}")
            if len(instruction.clients) == 1:
                reply.update = update
            else:
                assert reply.total is not None
                reply.total.add(update, 1)
        if spoil is not None:
            spoil(reply)
        return reply.to_content()

    return node


def private(kind: type[RoleStrategy] = FedAvg, **changes: Any) -> RoleStrategy:
    return kind(setting(dp=True, weights="equal", **changes))


def run(strategy: RoleStrategy, rounds: int, budget: dict[int, int] | None = None, spoil: Spoil | None = None) -> Any:
    grid = LoopGrid({1: private_node(strategy, budget or {}, spoil)})
    return strategy.start(grid, start_arrays(strategy), num_rounds=rounds, timeout=1.0), grid


def test_the_server_sends_back_the_last_hash_that_it_was_told() -> None:
    strategy = private(clients_per_round=2)
    _, grid = run(strategy, 4)
    told: dict[int, str] = {}
    for message in grid.sent:
        instruction = Instruction.from_content(message.content)
        assert instruction.ledger_heads == tuple(told.get(client, "") for client in instruction.clients)
        told |= {client: f"head-{client}-{instruction.round}" for client in instruction.clients}
    assert strategy.ledger_heads == told


def test_an_update_that_cannot_be_used_has_left_all_the_same() -> None:
    """What it cost stands in the clients' ledgers, and an older copy of one must not be taken for the newest."""
    strategy = private()

    def spoil(reply: Reply) -> None:
        assert reply.total is not None
        reply.total.weight += 1

    with pytest.raises(FederationError, match="the weight of its sum is not that of its clients"):
        run(strategy, 1, spoil=spoil)
    assert strategy.ledger_heads == {client: f"head-{client}-1" for client in range(4)}


def test_no_loss_and_equal_weights() -> None:
    strategy = private()
    result, _ = run(strategy, 1)
    assert "train_loss" not in result.train_metrics_clientapp[1]
    shared = strategy.exchanged(1, Role.SHARED)
    updates = [update_of(client, 1, shared) for client in range(4)]
    for name, value in from_named_arrays(result.arrays).items():
        assert np.allclose(value, np.mean([update[name] for update in updates], 0), atol=1e-13)


@pytest.mark.parametrize("strategy", [private(FedSALora), private(head=Role.PERSONAL)], ids=["fedsa-lora", "head"])
def test_nobody_is_asked_to_evaluate_its_own_rows(strategy: RoleStrategy) -> None:
    result, grid = run(strategy, 2)
    assert {message.metadata.message_type for message in grid.sent} == {"train"}
    assert result.evaluate_metrics_clientapp == {}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda reply: reply.examples.__setitem__(0, 17), "it tells of its rows, which a client under DP must not"),
        (lambda reply: reply.metrics.update(loss=[0.5] * 4), "it tells of its rows, which a client under DP must not"),
        (lambda reply: reply.ledger_heads.__setitem__(2, ""), "it holds an update that no ledger entry pays for"),
    ],
    ids=["rows", "loss", "no entry"],
)
def test_a_reply_that_tells_too_much_or_is_not_paid_for_is_refused(spoil: Spoil, reason: str) -> None:
    strategy = private()
    with pytest.raises(FederationError, match=reason):
        run(strategy, 1, spoil=spoil)


def test_the_rounds_go_on_without_clients_whose_budget_is_spent() -> None:
    strategy = private()
    result, grid = run(strategy, 4, {0: 1, 2: 2})
    asked = [Instruction.from_content(message.content).clients for message in grid.sent]
    assert asked == [(0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3), (1, 3)]
    assert strategy.spent == {0, 2}
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert [result.train_metrics_clientapp[n]["clients_ok"] for n in (1, 2, 3, 4)] == [4, 3, 2, 2]


def test_the_rounds_end_when_too_few_have_budget_left() -> None:
    """With what was reached until then, not with an error."""
    strategy = private()
    result, _ = run(strategy, 9, {0: 3, 1: 3, 2: 3, 3: 9})
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    other, _ = run(private(), 3)
    assert all(
        np.array_equal(one, from_named_arrays(other.arrays)[name])
        for name, one in from_named_arrays(result.arrays).items()
    )


def test_no_budget_from_the_start_is_an_error() -> None:
    with pytest.raises(BudgetSpentError, match=r"round 1: 4 of 4 clients have spent their privacy budgets"):
        run(private(), 3, dict.fromkeys(range(4), 0))


def test_spent_budgets_are_no_failures() -> None:
    """Two of four have none left, and one of the other two fails: the round goes on with the last."""

    def fail(reply: Reply) -> None:
        if len(reply.clients) == 2:
            reply.errors[0], reply.ledger_heads[0] = "RuntimeError", ""
            reply.total = ExactSum()
            reply.total.add(update_of(reply.clients[1], 3, strategy.exchanged(3, Role.SHARED)), 1)

    strategy = private()
    result, _ = run(strategy, 3, {0: 1, 1: 1}, spoil=fail)
    assert result.train_metrics_clientapp[3]["clients_ok"] == 1


def test_other_failures_still_stop_the_run() -> None:
    def fail(reply: Reply) -> None:
        reply.errors = ["RuntimeError"] * len(reply.errors)
        reply.total = ExactSum()

    with pytest.raises(FederationError, match="4 of 4 clients failed"):
        run(private(), 3, spoil=fail)
