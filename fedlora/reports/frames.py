"""What run folders hold, as data frames: a line a round, a client's spending, its diagnostics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from fedlora.exchange import BUDGET_SPENT
from fedlora.privacy import Ledger, LedgerError, certifier, epsilon
from fedlora.privacy.accounting import Use
from fedlora.reports.run import Run
from fedlora.runs.folder import read_lines

_CLIENTS = "sites/client-*"
_ABOUT = ("run", "strategy", "budget")


def rounds_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the lines of ``metrics.jsonl`` of runs, below one another, each with its run, strategy and budget."""
    return pd.DataFrame([{**_about(run), **line} for run in runs for line in run.metrics])


def spending_frame(run: Run) -> pd.DataFrame:
    """Return epsilon by client and round, from the ledgers of a simulation.

    Columns: ``client``, ``round``, ``epsilon`` of all that the client has done until then, and ``stopped``: whether it
    was asked for another round afterwards, which its budget did not pay for. A round that was repeated has paid twice,
    and has one line. A client whose ledger cannot be trusted has none: ``privacy.json`` says why.
    """
    privacy, by, lines = run.config.privacy, certifier(run.config), list[dict[str, Any]]()
    stopped = _without_budget(run)

    def cost(uses: Sequence[Use]) -> float:
        return epsilon(uses, target_delta=privacy.delta, accountant=by)

    for client, folder in _folders(run):
        try:
            entries = Ledger(folder / "ledger.jsonl", client).entries()
        except LedgerError:
            continue
        uses = [entry.use for entry in entries]
        for count, entry in enumerate(entries, start=1):
            lines.append({"client": client, "round": entry.round, "epsilon": cost(uses[:count]), "stopped": False})
        if entries:
            lines[-1]["stopped"] = client in stopped
    frame = pd.DataFrame(lines, columns=["client", "round", "epsilon", "stopped"])
    return frame.drop_duplicates(["client", "round"], keep="last", ignore_index=True)


def diagnostics_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Return what clients measured on their own rows under DP, a line for each client and round.

    Among the columns are ``clipped_fraction`` and ``signal_to_noise`` (of a step). No guarantee covers these numbers.
    """
    lines = [
        {**_about(run), "client": client, **line}
        for run in runs
        for client, folder in _folders(run)
        if (folder / "diagnostics.jsonl").is_file()
        for line in read_lines(folder / "diagnostics.jsonl")
    ]
    return pd.DataFrame(
        lines, columns=None if lines else [*_ABOUT, "client", "round", "clipped_fraction", "signal_to_noise"]
    )


def _without_budget(run: Run) -> set[int]:
    """Return the clients that were asked for a round which their budget did not pay for."""
    file = run.path / "clients.jsonl"
    lines = read_lines(file) if file.is_file() else []
    return {line["client"] for line in lines if (line["refused"] or "").startswith(BUDGET_SPENT)}


def _about(run: Run) -> dict[str, Any]:
    config = run.config
    values = (run.path.name, config.strategy.name, config.privacy.epsilon or None)
    return dict(zip(_ABOUT, values, strict=True))


def _folders(run: Run) -> Iterator[tuple[int, Any]]:
    """Yield clients with the folder that each keeps its ledger in."""
    folders = {int(folder.name.removeprefix("client-")): folder for folder in run.path.glob(_CLIENTS)}
    yield from sorted(folders.items())
