"""The loop over rounds: train, aggregate, evaluate, observe; from the start or from a saved round."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from fedlora.server.errors import BudgetSpentError
from fedlora.server.mail import Mail, never

Observe = Callable[[int, Result], None]
_logger = logging.getLogger(__name__)


def run_rounds(
    strategy: Strategy,
    mail: Mail,
    initial_arrays: ArrayRecord,
    num_rounds: int,
    *,
    enough: Callable[[], bool] = never,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    on_round: Observe | None = None,
    done: int = 0,
) -> Result:
    """Run the rounds after ``done`` with the four hooks of a Flower strategy, and return Flower's result object."""
    result, config, grid = Result(), ConfigRecord(), mail.grid
    result.arrays = initial_arrays

    def evaluate(server_round: int, arrays: ArrayRecord) -> None:
        questions = list(strategy.configure_evaluate(server_round, arrays, config, grid))
        if questions:
            personal = strategy.aggregate_evaluate(server_round, mail.exchange(questions))
            if personal is not None:
                result.evaluate_metrics_clientapp[server_round] = personal

    if 0 < num_rounds <= done:
        evaluate(done, initial_arrays)  # what clients reported after the last round is not in a checkpoint
    for server_round in range(done + 1 if done else 0, num_rounds + 1):
        if server_round:
            try:
                instructions = strategy.configure_train(server_round, result.arrays, config, grid)
                arrays, metrics = strategy.aggregate_train(server_round, mail.exchange(instructions, enough))
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
