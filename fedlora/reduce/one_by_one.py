"""The reduction that keeps every client's update as it is, for rules that need them apart (stacking, products)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Self, final

import numpy as np

from fedlora.codec import WireError
from fedlora.exact_sum import check_sizes
from fedlora.exchange import Tensors, Update
from fedlora.reduce.base import ClientUpdate, Expected, Header, Records, Reduced, Reduction
from fedlora.reduce.check import check_tensors

if TYPE_CHECKING:
    from fedlora.methods.products import Product

_UPDATE = re.compile(r"update\.(0|[1-9][0-9]{0,17})")


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
            OverflowError: A number is too large, as for a sum, or not finite; nothing was added.
        """
        assert not update.extra, "no rule that keeps updates apart sends anything beside them"
        check_sizes(update.tensors, weight)
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
            WireError: A group is not a client's update, or its weight is missing.
        """
        found: dict[int, ClientUpdate] = {}
        for name, tensors in records.items():
            match, weight = _UPDATE.fullmatch(name), header.get(name.replace("update.", "weight.", 1))
            if match is None or weight is None:
                raise WireError(f"{name[:40]} is not a client's update with its weight")
            found[int(match[1])] = ClientUpdate(int(match[1]), weight, tensors)
        return cls(found)

    def check(self, expected: Mapping[int, Expected], dtype: str) -> None:
        """Check each client's tensors and weight.

        Raises:
            WireError: One of them is wrong.
            OverflowError: A number is too large.
        """
        if self.updates.keys() != expected.keys():
            raise WireError("it does not hold one update for each of its clients")
        for client, update in self.updates.items():
            check_tensors(update.tensors, expected[client].tensors, dtype)
            if update.weight != expected[client].weight:
                raise WireError(f"the weight of client {client} is {update.weight}, not {expected[client].weight}")
            check_sizes(update.tensors, update.weight)

    def each(self, clients: Sequence[int]) -> list[tuple[int, Tensors]]:
        """Return all updates."""
        return [(client, one.tensors) for client, one in self.updates.items()]

    def reduced(self) -> Reduced:
        """Return the updates in the order of clients."""
        return Reduced(len(self.updates), updates=tuple(self.updates[client] for client in sorted(self.updates)))


def weighted_mean(updates: Sequence[ClientUpdate], names: Iterable[str]) -> Tensors:
    """Return the weighted mean of some tensors of updates that were kept apart, float64, summed in their order."""
    each = list(zip(shares(updates), updates, strict=True))
    terms = ((name, [share * one.tensors[name].astype(np.float64) for share, one in each]) for name in names)
    return {name: np.sum(values, axis=0) for name, values in terms}


def mean_product(updates: Sequence[ClientUpdate], name_a: str, name_b: str) -> Product:
    """Return factors of the weighted mean of the clients' products, ``sum_k p_k B_k A_k``, stacked in their order.

    Args:
        updates: Updates that were kept apart, each at its own rank r_k.
        name_a: Their A.
        name_b: Their B.

    Returns:
        A [sum r_k, d_in], which has the weights, and B [d_out, sum r_k].
    """
    from fedlora.methods.products import stack  # the client app imports this file, and no methods

    return stack(factors(updates, name_a, name_b), shares(updates))


def shares(updates: Sequence[ClientUpdate]) -> list[float]:
    """Return the weight of each update among all of them; they sum to 1."""
    total = sum(one.weight for one in updates)
    return [one.weight / total for one in updates]


def factors(updates: Sequence[ClientUpdate], name_a: str, name_b: str) -> list[Product]:
    """Return the A [r_k, d_in] and B [d_out, r_k] of each update, float64."""
    return [(one.tensors[name_a].astype(np.float64), one.tensors[name_b].astype(np.float64)) for one in updates]
