"""Bytes of a round, by client: what is sent, what comes back, and what a client lacks that keeps what it was sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlora.methods import payload_bytes
from fedlora.roles import Role
from fedlora.strategy import Specs, Strategy

ACCUMULATED = "accumulated/ranks"
"""Where a server's state keeps the ranks that have been added until the end of each round, [rounds + 1, layers]."""

Ranks = Sequence[tuple[int, ...]]
"""The ranks that have been added until the end of each round, from round 0, of each layer; none of a strategy in which
no tensors accumulate."""


@dataclass
class Traffic:
    """Bytes that a round took.

    Attributes:
        bytes_up: Payload that clients sent, each counted alone.
        bytes_down: Payload that was sent to clients, each counted alone.
        bytes_down_cached: The part of it that clients would need who keep what they were sent before.
        message_bytes_up: What Flower carried to the server.
        message_bytes_down: What Flower carried to the nodes.
    """

    bytes_up: int = 0
    bytes_down: int = 0
    bytes_down_cached: int = 0
    message_bytes_up: int = 0
    message_bytes_down: int = 0


def lacking(strategy: Strategy, server_round: int, received: int, client: int | None = None) -> Specs:
    """Return the tensors sent in a round that a client lacks who has kept what it was sent before.

    Args:
        strategy: The strategy.
        server_round: The round.
        received: The last round whose outcome the client was sent; 0: what the server started with; -1: nothing, so
            it has what the seed gives.
        client: The client, where clients differ in rank.
    """
    return _changed(strategy, strategy.sent(server_round, client), server_round, received)


def _changed(strategy: Strategy, sent: Specs, server_round: int, received: int) -> Specs:
    """Return those of the tensors sent that have changed since the last round whose outcome a client was sent."""
    since = max(received + 1, server_round - strategy.period)  # what a whole cycle changes is all that ever changes
    new = set().union(*(strategy.renewed(number) for number in range(since, server_round)))
    if received < 0:
        new |= strategy.renewed(0)
    return {name: spec for name, spec in sent.items() if name in new}


@dataclass(frozen=True)
class Payloads:
    """The payloads of a strategy's messages.

    Attributes:
        strategy: The strategy.
        dtype: Of the tensors.
    """

    strategy: Strategy
    dtype: str

    def up(self, server_round: int, client: int | None = None) -> int:
        """Return the bytes that a client sends in a round."""
        return self._size(self.strategy.expected(server_round, client)) + self._size(self.strategy.extra(server_round))

    def down(
        self, server_round: int, received: int = -1, client: int | None = None, ranks: Ranks = ((),)
    ) -> tuple[int, int]:
        """Return the bytes that a client is sent for training, and those that it lacks if it kept what it was sent.

        Args:
            server_round: The round.
            received: The last round whose outcome it was sent; -1: none.
            client: The client, where clients differ in rank.
            ranks: The ranks that have been added.
        """
        strategy, extra = self.strategy, self.strategy.extra(server_round)
        sent, needed = self._sizes(strategy.sent(server_round, client), server_round, received, ranks)
        # What is sent beside the tensors starts at zero everywhere, and is new after each round that exchanged it.
        before = set().union(*(strategy.extra(n) for n in range(max(1, server_round - strategy.period), server_round)))
        new = {name: spec for name, spec in extra.items() if name in before}
        return sent + self._size(extra), needed + self._size(new)

    def evaluation(
        self, server_round: int, received: int = -1, client: int | None = None, ranks: Ranks = ((),)
    ) -> tuple[int, int]:
        """Return what :meth:`down` returns, for a client that evaluates what it would start the round with."""
        return self._sizes(self.strategy.measured(server_round, client), server_round, received, ranks)

    def _sizes(self, sent: Specs, server_round: int, received: int, ranks: Ranks) -> tuple[int, int]:
        """Return the bytes of tensors and of what accumulates, and of those that a client lacks."""
        lacked = self._size(_changed(self.strategy, sent, server_round, received))
        before = ranks[min(max(0, received), len(ranks) - 1)]
        whole = self._size(sent) + self._size(self.strategy.accumulated(ranks[-1]))
        return whole, lacked + self._grown_since(before, ranks[-1])

    def _grown_since(self, before: tuple[int, ...], now: tuple[int, ...]) -> int:
        """Return the bytes of accumulated tensors that one lacks who has those of ``before`` added ranks."""
        if before == now:
            return 0
        had, fewer = self.strategy.accumulated(before), self.strategy.accumulated([max(0, rank - 1) for rank in now])
        total = 0
        for name, spec in self.strategy.accumulated(now).items():
            # New ranks stand behind those that were there, until the tensors are compressed: then all is new.
            appended = name in had and fewer.get(name) != spec
            total += self._size({name: spec}) - (self._size({name: had[name]}) if appended else 0)
        return total

    @property
    def rounds(self) -> range:
        """A cycle of rounds after the first; where roles do not repeat, all rounds of the run."""
        strategy = self.strategy
        if strategy.repeats:
            return range(strategy.period + 1, 2 * strategy.period + 1)
        return range(1, max(strategy.period, strategy.setting.config.rounds) + 1)

    def cycle(self) -> tuple[float, float, float]:
        """Return the bytes of a client in a round: up, down, and down for one that keeps what it was sent.

        Means over :attr:`rounds`, for a client that takes part in all of them, without what accumulates. To evaluate
        itself a client is sent the tensors once more, which is not counted here.
        """
        sums = [(self.up(n), *self.down(n, n - 2)) for n in self.rounds]
        up, down, cached = (sum(column) / len(sums) for column in zip(*sums, strict=True))
        return up, down, cached

    def of_role(self, server_round: int, *roles: Role) -> int:
        """Return the bytes of the tensors that have one of these roles in a round."""
        return self._size(self.strategy.with_role(server_round, *roles))

    def _size(self, specs: Specs) -> int:
        return payload_bytes(specs, self.dtype)
