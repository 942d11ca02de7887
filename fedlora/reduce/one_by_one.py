"""The reduction that keeps every client's update as it is, for rules that need them apart (stacking, products)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self, final

import numpy as np

from fedlora.codec import WireError
from fedlora.exact_sum import ExactSum
from fedlora.exchange import Tensors, Update
from fedlora.reduce.base import ClientUpdate, Expected, Header, Records, Reduced, Reduction
from fedlora.reduce.check import check_tensors


@final
class OneByOne(Reduction):
    """Updates by client; the server's memory grows with the clients of a round.

    Args:
        updates: The updates by client.
    """

    name = "one-by-one"

    def __init__(self, updates: Mapping[int, ClientUpdate] | None = None) -> None:
        self.updates = dict(updates or {})

    @property
    def count(self) -> int:
        """How many clients' updates are in it."""
        return len(self.updates)

    def add(self, update: Update, weight: int) -> None:
        """Add one client's update.

        Raises:
            OverflowError: A number is not finite.
        """
        assert not update.extra, "no rule that keeps updates apart sends anything beside them"
        for name, value in update.tensors.items():
            if not np.isfinite(value).all():
                raise OverflowError(f"{name} holds NaN or infinity")
        self.updates[update.client] = ClientUpdate(update.client, weight, dict(update.tensors))

    def merge(self, other: OneByOne) -> None:
        """Add the updates of another node."""
        assert not self.updates.keys() & other.updates.keys(), "a client belongs to one node"
        self.updates |= other.updates

    def encode(self) -> tuple[Records, Header]:
        """Return a group of tensors a client, and its weight."""
        records = {f"update.{client}": one.tensors for client, one in self.updates.items()}
        return records, {f"weight.{client}": one.weight for client, one in self.updates.items()}

    @classmethod
    def decode(cls, records: Records, header: Header) -> Self:
        """Return the updates of :meth:`encode`.

        Raises:
            WireError: A weight is missing.
        """
        found: dict[int, ClientUpdate] = {}
        for name, tensors in records.items():
            _, _, number = name.partition(".")
            weight = header.get(f"weight.{number}")
            if not number.isdecimal() or weight is None:
                raise WireError(f"{name} is not a client's update with its weight")
            found[int(number)] = ClientUpdate(int(number), weight, tensors)
        return cls(found)

    def check(self, expected: Mapping[int, Expected], dtype: str) -> None:
        """Check each client's tensors and weight.

        Raises:
            WireError: One of them is wrong.
        """
        if self.updates.keys() != expected.keys():
            raise WireError("it does not hold one update for each of its clients")
        for client, update in self.updates.items():
            check_tensors(update.tensors, expected[client].tensors, dtype)
            if update.weight != expected[client].weight:
                raise WireError(f"the weight of client {client} is {update.weight}")

    def reduced(self) -> Reduced:
        """Return the updates in the order of clients."""
        return Reduced(len(self.updates), updates=tuple(self.updates[client] for client in sorted(self.updates)))


def weighted_mean(updates: tuple[ClientUpdate, ...], names: list[str]) -> Tensors:
    """Return the weighted mean of some tensors of updates that were kept apart, as the ``mean`` reduction gives it."""
    total = ExactSum()
    for one in updates:
        total.add({name: one.tensors[name] for name in names}, one.weight)
    return total.mean() if names else {}
