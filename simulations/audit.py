"""``fedlora audit``: whether the shipped training path does what its epsilon assumes.

Every check is deterministic or has a chance of a false alarm of about one in a million, and runs the real trainer,
sampler, engine and ledger on the run's own model, method and strategy, in float64. What is claimed is taken from an
entry that the trainer wrote into a ledger. Penalties, which see no data, are switched off: they would hide what comes
from rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from clients.trainer import Job, Request, Trainer, Update
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.privacy import Entry, Mechanism, PrivateRandom, epsilon
from fedlora.roles import Role, with_role
from simulations.setup import build_strategy

_ALARM = 1e-6  # chance of a false alarm of each statistical check
_NUMBERS = 200_000  # numbers of noise that are looked at: noise times 0.99 shows at 4.5 standard deviations
_BATCHES = 400
_ROWS = 8


@dataclass(frozen=True)
class Finding:
    """What a check came to.

    Attributes:
        name: What was checked.
        passed: Whether it holds.
        told: The numbers behind it.
    """

    name: str
    passed: bool
    told: str


def audited(config: Config) -> Config:
    """Return the configuration that is audited: the run's, in float64, two steps a round, without penalties."""
    return replace(
        config,
        engine=replace(config.engine, dtype="float64"),
        train=replace(config.train, local_steps=2, local_epochs=1),
        s2=replace(config.s2, sparsity=0.0, orthogonality=0.0),
    )


def audit(config: Config, data: FederatedData) -> list[Finding]:
    """Run all checks on a configuration whose ``privacy`` keys are all given."""
    config = audited(config)
    with TemporaryDirectory() as folder:
        job = Job(config.to_flat(), data, folder)
        return _Audit(job).findings()


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings."""
    table = RichTable(title="audit")
    for column in ("check", "holds", "told"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.passed else "NO", finding.told)
    console.print(table)


class _Audit:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.trainer = Trainer(lambda: job, max(1, (os.cpu_count() or 1) // 2))
        self.config = self.trainer.loaded.config
        self.mechanism = Mechanism.of(self.config)
        self.strategy = build_strategy(self.config, self.trainer.loaded.specs)
        assert self.trainer.loaded.accounts is not None, "audited under DP"
        self.accounts = self.trainer.loaded.accounts

    def findings(self) -> list[Finding]:
        found = [*self._rounds(), self._order()]
        if not all(finding.passed for finding in found):
            return found  # nothing is claimed that the rest could be compared with
        return [*found, *self._sensitivity(), *self._noise(), *self._sampler()]

    # -- the trainer's rounds: ledger and what leaves -----------------------------------------------------

    def _train(self, number: int, clients: tuple[int, ...]) -> list[Update]:
        sent = self.strategy.initial(self.trainer.initial)
        return self.trainer.train(Request(number, clients, self.strategy.all_roles(1), sent))

    def _entries(self, client: int) -> list[Entry]:
        return self.accounts.ledger(client).entries()

    @cached_property
    def _claimed(self) -> Entry:
        """A ledger entry that the trainer wrote."""
        return self._entries(0)[0]

    def _rounds(self) -> Iterator[Finding]:
        updates = [update for number in (1, 2) for update in self._train(number, (0, 1))]
        self.trainer = Trainer(lambda: self.job, self.trainer.threads)  # one that was restarted remembers nothing
        updates += self._train(3, (0, 1))
        errors = [update.error for update in updates if update.error]
        taken = {client: sum(u.steps for u in updates if u.client == client) for client in (0, 1)}
        charged = {client: sum(entry.use.steps for entry in self._entries(client)) for client in (0, 1)}
        yield Finding(
            "the ledger holds every step of every round",
            not errors and taken == charged and min(taken.values()) == 3 * self.mechanism.steps,
            f"steps taken {taken}, in the ledger {charged}" + (f"; {errors[0]}" if errors else ""),
        )
        delta = self.config.privacy.delta
        spent = [
            epsilon([e.use for e in self._entries(0)][:n], target_delta=delta, accountant="rdp") for n in (1, 2, 3)
        ]
        grows = len(spent) == 3 and spent[0] < spent[1] < spent[2]
        yield Finding("epsilon composes over rounds", grows, ", ".join(f"{value:.4g}" for value in spent))
        told = [u.client for u in updates if u.examples or u.loss is not None]
        yield Finding("no number of rows and no loss leaves", not told, f"{len(updates)} updates looked at")
        heads = [update.head for update in updates if update.client == 0]
        known = [entry.hash for entry in self._entries(0)]
        yield Finding(
            "each update names the entry that pays for it", heads == known[-len(heads) :], f"{len(heads)} updates"
        )

    def _order(self) -> Finding:
        """With a disk that fails no update may come out."""
        name = "no update leaves before its ledger entry is on the disk"
        with _failing_disk():
            try:
                updates = [update for update in self._train(4, (0,)) if not update.error]
            except OSError:
                return Finding(name, True, "with a failing disk nothing left")
        return Finding(name, not updates, f"with a failing disk {len(updates)} update(s) left")

    # -- one step on chosen rows --------------------------------------------------------------------------

    @cached_property
    def _start(self) -> dict[str, NDArray[np.floating]]:
        """Trained tensors, moved away from the start, where factors that are zero hide gradients."""
        trained = with_role(self.trainer.loaded.specs, self.strategy.all_roles(1), Role.SHARED, Role.PRIVATE)
        generator = np.random.default_rng(0)
        return {
            name: self.trainer.initial[name] + 0.1 * generator.standard_normal(spec.shape)
            for name, spec in trained.items()
        }

    def _released(
        self, batches: Sequence[Sequence[NDArray[np.int64]]], mechanism: Mechanism, rounds: Sequence[int] = ()
    ) -> list[dict[str, NDArray[np.float64]]]:
        """Return what clients' gradients summed up to, as the optimizer saw it, times the expected batch size.

        Args:
            batches: Rows of each step, by client.
            mechanism: The mechanism.
            rounds: Round whose randomness each client draws on; empty: all on that of the first.
        """
        from fedlora.config import TrainConfig
        from fedlora.engine import ClientWork, train_pack
        from fedlora.privacy.step import PrivateStep

        loaded, start = self.trainer.loaded, self._start
        common = {name: value for name, value in self.trainer.initial.items() if name not in start}
        works = [ClientWork(client, loaded.examples["train"], 1, own, start) for client, own in enumerate(batches)]
        randoms = [self.accounts.random(k, number) for k, number in enumerate(rounds or [1] * len(works))]
        train = TrainConfig(optimizer="sgd", learning_rate=1.0)
        results = train_pack(loaded.engine, works, common, train, PrivateStep(mechanism, randoms))
        scale = self.mechanism.expected_batch_size
        return [{name: (start[name] - value) * scale for name, value in r.tensors.items()} for r in results]

    def _sensitivity(self) -> Iterator[Finding]:
        """Sums over chosen rows without noise, and what one row changes in them."""
        lengths = self.trainer.loaded.examples["train"].lengths
        order = np.argsort(lengths, kind="stable")
        rows = order[np.linspace(0, len(order) - 1, _ROWS).astype(int)]  # from the shortest to the longest
        silent = replace(self.mechanism, noise_multiplier=0.0)

        def sums(chosen: Sequence[Sequence[int]], clip: float) -> NDArray[np.float64]:
            # One after the other: rows that are coupled would be so across clients, too.
            mechanism = replace(silent, max_grad_norm=clip)
            batches = [np.array(one, dtype=np.int64) for one in chosen]
            return np.stack([_flat(self._released([[batch]], mechanism)[0]) for batch in batches])

        singles = [[int(row)] for row in rows]
        norms = np.linalg.norm(sums(singles, 1e12), axis=1)
        clip = float(np.median(norms))
        each = sums(singles, clip)
        wanted = np.minimum(norms, clip)
        off = float(np.abs(np.linalg.norm(each, axis=1) - wanted).max() / clip)
        yield Finding(
            "a row's gradient, all tensors together, is clipped to C",
            off < 1e-4,
            f"norms {norms.min():.3g} to {norms.max():.3g}, C {clip:.3g}: off by {off:.1e} of C at most",
        )
        everything = [int(row) for row in rows]
        without = [[row for row in everything if row != gone] for gone in everything]
        whole, *parts = sums([everything, *without], clip)
        change = max(float(np.linalg.norm(whole - part)) for part in parts) / clip
        yield Finding("removing one row changes the sum by at most C", change <= 1 + 1e-6, f"{change:.4f} C")
        gap = float(np.linalg.norm(whole - each.sum(0)) / np.linalg.norm(whole))
        yield Finding(
            "a batch's sum is that of its rows, by the expected batch size whatever their number",
            gap < 1e-6,
            f"off by {gap:.1e}",
        )

    def _noise(self) -> Iterator[Finding]:
        """Steps without rows: noise alone, as large as the ledger says, on every number, of every step."""
        use = self._claimed.use
        size = sum(value.size for value in self._start.values())
        clients = int(np.clip(-(-_NUMBERS // size), 2, 4096))
        empty = [np.zeros(0, dtype=np.int64)] * use.steps
        released = self._released([empty] * clients, self.mechanism, range(1, clients + 1))
        deviation = use.noise_multiplier * self.mechanism.max_grad_norm * np.sqrt(use.steps)
        standard = {name: np.stack([one[name].ravel() for one in released]) / deviation for name in self._start}
        worst, least = "", 1.0
        for name, values in standard.items():
            chance = _two_sided_chi_square(float((values**2).sum()), values.size)
            if chance <= least:
                worst, least = name, chance
        yield Finding(
            "every tensor has the noise of the ledger, also where no row was sampled",
            least > _ALARM / len(standard),
            f"{len(standard)} tensors; least likely {worst}: standard deviation {standard[worst].std():.4f} of what is "
            f"claimed, p = {least:.2g}",
        )
        total = np.concatenate(list(standard.values()), axis=1)
        chance = _two_sided_chi_square(float((total**2).sum()), total.size)
        yield Finding(
            "the noise is as large as the ledger says",
            chance > _ALARM,
            f"{total.size:,} numbers: standard deviation {total.std():.4f} of what is claimed, p = {chance:.2g}",
        )
        # The same round of two clients, and the same round again.
        again = self._released([empty, empty], self.mechanism), self._released([empty, empty], self.mechanism)
        flat = [_flat(one) / deviation for part in again for one in part]
        pairs = {"two clients": (0, 1), "a round repeated": (0, 2)}
        alike = {what: abs(float(flat[i] @ flat[j])) / np.sqrt(size) for what, (i, j) in pairs.items()}
        yield Finding(
            "no two clients, and no two tries at a round, share noise",
            max(alike.values()) < 6.0,
            ", ".join(f"{what}: correlation {value:.2f} standard deviations" for what, value in alike.items()),
        )

    def _sampler(self) -> Iterator[Finding]:
        """Batches as the trainer draws them: binomial sizes, every row alike, nobody's the same."""
        rate = self._claimed.use.sample_rate
        rows = np.arange(max(200, int(10 / rate)))

        def draw(client: int, number: int) -> list[NDArray[np.int64]]:
            random: PrivateRandom = self.accounts.random(client, number)
            return self.mechanism.batches(random, rows)

        batches = [batch for number in range(-(-_BATCHES // self.mechanism.steps)) for batch in draw(0, number)]
        sizes = np.array([len(batch) for batch in batches])
        count, expected, variance = len(sizes), len(rows) * rate, len(rows) * rate * (1 - rate)
        shift = (sizes.mean() - expected) / np.sqrt(max(variance, 1e-12) / count)
        if variance:
            chance = _two_sided_chi_square(float(((sizes - expected) ** 2).sum() / variance), count)
        else:  # every row in every batch
            chance = float((sizes == len(rows)).all())
        yield Finding(
            "batch sizes are binomial at the ledger's sample rate",
            abs(shift) < 6.0 and chance > _ALARM,
            f"{count} batches of {len(rows)} rows: mean {sizes.mean():.2f} (expected {expected:.2f}), variance "
            f"{sizes.var():.2f} (expected {variance:.2f}), p = {chance:.2g}",
        )
        drawn = np.bincount(np.concatenate(batches), minlength=len(rows))
        spread = count * rate * (1 - rate)
        uneven = (
            _two_sided_chi_square(float(((drawn - count * rate) ** 2).sum() / spread), len(rows)) if spread else 1.0
        )
        yield Finding("every row is as likely as any other", uneven > _ALARM, f"p = {uneven:.2g}")
        pairs = {"two clients": (draw(0, 1), draw(1, 1)), "a round repeated": (draw(0, 1), draw(0, 1))}
        same = [what for what, (one, two) in pairs.items() if all(map(np.array_equal, one, two))]
        yield Finding(
            "no two clients, and no two tries at a round, share samples",
            not same or rate == 1.0,
            f"the same: {', '.join(same)}" if same else "all differ",
        )


def _flat(tensors: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([value.ravel() for value in tensors.values()])


def _two_sided_chi_square(value: float, degrees: int) -> float:
    """Return how likely a value is as far from its expectation, under chi-square with so many degrees of freedom."""
    from scipy.stats import chi2

    return float(2 * min(chi2.cdf(value, degrees), chi2.sf(value, degrees)))


@contextmanager
def _failing_disk() -> Iterator[None]:
    """Make ``fsync`` fail."""
    real = os.fsync

    def fail(_: int) -> None:
        raise OSError(28, "the audit lets the disk fail")

    os.fsync = fail  # type: ignore[assignment]
    try:
        yield
    finally:
        os.fsync = real
