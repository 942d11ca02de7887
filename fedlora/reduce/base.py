"""How clients' updates become one thing: the interface of a reduction, the same at nodes and at the server.

A node that stands for several clients reduces their updates before it replies; the server merges what nodes send. A
reduction must give the same bits in whatever order updates arrive and however clients are spread over nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from fedlora.exchange import Tensors, Update

if TYPE_CHECKING:
    from fedlora.methods import TensorSpec

Header = Mapping[str, int]
Records = Mapping[str, Tensors]


@dataclass(frozen=True)
class Expected:
    """What a client's update must hold.

    Attributes:
        tensors: Its shared tensors, at the client's rank.
        extra: What it sends beside them.
        weight: How often it counts.
    """

    tensors: Mapping[str, TensorSpec]
    extra: Mapping[str, TensorSpec]
    weight: int


@dataclass(frozen=True)
class ClientUpdate:
    """One client's update, kept apart from the others'.

    Attributes:
        client: The client.
        weight: How often it counts.
        tensors: Its shared tensors, at its own rank.
    """

    client: int
    weight: int
    tensors: Tensors


@dataclass(frozen=True)
class Reduced:
    """What the updates of a round came to.

    Attributes:
        count: Clients in it.
        mean: Their weighted mean, float64; empty where the reduction keeps them apart.
        extra: The mean of what they sent beside, all clients alike, float64.
        updates: The updates themselves, by client, where the reduction keeps them apart.
    """

    count: int
    mean: Tensors = field(default_factory=dict)
    extra: Tensors = field(default_factory=dict)
    updates: tuple[ClientUpdate, ...] = ()


class Reduction(ABC):
    """A reduction of some clients' updates, to which others can be added."""

    name: ClassVar[str]
    """Its name in :data:`fedlora.reduce.REDUCTIONS` and in messages."""

    @property
    @abstractmethod
    def count(self) -> int:
        """How many clients' updates are in it."""

    @abstractmethod
    def add(self, update: Update, weight: int) -> None:
        """Add one client's update, which counts ``weight`` times.

        Raises:
            OverflowError: A number is too large or not finite; nothing was added.
        """

    def add_all(self, updates: Sequence[tuple[Update, int]]) -> None:
        """Add several clients' updates, each with its weight.

        Args:
            updates: The updates.

        Raises:
            OverflowError: One of them is too large or not finite, or their sum is; nothing was added.
        """
        more = type(self)()
        for update, weight in updates:
            more.add(update, weight)
        self.merge(more)

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the updates of another node.

        Raises:
            OverflowError: The result would not be exact; nothing was added.
        """

    @abstractmethod
    def encode(self) -> tuple[Records, Header]:
        """Return what crosses the wire: named groups of tensors, and whole numbers."""

    @classmethod
    @abstractmethod
    def decode(cls, records: Records, header: Header) -> Self:
        """Return the reduction of :meth:`encode`.

        Raises:
            WireError: The parts do not fit together.
        """

    @abstractmethod
    def check(self, expected: Mapping[int, Expected], dtype: str) -> None:
        """Check that it can come from these clients' updates: names, shapes, dtype, finite numbers, weights.

        Raises:
            WireError: It cannot; the message names the first tensor that is wrong.
        """

    @abstractmethod
    def each(self, clients: Sequence[int]) -> Iterable[tuple[int, Tensors]]:
        """Return the updates that can still be told apart, by client; ``clients`` are those that it comes from."""

    @abstractmethod
    def reduced(self) -> Reduced:
        """Return what the updates come to."""
