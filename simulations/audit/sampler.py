"""The audit of the sampler: batches of binomial size, every row alike, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulations.audit.findings import ALARM, Finding, two_sided_chi_square
from simulations.audit.site import Audited

_BATCHES = 400


def sampler(run: Audited) -> Iterator[Finding]:
    """Batches that the trainer gives the engine: binomial sizes, every row alike, nobody's the same."""
    count = len(run.data.corpus.train)
    site = run.site([np.arange(count)] * 2, steps=_BATCHES // 2)
    with run.engine.recording() as seen:
        for number in (1, 1, 2):  # the first twice
            site.train((0, 1), number)
    (one, other), (repeated, _), (later, _) = seen
    batches, rate = [*one, *later], site.ledger(0).entries()[0].use.sample_rate
    sizes = np.array([len(batch) for batch in batches])
    expected, variance = count * rate, count * rate * (1 - rate)
    shift = (sizes.mean() - expected) / np.sqrt(max(variance, 1e-12) / len(sizes))
    if variance:
        chance = two_sided_chi_square(float(((sizes - expected) ** 2).sum() / variance), len(sizes))
    else:  # every row in every batch
        chance = float((sizes == count).all())
    yield Finding(
        "batch sizes are binomial at the ledger's sample rate",
        abs(shift) < 6.0 and chance > ALARM,
        f"{len(sizes)} batches of {count} rows: mean {sizes.mean():.2f} (expected {expected:.2f}), variance "
        f"{sizes.var():.2f} (expected {variance:.2f}), p = {chance:.2g}",
    )
    drawn = np.bincount(np.concatenate(batches), minlength=count)
    spread = len(sizes) * rate * (1 - rate)
    chance = two_sided_chi_square(float(((drawn - len(sizes) * rate) ** 2).sum() / spread), count) if spread else 1.0
    yield Finding("every row is as likely as any other", chance > ALARM, f"p = {chance:.2g}")
    pairs = {"two clients": other, "a round repeated": repeated}
    same = [what for what, those in pairs.items() if all(map(np.array_equal, one, those))]
    yield Finding(
        "no two clients, and no two tries at a round, share samples",
        not same or rate == 1.0,
        f"the same: {', '.join(same)}" if same else "all differ",
    )
