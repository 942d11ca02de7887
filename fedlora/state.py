"""What the server of a federation holds between rounds, saved whole and restored to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedlora.exchange import Tensors


@dataclass(frozen=True)
class ClientRecords:
    """What the server remembers of the clients.

    Attributes:
        trained: Clients whose update has been used at least once.
        received: The last round whose outcome a client was sent, by client; absent: none.
        ledger_heads: Under DP the hash of the last ledger entry that the server has seen of a client, by client.
        spent: Clients whose privacy budget is spent.
    """

    trained: frozenset[int] = frozenset()
    received: Mapping[int, int] = field(default_factory=dict)
    ledger_heads: Mapping[int, str] = field(default_factory=dict)
    spent: frozenset[int] = frozenset()

    def record(self) -> dict[str, Any]:
        """Return the records as plain values, for JSON."""
        return {
            "trained": sorted(self.trained),
            "received": sorted(self.received.items()),
            "ledger_heads": sorted(self.ledger_heads.items()),
            "spent": sorted(self.spent),
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Self:
        """Return the records of :meth:`record`."""
        return cls(
            frozenset(record["trained"]),
            {int(client): int(number) for client, number in record["received"]},
            {int(client): str(head) for client, head in record["ledger_heads"]},
            frozenset(record["spent"]),
        )


@dataclass(frozen=True)
class ServerState:
    """The server's state after a round; nothing else outlives one.

    Attributes:
        tensors: The tensors that are exchanged, by name.
        extra: What the server's rule keeps beside them, named ``<what>/<tensor>``: moments of an optimizer, control
            variates.
        clients: What is remembered of the clients.
    """

    tensors: Tensors
    extra: Tensors = field(default_factory=dict)
    clients: ClientRecords = field(default_factory=ClientRecords)

    def arrays(self) -> dict[str, NDArray[np.floating]]:
        """Return tensors and extra under names of their own, for one file."""
        return {
            **{f"tensors/{name}": value for name, value in self.tensors.items()},
            **{f"extra/{name}": value for name, value in self.extra.items()},
        }

    @classmethod
    def read(cls, arrays: Tensors, clients: Mapping[str, Any]) -> Self:
        """Return the state of :meth:`arrays` and :meth:`ClientRecords.record`."""

        def under(prefix: str) -> dict[str, NDArray[np.floating]]:
            return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

        return cls(under("tensors/"), under("extra/"), ClientRecords.read(clients))

    def named(self, what: str) -> dict[str, NDArray[np.floating]]:
        """Return one part of ``extra``, such as ``variate``, by tensor."""
        prefix = f"{what}/"
        return {name.removeprefix(prefix): value for name, value in self.extra.items() if name.startswith(prefix)}
