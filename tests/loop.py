"""Flower's messages and apps without its processes: a grid whose nodes are functions of this process.

Messages, records, apps and strategies are the real ones; only the transport is missing. Whole runs through
real Flower processes are in ``test_runs.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Node = Callable[[Message], RecordDict | Exception | None]


class LoopGrid(Grid):
    """A grid over functions; a node that returns None never answers.

    Args:
        nodes: By node number, what answers its messages.
        order: Turns the list of replies that are ready into the order in which they arrive.
    """

    def __init__(self, nodes: dict[int, Node], order: Callable[[list[Message]], list[Message]] = list) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.nodes = nodes
        self.order = order
        self.sent: list[Message] = []
        self.folded_at_once = 0
        self._replies: list[Message] = []

    def set_run(self, run: Any) -> None:
        raise AssertionError("not used")

    @property
    def run(self) -> Any:
        raise AssertionError("not used")

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise AssertionError("not used")

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            name = f"message-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            names.append(name)
            answer = self.nodes[message.metadata.dst_node_id](message)
            if answer is None:
                continue
            reply = self._reply(message, answer)
            self._replies.append(reply)
        self._replies = self.order(self._replies)
        return names

    @staticmethod
    def _reply(message: Message, answer: RecordDict | Exception) -> Message:
        from flwr.app import Error

        TaskIdentity.node_id = message.metadata.dst_node_id
        try:
            if isinstance(answer, Exception):
                return Message(Error(code=1, reason=str(answer)), reply_to=message)
            return Message(answer, reply_to=message)
        finally:
            TaskIdentity.node_id = 1

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        for reply in list(self._replies):
            if reply.metadata.reply_to_message_id in wanted:
                self._replies.remove(reply)
                return [reply]
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        replies: list[Message] = []
        while found := list(self.pull_messages(waiting)):
            replies += found
        return replies
