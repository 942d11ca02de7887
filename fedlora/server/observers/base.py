"""What watches a federation from the server: small objects that are called after each round, one after the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.server.replies import Replies
from fedlora.state import ServerState


@dataclass
class RoundEnd:
    """A round that has ended, and what observers have found out about it so far.

    Attributes:
        round: The round, from 1.
        state: The server's state after it.
        replies: What the clients reported.
        train: The round's numbers: ``train_loss`` (not under DP), ``clients_ok``, bytes.
        measured: Metrics of the server's tensors, by column.
        personal: Metrics of clients' own models on the rows that they hold out, by column.
        spent: Under DP the most and the least epsilon that a client has spent.
        line: The round's line of ``metrics.jsonl``, once it is written.
    """

    round: int
    state: ServerState
    replies: Replies
    train: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    personal: Mapping[str, Any] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)
    line: dict[str, Any] = field(default_factory=dict)


class Observer(ABC):
    """Watches the rounds."""

    @abstractmethod
    def on_round(self, end: RoundEnd) -> None:
        """Take note of a round; later observers see what this one has filled in."""
