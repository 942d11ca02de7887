"""Privacy accounts: whether a client may train under DP, what a round costs it, and its sampling and noise.

They are the site's own: in a deployment they lie at the site, in a simulation in the run folder. A client's update
leaves only after its ledger has paid for it; what is not covered by the guarantee (numbers of rows, losses, what was
clipped) goes into a file beside the ledger, for the site to read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from clients.errors import RefusedError
from clients.limits import SiteLimits
from fedlora.config import Config
from fedlora.exchange import BUDGET_SPENT, Outcome
from fedlora.privacy import Entry, Ledger, LedgerError, Mechanism, PrivateRandom, certifier, epsilon
from fedlora.privacy.mechanism import SEEDED
from fedlora.runs.folder import read_lines
from fedlora.storage import StorageError, append_whole, writing

_logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class Accounts:
    """The privacy accounts of the clients whose rows are here.

    Attributes:
        limits: What the site demands; its folder is the parent of the clients'.
        config: The configuration, with all ``privacy`` keys given.
        sync: Puts an open file on the disk, given its descriptor.
    """

    limits: SiteLimits
    config: Config
    sync: Callable[[int], None] = os.fsync

    @property
    def folder(self) -> Path:
        """Parent of the clients' folders."""
        return Path(self.limits.folder)

    @property
    def mechanism(self) -> Mechanism:
        """What each client does in a round."""
        return Mechanism.of(self.config)

    def ledger(self, client: int) -> Ledger:
        """Return a client's ledger; a deployed site's is one, whatever number a server gives it."""
        return Ledger(self._own(client) / "ledger.jsonl", self.limits.name or client, self.sync)

    def random(self, client: int, round_number: int) -> PrivateRandom:
        """Return a client's random numbers for a round, never the same twice unless ``privacy.seed`` is set."""
        seed = self.config.privacy.seed
        return PrivateRandom.reproducible(seed, client, round_number) if seed else PrivateRandom()

    def charge(self, client: int, round_number: int, head: str) -> str:
        """Pay for a round before any of it is computed; return the hash of the entry when it is on the disk.

        A round that then fails is paid for all the same: that it failed is seen.

        Args:
            client: The client.
            round_number: The round, from 1.
            head: The hash of the last ledger entry that the server has seen; empty: none.

        Raises:
            RefusedError: The client must not train. What the error says leaves; the rest is noted at the site.
        """
        try:
            entry = self.ledger(client).charge(
                round_number,
                self.mechanism.use(),
                head=head,
                budget=self._check_budget,
                remark=SEEDED if self.config.privacy.seed else "",
                run=self._run,
            )
        except LedgerError as error:
            self.note(client, round_number, {"error": str(error)})
            raise RefusedError("its privacy ledger cannot be trusted; its own diagnostics.jsonl says why") from error
        except StorageError as error:  # of the disk it says what it says whatever the rows; where files are, stays here
            _logger.error("client %d does not train: %s", client, error)
            why = f"its privacy ledger cannot be written: {os.strerror(error.errno or 0)}"
            raise RefusedError(why if self.limits.name else str(error)) from error
        return entry.hash

    @property
    def _run(self) -> str:
        """The run that a deployed site notes in its ledger; elsewhere each run has ledgers of its own."""
        return self.config.run.name if self.limits.name else ""

    def _check_budget(self, entries: Sequence[Entry]) -> None:
        """Hold this run to the job's budget, and all runs together to the site's own."""
        privacy, run = self.config.privacy, [entry for entry in entries if entry.run == self._run]
        for budget, whose, counted in (
            (privacy.epsilon, f"privacy.epsilon = {privacy.epsilon:g}", run),
            (self.limits.max_epsilon, "the site's own max-epsilon", entries),
        ):
            uses = [entry.use for entry in counted]
            if budget and epsilon(uses, target_delta=privacy.delta, accountant=certifier(self.config)) > budget:
                why = f"{BUDGET_SPENT}: one more round would pass {whose}"
                raise RefusedError(why, Outcome.BUDGET_SPENT)

    def note(self, client: int, round_number: int, facts: dict[str, float | str]) -> None:
        """Write down what only the site may read: it is not covered by the guarantee, and never sent.

        Where the disk is full it is lost, and the round goes on: whether it fits depends on the rows.
        """
        file = self._diagnostics(client)
        try:
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                append_whole(file, (json.dumps({"round": round_number, **facts}) + "\n").encode())
        except StorageError as error:
            _logger.error("of client %d's round %d nothing is noted: %s", client, round_number, error)

    def noted(self, client: int, round_number: int) -> list[dict[str, Any]]:
        """Return what was noted of a client's round."""
        file = self._diagnostics(client)
        return [line for line in read_lines(file) if line["round"] == round_number] if file.is_file() else []

    def _diagnostics(self, client: int) -> Path:
        return self._own(client) / "diagnostics.jsonl"

    def _own(self, client: int) -> Path:
        return self.folder if self.limits.name else self.folder / f"client-{client}"
