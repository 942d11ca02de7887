"""The run folder's records of a round: a line of numbers, a line for each client, and a checkpoint to go on from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np

from fedlora.exchange import ClientReport, Tensors
from fedlora.metrics import TRAFFIC
from fedlora.runs.folder import RunFolder
from fedlora.server.observers.base import Observer, RoundEnd
from fedlora.strategy import Strategy


@final
class MetricsFile(Observer):
    """Writes ``metrics.jsonl`` and ``clients.jsonl``.

    Args:
        folder: The run folder.
        strategy: The strategy.
        names: The task's metrics.
        lines: The lines of the rounds before, of a run that is continued.
    """

    def __init__(
        self, folder: RunFolder, strategy: Strategy, names: tuple[str, ...], lines: list[dict[str, Any]]
    ) -> None:
        self.folder, self.strategy, self.names = folder, strategy, names
        self.lines = lines
        self._started = time.monotonic()

    def on_round(self, end: RoundEnd) -> None:
        """Append the round's lines."""
        now, train = time.monotonic(), end.train
        traffic = vars(end.replies.traffic)  # with what evaluations after the round took
        measured = {f"{where}_{name}": None for where in ("test", "dev") for name in self.names} | dict(end.measured)
        personal = {f"personal_{name}": None for name in self.names} | {"personal_clients": None} | dict(end.personal)
        end.line = {
            "round": end.round,
            **measured,
            **personal,
            "head": str(self.strategy.all_roles(end.round).get("head", "none")),
            "train_loss": train.get("train_loss"),
            **end.spent,
            **{name: train[name] for name in ("clients_ok", "clients_refused")},
            **{name: traffic[name] for name in TRAFFIC},
            "sparsity": sparsity(self.strategy, end.state.tensors),
            **{name: traffic[name] for name in ("message_bytes_up", "message_bytes_down")},
            "seconds": now - self._started,
            **{name: train[name] for name in ("late_replies",) if name in train},
        }
        self._started = now
        self.lines.append(end.line)
        self.folder.append("metrics.jsonl", end.line)
        reports, refused, strategy = end.replies.reports, end.replies.refused, end.replies.strategy
        self.folder.append(
            "clients.jsonl",
            *(
                client_line(
                    end.round,
                    reports[client],
                    refused.get(client),
                    strategy.rank(end.round, client),
                    strategy.expert(client),
                )
                for client in sorted(reports)
            ),
        )


def client_line(
    server_round: int, report: ClientReport, refused: str | None, rank: int | None = None, expert: int | None = None
) -> dict[str, Any]:
    """Return a client's line of ``clients.jsonl``, with the rank and the expert that it trained, where it has such."""
    loss = {"loss": None} if refused and not report.metrics else {}
    numbers = {"examples": report.examples, "steps": report.steps, **loss, **report.metrics}
    held = {name: value for name, value in (("rank", rank), ("expert", expert)) if value is not None}
    return {"round": server_round, "client": report.client, **held, **numbers, "refused": refused}


def sparsity(strategy: Strategy, tensors: Tensors) -> float | None:
    """Return the share of zeros among the server's tensors that have an L1 weight; None where there is none."""
    sparse = [tensors[name] for name, spec in strategy.setting.specs.items() if spec.l1 and name in tensors]
    return float(np.mean(np.concatenate([value.ravel() for value in sparse]) == 0)) if sparse else None


@final
class Checkpoints(Observer):
    """Writes the server's whole state after each round.

    Args:
        folder: The run folder.
        facts: What else a run that goes on must know or have in common, asked after each round.
    """

    def __init__(self, folder: RunFolder, facts: Callable[[], Mapping[str, Any]]) -> None:
        self.folder, self.facts = folder, facts

    def on_round(self, end: RoundEnd) -> None:
        """Write the checkpoint."""
        state = {"clients": end.state.clients.record(), **self.facts()}
        self.folder.checkpoint(end.round, end.state.arrays(), state)
