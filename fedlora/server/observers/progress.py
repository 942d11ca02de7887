"""A line on the terminal for each round."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from rich.console import Console

from fedlora.reports.format import human_bytes, human_time
from fedlora.server.observers.base import Observer, RoundEnd


@final
class Progress(Observer):
    """Prints a round's line.

    Args:
        console: Where to.
        rounds: Rounds of the run.
        measure: The column that a round is reported by.
        beside: Returns what else is said of a round, such as its training loss.
    """

    def __init__(self, console: Console, rounds: int, measure: str, beside: Callable[[RoundEnd], str]) -> None:
        self.console, self.rounds, self.measure, self.beside = console, rounds, measure, beside

    def on_round(self, end: RoundEnd) -> None:
        """Print measure, clients, bytes and time."""
        line, value = end.line, end.line[self.measure]
        left = (self.rounds - end.round) * line["seconds"]
        self.console.print(
            f"round {end.round}/{self.rounds}  {self.measure.replace('_', ' ')} "
            f"{'-' if value is None else f'{value:.4f}'}  {self.beside(end)}  "
            f"{line['clients_ok']} ok, {line['clients_refused']} refused  up {human_bytes(line['bytes_up'])}  "
            f"down {human_bytes(line['bytes_down'])}  {line['seconds']:.1f} s"
            + (f", {human_time(left)} left" if left >= 60 else "")
        )


def train_loss(end: RoundEnd) -> str:
    """Return a round's training loss, for its line."""
    return f"train loss {end.line['train_loss']:.4f}"
