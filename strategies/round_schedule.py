"""A learning-rate schedule over the rounds of a run, with a warm-up; within a round ``train.schedule`` applies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import final

from fedlora.local_terms import LocalTerms
from fedlora.strategy import Strategy
from strategies.wrapped import Wrapped


def share_of_peak(server_round: int, rounds: int, schedule: str, warmup_rounds: int) -> float:
    """Return what the peak learning rate is multiplied by in a round.

    It rises linearly to 1 in round ``warmup_rounds`` and stays (``constant``), or falls from the round after it so that
    it would be 0 in the round after the last.
    """
    if server_round <= warmup_rounds:
        return server_round / warmup_rounds
    progress = (server_round - 1 - warmup_rounds) / (rounds - warmup_rounds)
    return {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}[schedule]


@final
class RoundSchedule(Wrapped):
    """Multiplies the clients' learning rate by round.

    Args:
        inner: The strategy.
        rounds: Rounds of the run.
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup_rounds: Rounds of the linear rise.
    """

    def __init__(self, inner: Strategy, rounds: int, schedule: str, warmup_rounds: int) -> None:
        super().__init__(inner)
        self.rounds, self.schedule, self.warmup_rounds = rounds, schedule, warmup_rounds

    def local(self, server_round: int) -> LocalTerms:
        """Return the inner strategy's terms with the round's learning rate."""
        terms = self.inner.local(server_round)
        # After the last round a client is only evaluated.
        number = min(server_round, self.rounds)
        share = share_of_peak(number, self.rounds, self.schedule, self.warmup_rounds)
        return replace(terms, learning_rate=terms.learning_rate * share)
