"""Deployed sites' nodes without processes: they come and go, and their replies may be held back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from flwr.app import Message, RecordDict

from fedlora.joining import JoinReport, JoinRequest
from fedlora.wire import read_join_request, write_join_report
from tests.support.loop import LoopGrid, Node

OWN = JoinReport("", digest="d" * 64, initial_digest="i" * 64, constants_digest="c" * 64, fingerprint="f")
"""The coordinator's own report."""
SUPERLINK = 1  # node from which Flower's own errors come


class PostGrid(LoopGrid):
    """A grid whose nodes come and go.

    Attributes:
        offline: Nodes that are not connected.
        held: Nodes whose replies do not arrive yet.
        superlink_fails: Nodes for which Flower itself answers, with an error.
        twice: Nodes whose replies arrive twice.
    """

    def __init__(self, nodes: dict[int, Node], *, offline: Iterable[int] = (), held: Iterable[int] = ()) -> None:
        super().__init__(nodes)
        self.offline, self.held = set(offline), set(held)
        self.superlink_fails: set[int] = set()
        self.twice: set[int] = set()

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.nodes if node not in self.offline]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        open_ones = {f"message-{n}" for n, one in enumerate(self.sent) if one.metadata.dst_node_id not in self.held}
        ready = list(super().pull_messages(set(message_ids) & open_ones))
        for reply in ready:
            if reply.metadata.src_node_id in self.superlink_fails:
                reply.metadata.__dict__["_src_node_id"] = SUPERLINK
        return [reply for reply in ready for _ in range(2 if reply.metadata.src_node_id in self.twice else 1)]

    def asked(self, node: int, kind: str = "query") -> list[Message]:
        """The messages of a kind that a node was sent."""
        return [
            one for one in self.sent if one.metadata.dst_node_id == node and one.metadata.message_type.startswith(kind)
        ]


def site(
    train: Node | None = None,
    *,
    answer: Callable[[JoinRequest], JoinReport | Exception | None] | None = None,
    **said: Any,
) -> Node:
    """A site's node: joins as the coordinator would have it, with fields of its report changed, and trains.

    Args:
        train: Answers all but the request to join.
        answer: Answers the request to join.
        said: Fields of its report.
    """

    def node(message: Message) -> RecordDict | Exception | None:
        if not message.metadata.message_type.startswith("query"):
            return train(message) if train else None
        request = read_join_request(message.content)
        report = answer(request) if answer else replace(OWN, **{"site": request.site, "rows": 100, **said})
        return write_join_report(report) if isinstance(report, JoinReport) else report

    return node
