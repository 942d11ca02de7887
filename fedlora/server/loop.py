"""The loop over rounds: train, aggregate, evaluate, observe; from the start or from a saved round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedlora.server.errors import BudgetSpentError

Observe = Callable[[int, Result], None]
_POLL_S = 0.1
_logger = logging.getLogger(__name__)


def run_rounds(
    strategy: Strategy,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    timeout: float,
    *,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    on_round: Observe | None = None,
    done: int = 0,
) -> Result:
    """Run the rounds after ``done`` with the four hooks of a Flower strategy, and return Flower's result object."""
    result, config = Result(), ConfigRecord()
    result.arrays = initial_arrays

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        questions = list(strategy.configure_evaluate(server_round, arrays, config, grid))
        if questions:
            personal = strategy.aggregate_evaluate(server_round, arriving(grid, questions, timeout))
            if personal is not None:
                result.evaluate_metrics_clientapp[server_round] = personal

    if 0 < num_rounds <= done:
        evaluate(done, initial_arrays)  # what clients reported after the last round is not in a checkpoint
    for server_round in range(done + 1 if done else 0, num_rounds + 1):
        if server_round:
            try:
                instructions = strategy.configure_train(server_round, result.arrays, config, grid)
                arrays, metrics = strategy.aggregate_train(server_round, arriving(grid, instructions, timeout))
            except BudgetSpentError as error:
                if server_round == 1:
                    raise  # nothing was trained
                _logger.warning("%s", error)
                break
            assert arrays is not None, "a round without a result raises"
            assert metrics is not None, "a round without a result raises"
            result.arrays = arrays
            result.train_metrics_clientapp[server_round] = metrics
            evaluate(server_round, arrays)
        if evaluate_fn is not None:
            evaluated = evaluate_fn(server_round, result.arrays)
            if evaluated is not None:
                result.evaluate_metrics_serverapp[server_round] = evaluated
        if on_round is not None:
            on_round(server_round, result)
    return result


def arriving(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Send messages and yield each reply as it arrives, until all are there or ``timeout`` seconds passed."""
    waiting = set(grid.push_messages(messages))
    end = time.monotonic() + timeout
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if waiting:
            time.sleep(_POLL_S)
