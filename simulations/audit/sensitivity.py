"""The audit of one step on known rows: that each row is clipped by itself, and what one row changes in a sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from simulations.audit.findings import Finding, flat
from simulations.audit.site import Audited

_ROWS = 8


def sensitivity(run: Audited, roles_of: int) -> Iterator[Finding]:
    """Sums over known rows with next to no noise, every row in every batch, and what one row changes in them."""
    lengths = np.array([len(text) for text in run.data.corpus.train.texts])
    order = np.argsort(lengths, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, _ROWS).astype(int)]  # from the shortest to the longest
    singles = [np.array([row]) for row in rows]
    without = [np.setdiff1d(rows, [row]) for row in rows]

    def sums(held: Sequence[NDArray[np.int64]], clip: float) -> NDArray[np.float64]:
        site = run.one_step(held, _ROWS, clip)
        # One after the other: rows that are coupled would be so across clients, too.
        return np.stack([flat(site.released([client], roles_of)[0]) for client in range(len(held))])

    norms = np.linalg.norm(sums(singles, 1e9), axis=1)
    clip = float(np.median(norms))
    each = sums(singles, clip)
    expected = norms * np.minimum(1, clip / (norms + 1e-6))  # the constant is Opacus's, and counts for small norms
    off = float(np.abs(np.linalg.norm(each, axis=1) - expected).max() / clip)
    yield Finding(
        "a row's gradient, all tensors together, is clipped to C",
        off < 1e-4,
        f"norms {norms.min():.3g} to {norms.max():.3g}, C {clip:.3g}: off by {off:.1e} of C at most",
    )
    whole, *parts = sums([rows, *without], clip)
    change = max(float(np.linalg.norm(whole - part)) for part in parts) / clip
    yield Finding("removing one row changes the sum by at most C", change <= 1 + 1e-6, f"{change:.4f} C")
    gap = float(np.linalg.norm(whole - each.sum(0)) / np.linalg.norm(whole))
    yield Finding(
        "a batch's sum is that of its rows, by the expected batch size whatever their number",
        gap < 1e-6,
        f"off by {gap:.1e}",
    )
