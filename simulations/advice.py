"""Advice on a run under DP: whether it will learn through its noise, and schedules within the budget that would.

What it goes by are runs on SST-2 (``benchmarks/results/signal-to-noise.csv``, ``docs/learning_rates.md``): below a
strategy's signal to noise, or with few steps, they ended near chance. Another model and other rows may need more or
less; that a plan is below what was ever seen to learn is worth saying before hours are spent on it.
"""

from __future__ import annotations

import shlex
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError
from fedlora.plugins import methods_of
from simulations.found import FEW_STEPS, LEARNS_FROM
from simulations.privacy import PrivacyPlan, fit_noise
from simulations.rates import found_rate
from strategies import STRATEGIES

_SAFETY = 1.75  # of the signal to noise of a proposal, over that at which runs began to learn
_SCHEDULES = ((20, 4), (12, 10), (24, 10))  # rounds and steps: of the runs that learned best, and one longer
_HARDLY = 0.65  # of the signal to noise at which runs began to learn: below, a run is said to hardly learn
_FAR = 4.0  # times the rate that was found, or a part of it: there runs ended by chance
_KEPT = "what clients keep to themselves no average rids of noise, and at epsilon 8 none learned on SST-2"
_CURE = "`fedlora plan --suggest` looks for a schedule within the budget that does (docs/learning_rates.md)"
_MOST_EPSILON = 64.0
_UNMEASURED_METHODS = (
    "lora-sb",
    "ravan",
    "dual-lora",
    "vera",
    "dora",
    "nola",
    "randlora",
    "lora-experts",
    "uni-lora",
    "block-lora",
    "flylora",
    "mora",
    "sora",
)
# What signal to noise these learn from was not measured: not proposed.
_UNMEASURED = ("fed-sb", "ravan", "feddpa", "fedlease", "dylora", "lisa", "lora-lego")


def learns_from(config: Config) -> float:
    """Return the signal to noise of all steps of a client from which runs of such a strategy learned."""
    if config.method.name == "s2-lora":
        return LEARNS_FROM["s2-lora"]
    fixed = config.strategy.name in ("ffa-lora", "fedsvd")  # A is not trained
    return LEARNS_FROM["ffa-lora" if fixed else "fedavg"]


def verdict(plan: PrivacyPlan) -> list[str]:
    """Return what is to be said of whether a run will learn, plainly where it will hardly."""
    config, steps = plan.config, plan.config.rounds * plan.mechanism.steps
    ratio, bound = plan.signal_to_noise(plan.steps), learns_from(config)
    if unmeasured := _unmeasured(config):
        return [f"note: signal to noise {ratio:.3g}; what {unmeasured} learns from was not measured"]
    where = f"the signal to noise of a client's steps together is {ratio:.2g}, and on SST-2 runs began to learn at "
    where += f"{bound:g}"
    lines, personal = [], _keeps_noise(config)
    if personal or ratio < _HARDLY * bound:
        lines.append(f"note: this run will hardly learn: {_KEPT if personal else where}. {_CURE}")
    elif ratio < bound:
        lines.append(f"note: this run may hardly learn, it is at the edge of what did: {where}. {_CURE}")
    if steps < FEW_STEPS:
        lines.append(
            f"note: {steps} steps in all are few: on SST-2 none learned with less than {FEW_STEPS}, whatever the "
            "noise; rows that are easier to tell apart need fewer"
        )
    rate, found = config.train.learning_rate, found_rate(config).rate
    if not found / _FAR < rate < found * _FAR:
        far = "below" if rate < found else "above"
        lines.append(
            f"note: train.learning-rate = {rate:g} is far {far} {found:g}: on SST-2 none learned at such rates"
        )
    if not lines:
        lines.append(f"privacy: signal to noise {ratio:.3g} is above {bound:g}, from which such runs learned on SST-2")
    return lines


def _unmeasured(config: Config) -> str:
    """Return the method or the strategy of which it was not measured what it learns from; empty: it was."""
    if config.method.name in _UNMEASURED_METHODS:
        return config.method.name
    return config.strategy.name if config.strategy.name in _UNMEASURED else ""


def _keeps_noise(config: Config) -> bool:
    """Return whether clients keep noised factors to themselves; S2-LoRA's keep r numbers a layer, and learned."""
    return STRATEGIES[config.strategy.name].personal and config.method.name != "s2-lora"


@dataclass(frozen=True)
class Proposal:
    """A schedule under DP.

    Attributes:
        plan: Its privacy.
        ratio: The signal to noise of all steps of a client.
        learns: Whether it is clear of what runs began to learn at.
    """

    plan: PrivacyPlan
    ratio: float
    learns: bool

    @property
    def examples(self) -> int:
        """Rows that the client sampled most is expected to train on, each as often as it comes."""
        return self.plan.mechanism.expected_batch_size * self.plan.steps

    @property
    def keys(self) -> dict[str, Any]:
        """The configuration keys that make it."""
        train = self.plan.config.train
        return {
            "rounds": self.plan.config.rounds,
            "train.local-steps": train.local_steps,
            "train.batch-size": train.batch_size,
            "train.optimizer": train.optimizer,
            "train.learning-rate": train.learning_rate,
            "privacy.noise-multiplier": 0.0,
        }


def proposals(plan: PrivacyPlan) -> list[Proposal]:
    """Return, for several numbers of steps, the least batch that is clear of the noise, or all rows; cheapest first."""
    found = [_least_batch(plan, rounds, steps) for rounds, steps in _SCHEDULES]
    return sorted(found, key=lambda one: (not one.learns, one.examples if one.learns else -one.ratio))


def enough_epsilon(plan: PrivacyPlan) -> float | None:
    """Return a budget with which steps of all rows are clear of the noise, by doubling; None: none up to 64 is."""
    size, epsilon = plan.config.privacy.client_size, plan.config.privacy.epsilon
    while (epsilon := 2 * epsilon) <= _MOST_EPSILON:
        more = replace(plan, config=replace(plan.config, privacy=replace(plan.config.privacy, epsilon=epsilon)))
        if any(_proposal(more, rounds, steps, size).learns for rounds, steps in _SCHEDULES):
            return epsilon
    return None


def others(plan: PrivacyPlan, trained: Mapping[str, int]) -> Iterator[str]:
    """Yield strategies on their own methods that are clear of the noise where this one is not.

    Args:
        plan: The privacy of the run as planned.
        trained: Numbers that a client trains under each strategy.
    """
    for name, count in trained.items():
        if name in _UNMEASURED:
            continue
        strategy = replace(plan.config.strategy, name=name)
        method = replace(plan.config.method, name=methods_of(name)[0])
        other = PrivacyPlan(replace(plan.config, strategy=strategy, method=method), count)
        if proposals(other)[0].learns:
            yield name


def check_can_suggest(config: Config) -> None:
    """Refuse to look for schedules where there is no budget to stay within.

    Raises:
        ConfigError: There is none.
    """
    if config.privacy.mode != "dp" or not config.privacy.epsilon:
        raise ConfigError(
            "fedlora plan --suggest looks for schedules under DP within a budget: set privacy.mode = 'dp' and "
            "privacy.epsilon. Without privacy, `fedlora tune` looks for the learning rate."
        )
    if unmeasured := _unmeasured(config):
        raise ConfigError(f"fedlora plan --suggest: what signal to noise {unmeasured} learns from was not measured.")


def suggest(plan: PrivacyPlan, trained: Mapping[str, int], asked: Sequence[str], console: Console) -> None:
    """Print schedules within the budget, and the command that runs the cheapest that learns; or what else would help.

    Args:
        plan: The privacy of the run as planned.
        trained: Numbers that a client trains under each strategy.
        asked: The command of the run as planned, word by word.
        console: Where to.
    """
    console.print("looking for schedules within the budget ...")
    found = proposals(plan)
    console.print(proposals_table(found))
    best = found[0]
    if best.learns:
        keys = " ".join(f"{key}={value!r}" for key, value in best.keys.items())
        console.print(f"suggested: {shlex.join([*asked, '-c', keys])}", markup=False)
        return
    size, bound = plan.config.privacy.client_size, learns_from(plan.config)
    able = list(others(plan, trained))
    instead = f"; strategies that would learn: {', '.join(able)} (strategy.name)" if able else ""
    if _keeps_noise(plan.config):
        console.print(f"note: no schedule is proposed for {plan.config.strategy.name}: {_KEPT}{instead}", markup=False)
        return
    console.print(
        f"note: no schedule learns within epsilon {plan.config.privacy.epsilon:g}: with {size} rows a client and "
        f"{plan.trained:,} trained numbers the signal to noise is {best.ratio:.2g} at best, and {_SAFETY * bound:.2g} "
        f"would be clear of the noise{instead}",
        markup=False,
    )
    epsilon = enough_epsilon(plan)
    more = f"privacy.epsilon = {epsilon:g} would be enough" if epsilon else "no epsilon up to 64 would be enough"
    console.print(
        f"{more}; so would more rows a client, a lower method.rank or fewer method.target-modules", markup=False
    )


def proposals_table(found: list[Proposal]) -> RichTable:
    """Return proposals as a table."""
    table = RichTable(title=f"schedules that keep to epsilon {found[0].plan.config.privacy.epsilon:g}, by plain SGD")
    for column in ("rounds", "steps", "batch", "noise", "signal to noise", "rate", "rows trained on", "learns"):
        table.add_column(column, justify="right")
    for one in found:
        config = one.plan.config
        size = config.privacy.client_size
        table.add_row(
            str(config.rounds),
            str(config.train.local_steps),
            f"{config.train.batch_size} of {size}",
            f"{config.privacy.noise_multiplier:.3g}",
            f"{one.ratio:.3g}",
            f"{config.train.learning_rate:g}",
            f"{one.examples:,} ({one.examples / size:.0f} x)",
            "yes" if one.learns else "hardly",
        )
    return table


def _least_batch(plan: PrivacyPlan, rounds: int, steps: int) -> Proposal:
    size = plan.config.privacy.client_size
    batches = sorted({*(2**power for power in range(3, 20) if 2**power < size), size})
    made: dict[int, Proposal] = {}

    def ratio(batch: int) -> float:
        made[batch] = _proposal(plan, rounds, steps, batch)
        return made[batch].ratio

    least = bisect_left(batches, _SAFETY * learns_from(plan.config), key=ratio)
    batch = batches[min(least, len(batches) - 1)]
    return made.get(batch) or _proposal(plan, rounds, steps, batch)


def _proposal(plan: PrivacyPlan, rounds: int, steps: int, batch: int) -> Proposal:
    """Return a schedule with the least noise that keeps to the budget, and the rate that was found for it."""
    train = replace(
        plan.config.train,
        local_steps=steps,
        local_epochs=1,
        batch_size=batch,
        optimizer="sgd",
        learning_rate=0.0,
        warmup_rounds=0,
    )
    config = fit_noise(replace(plan.config, rounds=rounds, train=train))
    config = replace(config, train=replace(train, learning_rate=found_rate(config).rate))
    made = replace(plan, config=config)
    ratio, bound = made.signal_to_noise(made.steps), learns_from(config)
    return Proposal(made, ratio, ratio >= _SAFETY * bound and not _keeps_noise(config))
