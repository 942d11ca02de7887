"""Servers of clients under DP: what may be reported to them, what they remember, and when they stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.reduce import WeightedMean, fold
from fedlora.roles import Role
from fedlora.server import BudgetSpentError, Federation, FederationError, FlowerStrategy
from fedlora.wire import Reply, from_named_arrays, read_instruction
from strategies import FedAvg, FedSALora
from tests.support.loop import LoopGrid, Node, update_of
from tests.support.small import server_of

Spoil = Callable[[Reply], Reply]


def node_under_dp(server: FlowerStrategy, budget: dict[int, int], spoil: Spoil | None = None) -> Node:
    """A node that answers as clients.app does under DP; each client has budget for so many rounds."""

    def update(instruction: Instruction, client: int) -> Update:
        if budget.get(client, 99) < 1:
            return Update(ClientReport.failed(client, "one more round would be too many", Outcome.BUDGET_SPENT))
        budget[client] = budget.get(client, 99) - 1
        tensors = update_of(client, instruction.round, server.strategy.expected(instruction.round, client))
        return Update(ClientReport(client, steps=3, ledger_head=f"head-{client}-{instruction.round}"), tensors)

    def node(message: Message) -> RecordDict:
        instruction = read_instruction(message.content)
        assert message.metadata.message_type == "train", "nobody is asked to evaluate"
        assert len(instruction.ledger_heads) == len(instruction.clients)
        reply = Reply(*fold(instruction, [update(instruction, client) for client in instruction.clients]))
        return (reply if spoil is None else spoil(reply)).to_content()

    return node


def under_dp(kind: Any = FedAvg, **changes: Any) -> FlowerStrategy:
    return server_of(kind, dp=True, weights="equal", **changes)


def run(server: FlowerStrategy, rounds: int, budget: dict[int, int] | None = None, spoil: Spoil | None = None) -> Any:
    grid = LoopGrid({1: node_under_dp(server, budget or {}, spoil)})
    return server.start(grid, server.arrays, num_rounds=rounds, timeout=1.0), grid


def changed(reply: Reply, client: int, **changes: Any) -> Reply:
    """Return a reply with another report of one client."""
    return replace(reply, reports=[replace(r, **changes) if r.client == client else r for r in reply.reports])


def heavier(reply: Reply) -> Reply:
    """Return a reply whose sum counts once more than its clients."""
    assert isinstance(reply.reduction, WeightedMean)
    reply.reduction.tensors.weight += 1
    return reply


def test_the_server_sends_back_the_last_hash_that_was_reported() -> None:
    server = under_dp(clients_per_round=2)
    _, grid = run(server, 4)
    seen: dict[int, str] = {}
    for message in grid.sent:
        instruction = read_instruction(message.content)
        assert instruction.ledger_heads == tuple(seen.get(client, "") for client in instruction.clients)
        seen |= {client: f"head-{client}-{instruction.round}" for client in instruction.clients}
    assert server.state.clients.ledger_heads == seen


def test_an_update_that_cannot_be_used_has_left_all_the_same() -> None:
    """What it cost stands in the clients' ledgers, and an older copy of one must not be taken for the newest."""
    server = under_dp()

    with pytest.raises(FederationError, match="the weight of its sum is not that of its clients"):
        run(server, 1, spoil=heavier)
    assert server.state.clients.ledger_heads == {client: f"head-{client}-1" for client in range(4)}


def test_weights_by_examples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy.weights = 'examples': clients under DP report no number of rows"):
        Federation(4, dp=True)


def test_no_loss_and_equal_weights() -> None:
    server = under_dp()
    result, _ = run(server, 1)
    assert "train_loss" not in result.train_metrics_clientapp[1]
    shared = server.strategy.expected(1)
    updates = [update_of(client, 1, shared) for client in range(4)]
    for name, value in from_named_arrays(result.arrays).items():
        assert np.allclose(value, np.mean([update[name] for update in updates], 0), atol=1e-13)


@pytest.mark.parametrize("server", [under_dp(FedSALora), under_dp(head=Role.PERSONAL)], ids=["fedsa-lora", "head"])
def test_nobody_is_asked_to_evaluate_its_own_rows(server: FlowerStrategy) -> None:
    result, grid = run(server, 2)
    assert {message.metadata.message_type for message in grid.sent} == {"train"}
    assert result.evaluate_metrics_clientapp == {}


def cut_short(content: RecordDict) -> None:
    """Cut a reply's tensors."""
    record = content["reduced.coarse"]
    data = record["0"]  # type: ignore[index]
    record["0"] = type(data)("uint8", (3,), data.stype, data.data[:3])  # type: ignore[index]


def test_tensors_that_cannot_be_read_have_left_all_the_same() -> None:
    server = under_dp()
    node = node_under_dp(server, {})

    def cut(message: Message) -> RecordDict:
        content = node(message)
        assert isinstance(content, RecordDict)
        cut_short(content)
        return content

    with pytest.raises(FederationError, match="the data end before"):
        server.start(LoopGrid({1: cut}), server.arrays, num_rounds=1, timeout=1.0)
    assert server.state.clients.ledger_heads == {client: f"head-{client}-1" for client in range(4)}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda reply: changed(reply, 0, examples=17),
            "it reports numbers of its rows, which a client under DP must not",
        ),
        (
            lambda reply: changed(reply, 1, metrics={"loss": 0.5}),
            "it reports numbers of its rows, which a client under DP must not",
        ),
        (lambda reply: changed(reply, 2, ledger_head=""), "it holds an update that no ledger entry pays for"),
    ],
    ids=["rows", "loss", "no entry"],
)
def test_a_reply_that_reports_too_much_or_is_not_paid_for_is_refused(spoil: Spoil, reason: str) -> None:
    """And no number of rows is kept, not even for the record of why."""
    server = under_dp()
    with pytest.raises(FederationError, match=reason):
        run(server, 1, spoil=spoil)
    assert server.replies is not None
    assert all(not report.examples and not report.metrics for report in server.replies.reports.values())


def test_a_client_that_fails_may_not_report_its_rows_either() -> None:
    server = under_dp(failure_threshold=1.0)

    def fail(reply: Reply) -> Reply:
        assert isinstance(reply.reduction, WeightedMean)
        return changed(replace(reply, reduction=None), 0, outcome=Outcome.FAILED, reason="RuntimeError", examples=17)

    with pytest.raises(FederationError, match="numbers of its rows"):
        run(server, 1, spoil=fail)
    assert server.replies is not None
    assert all(not report.examples for report in server.replies.reports.values())


def test_a_spent_budget_is_remembered_whatever_is_wrong_with_the_rest_of_the_reply() -> None:
    server = under_dp()
    with pytest.raises(FederationError):
        run(server, 1, {3: 0}, spoil=heavier)
    assert server.state.clients.spent == {3}


def test_the_rounds_go_on_without_clients_whose_budget_is_spent() -> None:
    server = under_dp()
    result, grid = run(server, 4, {0: 1, 2: 2})
    asked = [read_instruction(message.content).clients for message in grid.sent]
    assert asked == [(0, 1, 2, 3), (0, 1, 2, 3), (1, 2, 3), (1, 3)]
    assert server.state.clients.spent == {0, 2}
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert [result.train_metrics_clientapp[n]["clients_ok"] for n in (1, 2, 3, 4)] == [4, 3, 2, 2]


def test_the_rounds_end_when_too_few_have_budget_left() -> None:
    """With what was reached until then, not with an error."""
    server = under_dp()
    result, _ = run(server, 9, {0: 3, 1: 3, 2: 3, 3: 9})
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    other, _ = run(under_dp(), 3)
    assert all(
        np.array_equal(one, from_named_arrays(other.arrays)[name])
        for name, one in from_named_arrays(result.arrays).items()
    )


def test_no_budget_from_the_start_is_an_error() -> None:
    with pytest.raises(BudgetSpentError, match=r"round 1: 4 of 4 clients have spent their privacy budgets"):
        run(under_dp(), 3, dict.fromkeys(range(4), 0))


def test_spent_budgets_are_no_failures() -> None:
    """Two of four have none left, and one of the other two fails: the round goes on with the last."""

    server = under_dp()

    def fail(reply: Reply) -> Reply:
        if len(reply.reports) == 4:
            return reply
        first, second = reply.reports
        reduction = WeightedMean()
        tensors = update_of(second.client, 3, server.strategy.expected(3))
        reduction.add(Update(second, tensors), 1)
        return changed(Reply(reply.reports, reduction), first.client, outcome=Outcome.FAILED, reason="RuntimeError")

    result, _ = run(server, 3, {0: 1, 1: 1}, spoil=fail)
    assert result.train_metrics_clientapp[3]["clients_ok"] == 1


def test_other_failures_still_stop_the_run() -> None:
    def fail(reply: Reply) -> Reply:
        return Reply([ClientReport.failed(report.client, "RuntimeError") for report in reply.reports])

    with pytest.raises(FederationError, match="4 of 4 clients failed"):
        run(under_dp(), 3, spoil=fail)
