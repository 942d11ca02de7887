"""``fedlora tune``: the learning rate that does best on dev rows, looked for in one process within a stated time.

A search along rates that are half a decade apart: from the one that would be taken, to the side that is better, until
both neighbours are worse; then between. Each rate gets as many rounds as the time allows, all of them the same number.
Test rows are not read.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from rich.console import Console
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError
from fedlora.messages import first_line
from fedlora.reports.format import human_time
from fedlora.runs.folder import RunFolder
from fedlora.server import FederationError
from fedlora.tasks import TASKS
from simulations.in_process import InProcess, Resident
from simulations.plan import Plan

_STEP = 10**0.5  # from one rate to the next
_FARTHEST = 10  # exponent, up and down
_LEARNED = 0.99  # of the loss before training
_TRIALS = 5  # that the time should allow for: a rate, its neighbours, and two between
FILE = "tune.json"


@dataclass(frozen=True)
class Trial:
    """A rate that was tried.

    Attributes:
        rate: The rate.
        rounds: Rounds that it trained.
        value: The measure on dev rows, or on the rows that clients hold out; None: it did not train.
        loss: The loss on them.
        seconds: How long it took.
        learned: Whether it took at least a hundredth off the loss before training.
        error: Why it did not train.
    """

    rate: float
    rounds: int
    value: float | None
    loss: float | None
    seconds: float
    learned: bool = True
    error: str = ""


def best_of(trials: Mapping[float, Trial], higher_is_better: bool, rows: int) -> float | None:
    """Return the exponent of the best rate; None where none learned.

    What lies within a standard error of the best share of rows is told apart by the loss, which is less a matter of
    chance on few rows.

    Args:
        trials: What was tried, by exponent.
        higher_is_better: Whether the measure is to be large, as a share of rows is.
        rows: Rows that it is measured on.
    """
    sign = 1 if higher_is_better else -1
    values = {key: sign * one.value for key, one in trials.items() if one.value is not None and one.learned}
    if not values:
        return None
    most = max(values.values())
    error = math.sqrt(most * (1 - most) / rows) if higher_is_better and 0 <= most <= 1 else 0.0
    near = [key for key, value in values.items() if value >= most - error]
    return min(near, key=lambda key: (math.inf if trials[key].loss is None else trials[key].loss, abs(key)))


def next_exponent(trials: Mapping[float, Trial], best: float | None) -> float | None:
    """Return the next exponent of the rate to try; None when those beside the best are tried, in half steps too.

    Args:
        trials: What was tried, by exponent.
        best: The best of them; None where none learned.
    """
    if not trials:
        return 0.0
    if best is None:
        small = [key for key, one in trials.items() if one.value is not None]  # trained, and did not learn
        following = max(small) + 1 if small else min(trials) - 2
        return following if following not in trials and abs(following) <= _FARTHEST else None
    steps: tuple[float, ...] = (1.0,) if best == round(best) else ()
    for step in (*steps, 0.5):
        for side in (-step, step):
            if best + side not in trials:
                return best + side
    return None


@final
class Search:
    """The search of one configuration.

    Args:
        plan: The plan of the run, on dev rows.
        minutes: The time that it may take.
        console: Where progress goes.
        clock: Returns seconds.
    """

    def __init__(
        self, plan: Plan, minutes: float, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.console, self.clock = plan, console, clock
        self.task = TASKS[plan.config.task]
        self.trials: dict[float, Trial] = {}
        self.finished = False
        """Whether there was no rate left to try when the search ended."""
        self.before: float | None = None
        """The loss before training; None where only those are measured that have trained."""
        self.rounds = 0
        """Rounds of each trial; 0: not known yet."""
        self._started = clock()
        self._end = self._started + 60 * minutes
        self._resident = Resident(os.cpu_count() or 1, plan.shards[0].cards if plan.shards else 1)

    @property
    def best(self) -> float | None:
        """The exponent of the best rate; None where none learned."""
        return best_of(self.trials, self.task.measure.higher_is_better, measured_rows(self.plan))

    def step(self) -> bool:
        """Try one more rate; return whether there was one to try, and time for it."""
        exponent = next_exponent(self.trials, self.best)
        self.finished = exponent is None
        longest = max((one.seconds for one in self.trials.values()), default=0.0)
        if exponent is None or self.clock() + longest > self._end:
            return False
        self.trials[exponent] = self._try(float(f"{self.plan.config.train.learning_rate * _STEP**exponent:.2g}"))
        return True

    def record(self) -> dict[str, Any]:
        """Return what was found so far as plain values."""
        return {
            "measure": self.plan.measure,
            "default": self.plan.config.train.learning_rate,
            "best": None if self.best is None else self.trials[self.best].rate,
            "finished": self.finished,
            "trials": [asdict(self.trials[key]) for key in sorted(self.trials)],
        }

    def _try(self, rate: float) -> Trial:
        config = self.plan.config
        config = replace(config, train=replace(config.train, learning_rate=rate))
        started, done, error = self.clock(), 0, ""
        metrics: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            federation = self._resident.federation(config, self.plan.data, folder)
            if not self.trials and not self.plan.strategy.has_personal:
                self.before = federation.measure(0)["loss"]
            try:
                done = self._train(federation, config)
                metrics = federation.measure(done)
            except FederationError as failed:
                error = first_line(failed)
        value, loss = metrics.get(self.task.measure.name), metrics.get("loss")
        finite = value is not None and math.isfinite(value)
        learned = self.before is None or loss is None or loss < _LEARNED * self.before
        trial = Trial(rate, done, value if finite else None, loss, self.clock() - started, finite and learned, error)
        shown = f"{self.plan.measure.replace('_', ' ')} {value:.4f}" if finite else f"does not train: {error}"
        shown += "" if learned or not finite else ", hardly learned"
        self.console.print(
            f"rate {rate:g}  {shown}  after {done} round(s)  {human_time(trial.seconds)}, "
            f"{human_time(max(0.0, self._end - self.clock()))} left",
            markup=False,
        )
        return trial

    def _train(self, federation: InProcess, config: Config) -> int:
        """Train the rounds of a trial; the first trial finds out how many the time allows for."""
        number = 0
        while number < (self.rounds or config.rounds):
            number += 1
            before = self.clock()
            federation.train(number)
            if not self.rounds:
                share = (self._end - before) / _TRIALS
                self.rounds = max(1, min(config.rounds, int(share / max(1e-9, self.clock() - before))))
                if self.rounds < config.rounds:
                    self.console.print(
                        f"each rate is tried for {self.rounds} of {config.rounds} rounds, as many as the time allows; "
                        "--minutes gives them more",
                        markup=False,
                    )
        return number


def tune(plan: Plan, minutes: float, asked: str, console: Console) -> int:
    """Search, fill the folder, and print what was found with the command that takes it.

    Args:
        plan: The plan of the run, of a configuration from :func:`simulations.options.for_tuning`.
        minutes: The time that it may take.
        asked: The command of the run that it is for, without the learning rate.
        console: Where to.

    Returns:
        0; 1 where no rate learned.

    Raises:
        ConfigError: The time is none.
    """
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g}: must be above 0.")
    config = plan.config
    kind = "rows that clients hold out" if plan.strategy.has_personal else "dev rows"
    console.print(
        f"looking for train.learning-rate for at most {minutes:g} minute(s), on {measured_rows(plan):,} {kind}"
    )
    with RunFolder.opened(config) as folder:
        search = Search(plan, minutes, console)
        while search.step():
            folder.write_json(FILE, search.record())
        folder.write_json(FILE, search.record())
        best = search.best
    console.print(_table(search, best))
    if config.privacy.mode == "dp":
        console.print("note: a rate chosen on rows costs privacy that no epsilon of the run holds")
    if best is None:
        console.print("no rate learned; the lines above say why")
        return 1
    if not search.finished:
        console.print("note: the time was over before both neighbours of the best had been tried; --minutes gives more")
    console.print(f"tune folder: {folder.path}", markup=False)
    console.print(f"next: {asked} -c train.learning-rate={search.trials[best].rate:g}", markup=False)
    return 0


def measured_rows(plan: Plan) -> int:
    """Return the number of rows that a rate is measured on: those that clients hold out, or dev rows."""
    return sum(map(len, plan.data.holdout)) if plan.strategy.has_personal else len(plan.data.corpus.splits["dev"])


def _table(search: Search, best: float | None) -> RichTable:
    """Return the rates that were tried, the best of them marked."""
    table = RichTable(title=f"learning rates of {search.plan.config.strategy.name} by {search.plan.measure}")
    for column in ("rate", search.plan.measure.replace("_", " "), "loss", "rounds", "seconds", ""):
        table.add_column(column, justify="right")
    for key in sorted(search.trials):
        one = search.trials[key]
        value, loss = ("-" if number is None else f"{number:.4f}" for number in (one.value, one.loss))
        mark = "best" if key == best else "as by default" if key == 0 else ""
        table.add_row(f"{one.rate:g}", value, loss, str(one.rounds), f"{one.seconds:.1f}", mark)
    return table
