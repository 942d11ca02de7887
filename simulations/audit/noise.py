"""The audit of the noise: as large as the ledger says, on every number, of every step, and nobody else's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simulations.audit.findings import ALARM, Finding, flat, two_sided_chi_square
from simulations.audit.site import NO_ROWS, Audited

_NUMBERS = 60_000  # numbers of noise that are measured: noise times 0.97 shows at ten standard deviations


def noise(run: Audited, roles_of: int) -> Iterator[Finding]:
    """Rounds of clients without rows: noise alone, as large as the ledger says, on every number, of every step."""
    site = run.site([NO_ROWS] * 4096)
    first = site.released([0, 1], roles_of)
    size = sum(value.size for value in first[0].values())
    clients = int(np.clip(-(-_NUMBERS // size), 2, 4096))
    released = [*first, *site.released(range(2, clients), roles_of)] if clients > 2 else first
    use = site.ledger(0).entries()[0].use
    deviation = use.noise_multiplier * site.mechanism.max_grad_norm * np.sqrt(use.steps)
    standard = {name: np.stack([one[name].ravel() for one in released]) / deviation for name in first[0]}
    worst, least = "", 1.0
    for name, values in standard.items():
        chance = two_sided_chi_square(float((values**2).sum()), values.size)
        if chance <= least:
            worst, least = name, chance
    yield Finding(
        "every tensor has the noise of the ledger, also where no row was sampled",
        least > ALARM / len(standard),
        f"{len(standard)} tensors; least likely {worst}: standard deviation {standard[worst].std():.4f} of what is "
        f"claimed, p = {least:.2g}",
    )
    total = np.concatenate(list(standard.values()), axis=1)
    chance = two_sided_chi_square(float((total**2).sum()), total.size)
    yield Finding(
        "the noise is as large as the ledger says",
        chance > ALARM,
        f"{total.size:,} numbers: standard deviation {total.std():.4f} of what is claimed, p = {chance:.2g}",
    )
    again = flat(site.released([0], roles_of)[0]) / deviation
    pairs = {"two clients": total[1], "a round repeated": again}
    alike = {what: abs(float(total[0] @ other)) / np.sqrt(size) for what, other in pairs.items()}
    yield Finding(
        "no two clients, and no two tries at a round, share noise",
        max(alike.values()) < 6.0,
        ", ".join(f"{what}: correlation {value:.2f} standard deviations" for what, value in alike.items()),
    )
