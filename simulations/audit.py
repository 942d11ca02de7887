"""``fedlora audit``: whether the shipped training path does what its epsilon assumes.

Everything is measured on what trainers let out: each check builds clients whose rows it knows, has the real trainer
train them (sampler, engine, noise, ledger and all), and looks at the tensors that leave or are kept. What is claimed is
taken from the ledger entries that the trainer wrote. Checks are deterministic, or have a chance of a false alarm of
about one in a million. They run on the run's own model, method and strategy, in float64, with plain SGD of rate 1, so
that what a client's tensors moved by is what its optimizer was given. Penalties, which see no data, are switched off:
they would hide what comes from rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from clients.trainer import Job, Request, Trainer, Update
from fedlora import engine as engine_package
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.methods import S2Options, TensorSpec
from fedlora.privacy import Ledger, Mechanism, epsilon
from fedlora.roles import Role, with_role
from simulations.setup import build_strategy
from strategies import STRATEGIES, RoleStrategy

_ALARM = 1e-6  # chance of a false alarm of each statistical check
_NUMBERS = 60_000  # numbers of noise that are looked at: noise times 0.97 shows at ten standard deviations
_BATCHES = 400
_ROWS = 8
_NO_ROWS = np.zeros(0, dtype=np.int64)

Arrays = dict[str, NDArray[np.floating]]


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


def audit(config: Config, data: FederatedData) -> list[Finding]:
    """Run all checks on a configuration whose ``privacy`` keys are all given."""
    with TemporaryDirectory() as folder:
        run = _Run(config, data, Path(folder))
        found = [*_rounds(run), _order(run)]
        if not all(finding.passed for finding in found):
            return found  # nothing is claimed that the rest could be compared with
        period = STRATEGIES[config.strategy.name].period
        for number in range(1, period + 1):
            turn = f", roles of round {number}" if period > 1 else ""
            for one in (*_sensitivity(run, number), *_noise(run, number)):
                found.append(replace(one, name=one.name + turn))
        return [*found, *_sampler(run)]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings."""
    table = RichTable(title="audit")
    for column in ("check", "holds", "told"):
        table.add_column(column)
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.passed else "NO", finding.told)
    console.print(table)


class _Run:
    """The run that is audited, and the trainer that all checks use.

    Args:
        config: Its configuration.
        data: Its data.
        folder: Where clients keep what is theirs, check by check.
    """

    def __init__(self, config: Config, data: FederatedData, folder: Path) -> None:
        self.config = config
        self.data = data
        self.folder = folder
        self.job = Job({}, data, "")
        self.trainer = Trainer(lambda: self.job, max(1, (os.cpu_count() or 1) // 2))

    def site(self, rows: Sequence[NDArray[np.int64]], steps: int = 2, batch: int = 0, **privacy: Any) -> _Site:
        """Give the trainer clients with these rows; the clients before are gone.

        Args:
            rows: Training rows of each client.
            steps: Local steps of a round.
            batch: Expected batch size; 0: the run's.
            privacy: Changed ``privacy`` keys.
        """
        config = self.config
        config = replace(
            config,
            engine=replace(config.engine, dtype="float64"),
            train=replace(
                config.train,
                local_steps=steps,
                local_epochs=1,
                batch_size=batch or config.train.batch_size,
                optimizer="sgd",
                learning_rate=1.0,
                momentum=0.0,
                weight_decay=0.0,
                schedule="constant",
            ),
            privacy=replace(config.privacy, **{"epsilon": 0.0, **privacy}),
        ).with_options(S2Options(sparsity=0.0))
        dealt = replace(self.data, clients=tuple(rows), holdout=(_NO_ROWS,) * len(rows), names=())
        self.job = Job(config.to_flat(), dealt, mkdtemp(dir=self.folder))
        self.trainer.renew()
        return _Site(config, self.trainer)


@dataclass(frozen=True)
class _Site:
    """Clients whose rows are known.

    Attributes:
        config: The configuration that they train with.
        trainer: The trainer, at work on them.
    """

    config: Config
    trainer: Trainer

    @property
    def mechanism(self) -> Mechanism:
        """What each client does in a round."""
        return Mechanism.of(self.config)

    @property
    def strategy(self) -> RoleStrategy:
        """The run's strategy."""
        return build_strategy(self.config, self.trainer.loaded.specs)

    def ledger(self, client: int) -> Ledger:
        """Return a client's ledger."""
        assert self.trainer.loaded.accounts is not None, "audited under DP"
        return self.trainer.loaded.accounts.ledger(client)

    def train(self, clients: Sequence[int], number: int = 1, roles_of: int = 1) -> list[Update]:
        """Train a pack for a round, with the roles of a round."""
        strategy = self.strategy
        sent = {name: self.start(spec, name) for name, spec in strategy.exchanged(roles_of).items()}
        heads = tuple(self.ledger(client).head() for client in clients)
        return self.trainer.train(Request(number, tuple(clients), strategy.all_roles(roles_of), sent, heads))

    def start(self, spec: TensorSpec, name: str) -> NDArray[np.floating]:
        """Return a tensor moved away from its start, where factors that are zero hide gradients."""
        return self.trainer.initial[name] + 0.1 * np.random.default_rng(0).standard_normal(spec.shape)

    def released(self, clients: Sequence[int], roles_of: int = 1, number: int = 1) -> list[Arrays]:
        """Return, for each client, what its optimizer was given over a round, times the expected batch size.

        Of all trained tensors: those that leave, and those that the site keeps.

        Raises:
            RuntimeError: A client did not train.
        """
        specs, store = self.trainer.loaded.specs, self.trainer.personal
        own = with_role(specs, self.strategy.all_roles(roles_of), Role.PERSONAL)
        for client in clients:
            if own:
                store.save(client, number - 1, {name: self.start(spec, name) for name, spec in own.items()})
        found = []
        for update in self.train(clients, number, roles_of):
            if update.error:
                raise RuntimeError(update.error)
            kept = (store.load(update.client, number + 1) or {}) if own else {}
            after = {**update.tensors, **{name: kept[name] for name in own}}
            scale = self.mechanism.expected_batch_size
            found.append({name: (self.start(specs[name], name) - value) * scale for name, value in after.items()})
        return found


# -- rounds: the ledger, and what leaves ------------------------------------------------------------------


def _rounds(run: _Run) -> Iterator[Finding]:
    site = run.site([run.data.training_rows(client) for client in (0, 1)])
    updates = [update for number in (1, 2) for update in site.train((0, 1), number)]
    site.trainer.renew()  # it remembers nothing
    updates += site.train((0, 1), 3)
    errors = [update.error for update in updates if update.error]
    taken = {client: sum(u.steps for u in updates if u.client == client) for client in (0, 1)}
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
    told = [u.client for u in updates if u.examples or u.loss is not None]
    yield Finding("no number of rows and no loss leaves", not told, f"{len(updates)} updates looked at")
    heads = [update.ledger_head for update in updates if update.client == 0]
    known = [entry.hash for entry in site.ledger(0).entries()]
    yield Finding(
        "each update names the entry that pays for it", heads == known[-len(heads) :], f"{len(heads)} updates"
    )


def _order(run: _Run) -> Finding:
    """With a disk that fails no update may come out."""
    name = "no update leaves before its ledger entry is on the disk"
    site = run.site([run.data.training_rows(0)])
    site.train((0,))
    with _failing_disk():
        try:
            updates = [update for update in site.train((0,), 2) if not update.error]
        except OSError:
            return Finding(name, True, "with a failing disk nothing left")
    return Finding(name, not updates, f"with a failing disk {len(updates)} update(s) left")


# -- one step on known rows -------------------------------------------------------------------------------


def _sensitivity(run: _Run, roles_of: int) -> Iterator[Finding]:
    """Sums over known rows with next to no noise, every row in every batch, and what one row changes in them."""
    lengths = np.array([len(text) for text in run.data.corpus.train.texts])
    order = np.argsort(lengths, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, _ROWS).astype(int)]  # from the shortest to the longest
    singles = [np.array([row]) for row in rows]
    without = [np.setdiff1d(rows, [row]) for row in rows]

    def sums(held: Sequence[NDArray[np.int64]], clip: float) -> NDArray[np.float64]:
        noise = {"noise_multiplier": 1e-12 / max(1.0, clip), "max_grad_norm": clip}
        site = run.site(held, steps=1, batch=_ROWS, client_size=_ROWS, **noise)
        # One after the other: rows that are coupled would be so across clients, too.
        return np.stack([_flat(site.released([client], roles_of)[0]) for client in range(len(held))])

    norms = np.linalg.norm(sums(singles, 1e9), axis=1)
    clip = float(np.median(norms))
    each = sums(singles, clip)
    off = float(np.abs(np.linalg.norm(each, axis=1) - np.minimum(norms, clip)).max() / clip)
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


def _noise(run: _Run, roles_of: int) -> Iterator[Finding]:
    """Rounds of clients without rows: noise alone, as large as the ledger says, on every number, of every step."""
    site = run.site([_NO_ROWS] * 4096)
    first = site.released([0, 1], roles_of)
    size = sum(value.size for value in first[0].values())
    clients = int(np.clip(-(-_NUMBERS // size), 2, 4096))
    released = [*first, *site.released(range(2, clients), roles_of)] if clients > 2 else first
    use = site.ledger(0).entries()[0].use
    deviation = use.noise_multiplier * site.mechanism.max_grad_norm * np.sqrt(use.steps)
    standard = {name: np.stack([one[name].ravel() for one in released]) / deviation for name in first[0]}
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
    again = _flat(site.released([0], roles_of)[0]) / deviation
    pairs = {"two clients": total[1], "a round repeated": again}
    alike = {what: abs(float(total[0] @ other)) / np.sqrt(size) for what, other in pairs.items()}
    yield Finding(
        "no two clients, and no two tries at a round, share noise",
        max(alike.values()) < 6.0,
        ", ".join(f"{what}: correlation {value:.2f} standard deviations" for what, value in alike.items()),
    )


# -- batches ----------------------------------------------------------------------------------------------


def _sampler(run: _Run) -> Iterator[Finding]:
    """Batches that the trainer gives the engine: binomial sizes, every row alike, nobody's the same."""
    count = len(run.data.corpus.train)
    site = run.site([np.arange(count)] * 2, steps=_BATCHES // 2)
    with _seen_batches() as seen:
        for number in (1, 1, 2):  # the first twice
            site.train((0, 1), number)
    (one, other), (repeated, _), (later, _) = seen
    batches, rate = [*one, *later], site.ledger(0).entries()[0].use.sample_rate
    sizes = np.array([len(batch) for batch in batches])
    expected, variance = count * rate, count * rate * (1 - rate)
    shift = (sizes.mean() - expected) / np.sqrt(max(variance, 1e-12) / len(sizes))
    if variance:
        chance = _two_sided_chi_square(float(((sizes - expected) ** 2).sum() / variance), len(sizes))
    else:  # every row in every batch
        chance = float((sizes == count).all())
    yield Finding(
        "batch sizes are binomial at the ledger's sample rate",
        abs(shift) < 6.0 and chance > _ALARM,
        f"{len(sizes)} batches of {count} rows: mean {sizes.mean():.2f} (expected {expected:.2f}), variance "
        f"{sizes.var():.2f} (expected {variance:.2f}), p = {chance:.2g}",
    )
    drawn = np.bincount(np.concatenate(batches), minlength=count)
    spread = len(sizes) * rate * (1 - rate)
    chance = _two_sided_chi_square(float(((drawn - len(sizes) * rate) ** 2).sum() / spread), count) if spread else 1.0
    yield Finding("every row is as likely as any other", chance > _ALARM, f"p = {chance:.2g}")
    pairs = {"two clients": other, "a round repeated": repeated}
    same = [what for what, those in pairs.items() if all(map(np.array_equal, one, those))]
    yield Finding(
        "no two clients, and no two tries at a round, share samples",
        not same or rate == 1.0,
        f"the same: {', '.join(same)}" if same else "all differ",
    )


def _flat(tensors: Arrays) -> NDArray[np.float64]:
    return np.concatenate([value.ravel() for value in tensors.values()])


def _two_sided_chi_square(value: float, degrees: int) -> float:
    """Return how likely a value is as far from its expectation, under chi-square with so many degrees of freedom."""
    from scipy.stats import chi2

    return float(2 * min(chi2.cdf(value, degrees), chi2.sf(value, degrees)))


@contextmanager
def _seen_batches() -> Iterator[list[list[Sequence[NDArray[np.int64]]]]]:
    """Keep the batches of each pack that a trainer gives the engine, and have it train on none of their rows."""
    seen: list[list[Sequence[NDArray[np.int64]]]] = []
    real = engine_package.train_pack

    def train_pack(engine: Any, works: Any, common: Any, train: Any, private: Any = None) -> Any:
        if private is not None:
            seen.append([work.batches for work in works])
            works = [replace(work, batches=[_NO_ROWS] * len(work.batches)) for work in works]
        return real(engine, works, common, train, private)

    engine_package.train_pack = train_pack  # type: ignore[assignment]
    try:
        yield seen
    finally:
        engine_package.train_pack = real


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
