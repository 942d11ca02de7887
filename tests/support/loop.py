"""Flower's messages and apps without its processes: a grid whose nodes are functions of this process.

Messages, records, apps and strategies are the real ones; only the transport is missing. Whole runs through
real Flower processes are in ``tests/e2e/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedlora.exchange import ClientReport, Instruction, Update
from fedlora.experts import copied
from fedlora.methods import TensorSpec
from fedlora.reduce import fold
from fedlora.server import FlowerStrategy
from fedlora.shapes import chosen, cut
from fedlora.wire import Reply, encode, read_instruction

Arrays = dict[str, NDArray[Any]]
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
        TaskIdentity.node_id = message.metadata.dst_node_id
        try:
            if isinstance(answer, Exception):
                return Message(Error(code=1, reason=str(answer)), reply_to=message)
            return Message(answer, reply_to=message)
        finally:
            TaskIdentity.node_id = 1

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = set(message_ids)
        ready = [reply for reply in self._replies if reply.metadata.reply_to_message_id in wanted]
        self._replies = [reply for reply in self._replies if reply not in ready]
        return ready

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        return list(self.pull_messages(waiting))


def update_of(client: int, number: int, specs: Mapping[str, TensorSpec], dtype: str = "float64") -> Arrays:
    generator = np.random.default_rng([client, number])
    return {name: generator.standard_normal(spec.shape).astype(dtype) for name, spec in specs.items()}


def examples_of(client: int) -> int:
    return 10 + 7 * client


def answer(instruction: Instruction, updates: Iterable[Update]) -> RecordDict:
    """Return a node's reply about its clients' updates, by the same steps as clients.app."""
    return Reply(*fold(instruction, updates)).to_content()


def node_of(
    server: FlowerStrategy, spoil: Callable[[int, Arrays], Arrays] | None = None, same: Arrays | None = None
) -> Node:
    """A node that answers as clients.app does, with known updates: random by client and round, or what it was sent.

    Args:
        server: Its strategy says which tensors are sent, its federation in which dtype.
        spoil: What is done to the update of the node's only client after the node has checked it, as by a client that
            sends what it likes.
        same: Every client sends back what it was sent, and these where it was sent nothing.
    """
    dtype = server.federation.dtype

    def update(instruction: Instruction, client: int) -> Update:
        number, strategy = instruction.round, server.strategy  # at the ranks of the round
        expected = strategy.expected(number, client)
        tensors = update_of(client, number, expected, dtype)
        if same is not None:
            expert = instruction.expert(client)
            held = {**same, **instruction.tensors, **({} if expert is None else copied(instruction.tensors, expert))}
            modules = instruction.modules_of(client)
            tensors = {
                name: cut(chosen(held[name], spec.rank_axis, modules), spec.shape) for name, spec in expected.items()
            }
        report = ClientReport(client, examples=examples_of(client), steps=3, metrics={"loss": 1.0})
        return Update(report, tensors, update_of(client, 100 + number, strategy.extra(number), dtype))

    def node(message: Message) -> RecordDict:
        instruction = read_instruction(message.content)
        if message.metadata.message_type == "evaluate":
            sums = {"accuracy": 5.0, "loss": 5.0}
            return Reply(
                [ClientReport(client, examples=10, metrics=sums) for client in instruction.clients]
            ).to_content()
        updates = [update(instruction, client) for client in instruction.clients]
        content = answer(instruction, updates)
        if spoil is not None:
            (one,) = updates
            (group,) = (name for name in content if name.startswith("reduced.update"))
            content[group] = encode(spoil(one.client, dict(one.tensors)))
        return content

    return node
