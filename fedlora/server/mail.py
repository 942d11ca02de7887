"""Messages between server and nodes: sent, and their replies as they arrive, until a round may close."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import final

from flwr.app import Message
from flwr.serverapp import Grid

_logger = logging.getLogger(__name__)
_POLL_S = (0.01, 0.1)  # at least and at most; between them a fiftieth of what was waited so far
_DEPLOYED_POLL_S = 0.5
_PARTS = 8


def never() -> bool:
    """Return that there are not enough replies: a round waits for all of them."""
    return False


@final
@dataclass
class Mail:
    """What is on its way between the server and its nodes.

    Attributes:
        grid: The way to the nodes.
        timeout: Seconds to wait for replies, at most.
        grace: Seconds to go on waiting once there are enough.
        deployed: Whether nodes are other machines. Replies are then fetched one by one, so that one of them at most is
            in memory, and what arrives after its round has closed is named and dropped.
        late: How many replies came after their round had closed.
        name: Returns what to call a node.
    """

    grid: Grid
    timeout: float
    grace: float = 0.0
    deployed: bool = False
    late: int = 0
    name: Callable[[int], str] = "node {}".format
    _open: dict[str, tuple[int, str]] = field(default_factory=dict)

    def exchange(self, messages: Iterable[Message], enough: Callable[[], bool] = never) -> Iterator[Message]:
        """Send messages and yield each reply as it arrives, until all are there or the round may close.

        Args:
            messages: The messages.
            enough: Whether the replies so far are enough for the round to close after the grace time.
        """
        waiting = self.send(messages)
        began, graced = time.monotonic(), False
        end = began + self.timeout
        while waiting:
            yield from self.pull(waiting)
            if not graced and enough():
                end, graced = min(end, time.monotonic() + self.grace), True
            now = time.monotonic()
            if not waiting or now >= end:
                break
            self._drop_late()
            time.sleep(_DEPLOYED_POLL_S if self.deployed else min(max(_POLL_S[0], (now - began) / 50), _POLL_S[1]))
        if self.deployed:
            self._open |= waiting

    def send(self, messages: Iterable[Message]) -> dict[str, tuple[int, str]]:
        """Send messages, made one by one; return node and round of each, by message."""
        sent: dict[str, tuple[int, str]] = {}
        for message in messages:
            node, group = message.metadata.dst_node_id, message.metadata.group_id
            for number in self.grid.push_messages([message]):
                if number:  # Flower has logged why there is none
                    sent[number] = node, group
        return sent

    def pull(self, waiting: dict[str, tuple[int, str]]) -> Iterator[Message]:
        """Yield the replies that are there, and forget the messages that they answer.

        They are fetched in parts, so that few of them are in memory at once, and in few parts, since each is a call.
        """
        size = 1 if self.deployed else max(1, len(waiting) // _PARTS)
        asked = list(waiting)
        for at in range(0, len(asked), size):
            for reply in self.grid.pull_messages(asked[at : at + size]):
                node, _ = waiting.pop(reply.metadata.reply_to_message_id, (0, ""))
                if reply.has_error():  # Flower's own errors come from itself, and name no node
                    reply.metadata.__dict__["_src_node_id"] = node
                yield reply

    def _drop_late(self) -> None:
        """Fetch what came too late, so that it can be named, and is not kept by the SuperLink."""
        for number, (node, group) in list(self._open.items()):
            for reply in self.pull({number: (node, group)}):
                self._open.pop(number, None)  # a node may have answered twice
                if not reply.has_error():
                    self.late += 1
                    _logger.warning("a reply of %s to round %s came late, and is dropped", self.name(node), group)
