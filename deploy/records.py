"""What a coordinator writes down of its sites: who joined, what each ledger said, and what that comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from fedlora.privacy import Entry, Mechanism
from fedlora.runs.folder import RunFolder, read_lines
from fedlora.runs.privacy import FILE, privacy_record, spent, without_privacy
from fedlora.server.observers import Observer, RoundEnd
from simulations.plan import Plan

_LEDGERS = "ledgers.jsonl"
_OWN_BOOKS = (
    "what a site has spent beyond what this coordinator has seen of its ledger: in other runs, and in rounds that were "
    "paid for and never arrived. The site's own ledger is what counts, and what it refuses by."
)


@final
class SitesPrivacy(Observer):
    """Writes ``privacy.json`` of deployed sites, under DP from the ledger entries that came with their updates.

    Args:
        plan: The run's plan.
        folder: Its folder.
        names: The sites' names, by client.
        device: Returns where sites compute: ``cpu`` where all of them do.
    """

    def __init__(self, plan: Plan, folder: RunFolder, names: Sequence[str], device: Callable[[], str]) -> None:
        self.plan, self.folder, self.names, self.device = plan, folder, names, device
        path = folder.path / _LEDGERS
        self._lines = read_lines(path) if path.is_file() else []
        self.record: dict[str, Any] = {}

    def write(self) -> None:
        """Write the record."""
        roles = self.plan.strategy.roles_in_turn()
        if self.plan.privacy is None:
            self.record = without_privacy(roles)
        else:
            use = Mechanism.of(self.plan.config).use()
            entries: dict[int, list[Entry]] = {client: [] for client in range(len(self.names))}
            for line in self._lines:
                entries[line["client"]].append(Entry(line["round"], use, line["entry"]))
            self.record = privacy_record(self.plan.config, entries, self.device(), roles)
            self.record["not_released"] = [_OWN_BOOKS]
        self.record["sites"] = list(self.names)
        self.folder.write_json(FILE, self.record)

    def spent(self) -> dict[str, float]:
        """Return the most and the least epsilon of a site; empty without DP."""
        return spent(self.record)

    def on_round(self, end: RoundEnd) -> None:
        """Note the entries that the round's reports named, and write the record anew."""
        known = {line["entry"] for line in self._lines}
        new = [
            {"round": end.round, "client": client, "entry": head}
            for client, head in sorted(end.replies.ledger_heads.items())
            if head not in known
        ]
        self.folder.append(_LEDGERS, *new)
        self._lines += new
        self.write()
        end.spent = self.spent()
