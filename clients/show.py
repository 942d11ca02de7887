"""What a site says of itself to its own operator: what may leave, what has left, what has been spent."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from clients.release_log import ReleaseLog
from clients.site_file import SiteFile
from fedlora.privacy import Ledger, LedgerError, epsilon

_LAST = 10  # releases that are shown


def show(file: SiteFile, console: Console) -> int:
    """Print it; return 0, or 1 where the site cannot be trusted to train."""
    limits = file.limits
    console.print(f"site {file.name}: {file.path}", markup=False)
    console.print(_mode(file), markup=False)
    for line in _leaves(file):
        console.print(f"  {line}", markup=False)
    console.print("it refuses every job beyond these limits, whatever the coordinator sends:")
    table = Table("limit", "value")
    for name, value in vars(limits).items():
        if name in ("folder", "name", "dp_required"):
            continue
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        table.add_row(name.replace("_", "-"), shown if value else "none")
    console.print(table)
    _released(file, console)
    return _spent(file, console)


def _mode(file: SiteFile) -> str:
    if not file.limits.dp_required:
        return (
            "RAW UPDATES ARE ALLOWED (raw-updates = true): updates may leave without differential privacy. Whoever has "
            "them, the coordinator first of all, can turn them back into rows of this site."
        )
    limits = file.limits
    return (
        f"updates leave under differential privacy only: over all jobs together each row of this site is "
        f"({limits.max_epsilon:g}, {limits.max_delta:g})-differentially private, also against the coordinator."
    )


def _leaves(file: SiteFile) -> list[str]:
    public = (
        f"when it joins: its name, rows = {file.public.rows} (nominal), the versions of fedlora and its protocol, "
        "where it computes (device, threads, trainers), the digests of base model, seeded tensors and code; or which "
        "key of a job it refuses, by which limit"
    )
    if file.limits.dp_required:
        return [
            public,
            "each round: the trained low-rank tensors, after clip and noise; the hash of its last ledger entry; the "
            "number of steps, which follows from the job. No number of rows, no loss, no accuracy.",
        ]
    held = f", and sums of metrics over the {file.data.holdout:.0%} that it holds out" if file.data.holdout else ""
    return [public, f"each round: the trained low-rank tensors; the number of its training rows; its mean loss{held}."]


def _released(file: SiteFile, console: Console) -> None:
    lines = ReleaseLog(file.state / "released.jsonl").lines()
    if not lines:
        console.print("nothing has left it yet")
        return
    table = Table(
        "at", "run", "round", "outcome", "tensors", "bytes", "sha256", title=f"left, the last of {len(lines)}"
    )
    for line in lines[-_LAST:]:
        shapes = [f"{name} {shape}" for name, shape in line["tensors"].items()]
        shown = f"{len(shapes)}: {shapes[0]}, ..." if shapes else "none"
        table.add_row(
            line["at"],
            line["run"],
            str(line["round"]),
            "again" if line["again"] else line["outcome"],
            shown,
            str(line["bytes"]),
            line["sha256"][:16],
        )
    console.print(table)
    console.print(f"every name, shape and hash: {file.state / 'released.jsonl'}", markup=False)


def _spent(file: SiteFile, console: Console) -> int:
    ledger = Ledger(file.state / "ledger.jsonl", file.name)
    try:
        entries = ledger.entries()
    except LedgerError as error:
        console.print(f"the ledger cannot be trusted, and the site will not train: {error}", markup=False)
        return 1
    if not entries and not file.limits.dp_required:
        return 0
    limits = file.limits
    delta = limits.max_delta or 1e-5
    spent = epsilon([entry.use for entry in entries], target_delta=delta, accountant="pld") if entries else 0.0
    left = (
        f", {max(0.0, limits.max_epsilon - spent):.4g} of {limits.max_epsilon:g} are left" if limits.max_epsilon else ""
    )
    console.print(f"spent: epsilon {spent:.4g} at delta {delta:g} in {len(entries)} round(s){left}", markup=False)
    return 0
