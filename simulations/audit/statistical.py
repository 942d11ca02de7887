"""The statistical audit: what an attacker sees of a row in what is released, as a lower bound of epsilon.

The attacker is the server: it has every client's update, knows all rows but the one that it asks about, and that row's
gradient. The mechanism's numbers are the audit's own (every row in every batch, one step, little noise), because what
is audited is the code: with them an error in it shows, where a run's own noise would hide it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedlora.privacy import certifier, epsilon
from fedlora.privacy.attacks import epsilon_of_mu, mu_from_scores, one_run_epsilon, shares_in_sum
from simulations.audit.findings import ALARM, Finding, flat
from simulations.audit.site import NO_ROWS, Audited, KnownSite

_NOISE = 0.5  # so little that an error in noise or clip shows in a thousand releases
_RELEASES = 2000  # half of them with the row
_ROWS = 8  # of which the one with the largest gradient is asked about
_BATCH = 4  # expected rows of a batch, so that clipping their mean is not clipping each of them
_CANARIES = 1000
_MORE_NOISE = 2.0  # for one run, whose bound is far below the truth: only a small epsilon can be exceeded
_GUESSED = 0.4  # of the canaries
_NOISES = (1.0, 0.25, 0.05)  # parts of the noise that the attacker counts on: with less, alike rows are told apart
_CHANCE = 0.05  # that the bound of one run is above the truth, over all of these guesses
_NUMBERS = 5e7  # float64 numbers of updates that are held at once


def statistical(run: Audited) -> Iterator[Finding]:
    """Two bounds, each beside what the ledger says of the same releases."""
    yield repeated(run)
    yield one_run(run)


def repeated(run: Audited) -> Finding:
    """Many clients that have one row or none: whose update is which."""
    rows = run.data.training_rows(0)[:_ROWS]
    gradients = _gradients(run, rows, 1e9)
    norms = np.linalg.norm(gradients, axis=1)
    canary = int(norms.argmax())
    clip, direction = float(norms[canary]) / _BATCH, gradients[canary] / norms[canary]
    held = [rows[[canary]], NO_ROWS] * (_RELEASES // 2)
    site = run.one_step(held, _BATCH, clip, _NOISE)
    # Noise that clients share moves all scores alike, and hides nothing.
    scores = np.concatenate([part @ direction for part in _updates(site, len(held))])
    delta, claimed = run.config.privacy.delta, _claimed(site)
    mu = mu_from_scores(scores[1::2], scores[::2], alarm=ALARM)
    seen = epsilon_of_mu(mu, delta)
    return Finding(
        "repeated releases with and without a row differ by no more than epsilon allows",
        seen <= claimed,
        f"as a Gaussian mechanism epsilon at least {seen:.3g} by {len(scores):,} releases (chance of error {ALARM:g}), "
        f"{claimed:.3g} by the ledger, at delta {delta:g}",
    )


def one_run(run: Audited) -> Finding:
    """One client with half of many rows, drawn at random: which it has (Steinke, Nasr & Jagielski 2023)."""
    every = np.arange(len(run.data.corpus.train.texts))
    first = _gradients(run, every[:_ROWS], 1e9)
    clip = float(np.median(np.linalg.norm(first, axis=1)))
    rows = every[: min(_CANARIES, max(_ROWS, int(_NUMBERS / first.shape[1])))]
    gradients = _gradients(run, rows, clip)
    there = np.random.default_rng().random(len(rows)) < 0.5
    site = run.one_step([rows[there]], len(rows), clip, _MORE_NOISE)
    (released,) = _updates(site, 1)
    guessed, correct = int(_GUESSED * len(rows)) // 2, 0
    for part in _NOISES:
        order = np.argsort(shares_in_sum(released[0], gradients, part * _MORE_NOISE * clip))
        right = int(there[order[len(rows) - guessed :]].sum() + (~there[order[:guessed]]).sum())
        correct = max(correct, right)
    delta, claimed = run.config.privacy.delta, _claimed(site)
    seen = one_run_epsilon(len(rows), 2 * guessed, correct, delta=delta, alarm=_CHANCE / len(_NOISES))
    return Finding(
        "one run tells no more of which rows are in it than epsilon allows",
        seen <= claimed,
        f"epsilon at least {seen:.3g} by {correct} of {2 * guessed} guesses right on {len(rows):,} canaries, the best "
        f"of {len(_NOISES)} attempts (chance of error {_CHANCE:g}), {claimed:.3g} by the ledger, at delta {delta:g}",
    )


def _gradients(run: Audited, rows: NDArray[np.int64], clip: float) -> NDArray[np.float64]:
    """Return each row's clipped gradient, all trained tensors together, [rows, P]."""
    site = run.one_step([rows[[at]] for at in range(len(rows))], 1, clip)
    return np.concatenate(list(_updates(site, len(rows))))


def _updates(site: KnownSite, clients: int) -> Iterator[NDArray[np.float64]]:
    """Return what clients' optimizers were given, as many at a time as memory has room for, [clients, P]."""
    at_once = max(1, int(_NUMBERS / _size(site)))
    for first in range(0, clients, at_once):
        part = range(first, min(first + at_once, clients))
        yield np.stack([flat(one) for one in site.released(part)])


def _size(site: KnownSite) -> int:
    """Return P, the numbers of a client at most."""
    return sum(int(np.prod(spec.shape)) for spec in site.worker.loaded.model.specs.values())


def _claimed(site: KnownSite) -> float:
    """Return the epsilon of what a client's ledger says that it released: one step that takes every row."""
    (entry,) = site.ledger(0).entries()
    assert (entry.use.steps, entry.use.sample_rate) == (1, 1.0), "whose noise is that of a Gaussian mechanism"
    return epsilon([entry.use], target_delta=site.config.privacy.delta, accountant=certifier(site.config))
