"""The audit of rounds: that the ledger pays for every step, before an update leaves, and what else leaves."""

from __future__ import annotations

from collections.abc import Iterator

from fedlora.privacy import epsilon
from simulations.audit.findings import Finding
from simulations.audit.site import Audited


def rounds(run: Audited) -> Iterator[Finding]:
    """Three rounds, the last by a worker that remembers nothing: what was charged, and what left beside tensors."""
    site = run.site([run.data.training_rows(client) for client in (0, 1)])
    updates = [update for number in (1, 2) for update in site.train((0, 1), number)]
    site.worker.renew()  # it remembers nothing
    updates += site.train((0, 1), 3)
    errors = [update.report.reason for update in updates if update.report.reason]
    taken = {client: sum(u.report.steps for u in updates if u.client == client) for client in (0, 1)}
    charged = {client: sum(entry.use.steps for entry in site.ledger(client).entries()) for client in (0, 1)}
    yield Finding(
        "the ledger holds every step of every round",
        not errors and taken == charged and min(taken.values()) == 3 * site.mechanism.steps,
        f"steps taken {taken}, in the ledger {charged}" + (f"; {errors[0]}" if errors else ""),
    )
    delta, uses = run.config.privacy.delta, [entry.use for entry in site.ledger(0).entries()]
    spent = [epsilon(uses[:n], target_delta=delta, accountant="rdp") for n in (1, 2, 3)]
    grows = len(uses) == 3 and spent[0] < spent[1] < spent[2]
    yield Finding("epsilon composes over rounds", grows, ", ".join(f"{value:.4g}" for value in spent))
    seen = [u.client for u in updates if u.report.examples or u.report.metrics]
    yield Finding("no number of rows and no loss leaves", not seen, f"{len(updates)} updates examined")
    heads = [update.report.ledger_head for update in updates if update.client == 0]
    known = [entry.hash for entry in site.ledger(0).entries()]
    yield Finding(
        "each update names the entry that pays for it", heads == known[-len(heads) :], f"{len(heads)} updates"
    )


def order(run: Audited) -> Finding:
    """With a disk that fails no update may come out."""
    name = "no update leaves before its ledger entry is on the disk"
    site = run.site([run.data.training_rows(0)])
    before = [update for update in site.train((0,)) if update.tensors]
    with run.disk.failing():
        left = [update for update in site.train((0,), 2) if update.tensors or not update.report.reason]
    passed = bool(before) and not left
    return Finding(name, passed, f"{len(before)} update(s) left before, {len(left)} with a failing disk")
