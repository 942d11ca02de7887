"""What a simulation's researcher may see and a server may not: ledgers, sites' notes, clients' own evaluations.

In a simulation the sites' folders are on this machine. What is read from them here is outside the guarantee, and never
reaches the strategy or a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from rich.console import Console

from clients.accounts import Accounts
from fedlora.metrics import OUTSIDE, is_covered
from fedlora.privacy import Entry, LedgerError
from fedlora.runs.folder import RunFolder
from fedlora.runs.privacy import FILE, format_epsilon, privacy_record, spent, without_privacy
from fedlora.server.observers import Observer, RoundEnd
from fedlora.state import ClientRecords
from simulations.plan import Plan


@final
class PrivacyFile(Observer):
    """Writes ``privacy.json``, under DP from the clients' ledgers as they are.

    Args:
        plan: The run's plan.
        folder: Its folder.
        accounts: The clients' privacy accounts; None without DP.
        device: Where clients compute.
    """

    def __init__(self, plan: Plan, folder: RunFolder, accounts: Accounts | None, device: str) -> None:
        self.plan, self.folder, self.accounts, self.device = plan, folder, accounts, device
        self.record: dict[str, Any] = {}

    def write(self, clients: ClientRecords) -> None:
        """Write the record."""
        roles = self.plan.strategy.roles_in_turn()
        if self.accounts is None:
            self.record = without_privacy(roles)
        else:
            ledgers: dict[int, Sequence[Entry] | str] = {}
            for client in range(len(self.plan.data.clients)):
                try:
                    seen = clients.ledger_heads.get(client, "")
                    ledgers[client] = self.accounts.ledger(client).check_holds(seen)
                except LedgerError as error:
                    ledgers[client] = str(error)
            self.record = privacy_record(self.plan.config, ledgers, self.device, roles)
        self.folder.write_json(FILE, self.record)

    def spent(self) -> dict[str, float]:
        """Return the most and the least epsilon that a client has spent; empty without DP."""
        return spent(self.record)

    def on_round(self, end: RoundEnd) -> None:
        """Write the record anew, and fill in what has been spent."""
        self.write(end.state.clients)
        end.spent = self.spent()


@final
class SiteNotes(Observer):
    """Prints what sites noted of faults and did not report to the server.

    Args:
        accounts: The clients' privacy accounts.
        console: Where to.
        cohort: Returns a round's clients.
    """

    def __init__(self, accounts: Accounts, console: Console, cohort: Callable[[int], list[int]]) -> None:
        self.accounts, self.console, self.cohort = accounts, console, cohort

    def on_round(self, end: RoundEnd) -> None:
        """Print the round's notes that hold an error."""
        for client in self.cohort(end.round):
            for line in self.accounts.noted(client, end.round):
                if line["error"]:
                    error = line["error"]
                    self.console.print(f"note: client {client}, not reported to the server: {error}", markup=False)


def epsilon_spent(plan: Plan) -> Callable[[RoundEnd], str]:
    """Return what a round's line says under DP, which hides the training loss: epsilon."""
    outside = "" if is_covered(plan.measure) else f"({OUTSIDE})  "

    def beside(end: RoundEnd) -> str:
        return f"{outside}epsilon {format_epsilon(end.line['epsilon'])} at delta {plan.config.privacy.delta:g}"

    return beside
