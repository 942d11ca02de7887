"""What stands between a client's rows and the server under DP: who may train, what it costs, and what may leave.

It is the client's own: in a deployment the site keeps it, in a simulation the run folder does. A client's update
leaves only after its ledger has paid for it; what is not covered by the guarantee (numbers of rows, losses, what was
clipped) goes into a file beside the ledger, for the site to look at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import final

from fedlora.config import Config
from fedlora.privacy import Ledger, LedgerError, Mechanism, PrivateRandom, certifier, epsilon
from fedlora.wire import BUDGET_SPENT


@final
@dataclass(frozen=True)
class Accounts:
    """The privacy accounts of the clients whose rows are here.

    Attributes:
        folder: Parent of the clients' folders.
        config: The configuration, with all ``privacy`` keys given.
    """

    folder: Path
    config: Config

    @property
    def mechanism(self) -> Mechanism:
        """What each client does in a round."""
        return Mechanism.of(self.config)

    def ledger(self, client: int) -> Ledger:
        """Return a client's ledger."""
        return Ledger(self.folder / f"client-{client}" / "ledger.jsonl", client)

    def random(self, client: int, round_number: int) -> PrivateRandom:
        """Return a client's private randomness for a round, never the same twice."""
        seed = self.config.privacy.seed
        return PrivateRandom.reproducible(seed, client, round_number) if seed else PrivateRandom()

    def refusal(self, client: int, head: str) -> str:
        """Return why a client must not train in a round; empty where it may.

        Args:
            client: The client.
            head: The hash of the last ledger entry that the server was told; empty: none.
        """
        ledger, privacy = self.ledger(client), self.config.privacy
        try:
            ledger.check_knows(head)
            uses = ledger.uses()
        except LedgerError as error:
            return str(error)
        if not privacy.epsilon:
            return ""
        after = epsilon(
            [*uses, self.mechanism.use()],
            target_delta=privacy.delta,
            accountant=certifier(self.config),
        )
        if after <= privacy.epsilon:
            return ""
        return (
            f"{BUDGET_SPENT}: one more round would bring epsilon to {after:.4g}, above privacy.epsilon = "
            f"{privacy.epsilon:g}"
        )

    def charge(self, client: int, round_number: int) -> str:
        """Enter a round's use into a client's ledger; return the hash of the entry when it is on the disk."""
        return self.ledger(client).charge(round_number, self.mechanism.use()).hash

    def note(self, client: int, round_number: int, facts: dict[str, float | str]) -> None:
        """Write down what a site may look at: not covered by the guarantee, and never sent."""
        with (self.folder / f"client-{client}" / "diagnostics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"round": round_number, **facts}) + "\n")
