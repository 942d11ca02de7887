"""The privacy of a run, settled before its first step: noise, sample rate, and what they come to."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError
from fedlora.data import FederatedData
from fedlora.privacy import Accountant, Mechanism, certifier, default_delta, epsilon, least_noise_multiplier, statement
from fedlora.server import sampled


def resolve_privacy(config: Config, data: FederatedData) -> Config:
    """Return the configuration with every ``privacy`` key given, for clients whose rows are known here.

    Raises:
        ConfigError: As for :func:`settle_privacy`.
    """
    return settle_privacy(config, [len(data.training_rows(client)) for client in range(len(data.clients))])


def settle_privacy(config: Config, rows: Sequence[int]) -> Config:
    """Return the configuration with every ``privacy`` key given: declared size, delta and noise multiplier.

    Args:
        config: The configuration.
        rows: Each client's training rows; where they are not known here, its public number of them.

    Raises:
        ConfigError: They cannot work with the data or the schedule.
    """
    privacy, train = config.privacy, config.train
    if privacy.mode == "none":
        return config
    size = privacy.client_size or max(1, int(np.mean(rows)))
    # Where nobody declares sizes, delta is below one over the rows of the largest client, and so of all of them.
    most = privacy.client_size or max(1, *rows)
    if train.batch_size > size:
        raise ConfigError(
            f"train.batch-size = {train.batch_size}: is more than the {size} training rows of a client "
            "(privacy.client-size; not set: the mean), so that no sample rate gives it; make it smaller."
        )
    delta = privacy.delta or default_delta(most)
    if delta >= 1 / most:
        raise ConfigError(
            f"privacy.delta = {delta:g}: must be below 1 / {most}, one over the training rows of a client: to publish "
            "one of its rows would satisfy it otherwise."
        )
    config = replace(config, privacy=replace(privacy, client_size=size, delta=delta))
    return config if privacy.noise_multiplier else fit_noise(config)


def fit_noise(config: Config) -> Config:
    """Return a configuration with the least noise multiplier with which its rounds keep to the budget.

    Raises:
        ConfigError: None does.
    """
    use = Mechanism.of(config).use(int(participations(config)[-1].max()))
    try:
        noise = least_noise_multiplier(
            target_epsilon=config.privacy.epsilon,
            target_delta=config.privacy.delta,
            sample_rate=use.sample_rate,
            steps=use.steps,
            accountant=certifier(config),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return replace(config, privacy=replace(config.privacy, noise_multiplier=noise))


def participations(config: Config) -> NDArray[np.int64]:
    """Return the rounds that each client has been sampled in, [rounds + 1, clients]; it follows from the seed."""
    federation = config.federation
    counts = np.zeros((config.rounds + 1, federation.num_clients), dtype=np.int64)
    for number in range(1, config.rounds + 1):
        counts[number] = counts[number - 1]
        counts[number, sampled(number, config.seed, federation.num_clients, federation.clients_per_round)] += 1
    return counts


_RATIOS = ("signal to noise of a step", "of all steps")  # both at best


@dataclass(frozen=True)
class PrivacyPlan:
    """What a run's privacy comes to.

    Attributes:
        config: The configuration, with all ``privacy`` keys given.
        trained: Numbers that each client trains in a round.
    """

    config: Config
    trained: int

    @cached_property
    def mechanism(self) -> Mechanism:
        """What each client does in a round."""
        return Mechanism.of(self.config)

    @cached_property
    def rounds(self) -> tuple[int, int]:
        """Rounds of the client that is sampled least often, and of the one that is most often."""
        counts = participations(self.config)[-1]
        return int(counts.min()), int(counts.max())

    @property
    def steps(self) -> int:
        """Steps of the client that is sampled most often, in all its rounds."""
        return self.mechanism.steps * self.rounds[1]

    def epsilon(self, rounds: int, by: Accountant | None = None) -> float:
        """Return the epsilon of a client that has taken part in so many rounds."""
        uses = [self.mechanism.use(rounds)] if rounds else []
        return epsilon(uses, target_delta=self.config.privacy.delta, accountant=by or certifier(self.config))

    def signal_to_noise(self, steps: int = 1) -> float:
        """Return the norm of a client's summed gradients over that of their noise, at best.

        At best: in each step as many rows as expected, and all rows of all steps alike. Over `T` steps it is the square
        root of `T` times that of one, because signals that agree add up, where noises add up by their squares.

        Args:
            steps: How many of a client's steps are taken together.
        """
        if self.mechanism.noise_multiplier == 0:
            return math.inf
        return self.mechanism.expected_batch_size / self.mechanism.noise_multiplier * math.sqrt(steps / self.trained)

    def lines(self) -> list[str]:
        """Return the plan as lines."""
        privacy, mechanism, (least, most) = self.config.privacy, self.mechanism, self.rounds
        spent = self.epsilon(most)
        lines = [
            f"privacy: {statement(self.config, spent)} (by plan)",
            f"privacy: noise multiplier {mechanism.noise_multiplier:.4g}, clip {mechanism.max_grad_norm:g}, sample "
            f"rate {mechanism.sample_rate:.4g} ({mechanism.expected_batch_size} of privacy.client-size = "
            f"{privacy.client_size} rows, which is public), {mechanism.steps} steps a round; epsilon by RDP "
            f"{self.epsilon(most, 'rdp'):.4g}",
            f"privacy: signal to noise of a step {self.signal_to_noise():.3g} at best, of a client's "
            f"{self.steps} together {self.signal_to_noise(self.steps):.3g}: "
            f"{mechanism.expected_batch_size} rows that agree, against noise on {self.trained:,} trained numbers",
        ]
        lines.append("privacy: averages weigh clients equally, because the number of a client's rows is not sent")
        if least != most:
            lines.append(
                f"privacy: the client sampled least takes part in {least} round(s) and spends "
                f"{self.epsilon(least):.4g}, the one sampled most in {most}"
            )
        if privacy.epsilon and spent > privacy.epsilon:
            able = bisect_right(range(most + 1), privacy.epsilon, key=self.epsilon) - 1
            lines.append(
                f"note: the budget of {privacy.epsilon:g} is enough for {able} of {most} rounds of a client: it "
                "refuses the others. Raise privacy.noise-multiplier (0: the least that is enough), or plan fewer "
                "rounds."
            )
        return lines

    def record(self) -> dict[str, Any]:
        """Return the plan as plain values."""
        least, most = self.rounds
        return {
            "noise_multiplier": self.mechanism.noise_multiplier,
            "sample_rate": self.mechanism.sample_rate,
            "steps_per_round": self.mechanism.steps,
            "epsilon": self.epsilon(most),
            "epsilon_least": self.epsilon(least),
            "signal_to_noise": self.signal_to_noise(),
            "signal_to_noise_together": self.signal_to_noise(self.steps),
            "guarantee": statement(self.config, self.epsilon(most)),
        }

    def show(self, console: Console, others: Mapping[str, int]) -> None:
        """Print epsilon by round, what other settings would buy, and what other strategies would get.

        Args:
            console: Where to.
            others: Numbers that a client trains under other strategies, by name.
        """
        console.print(self._by_round())
        if self.config.privacy.epsilon:
            console.print(self._alternatives())
        console.print(self._by_strategy(others))

    def _by_round(self) -> RichTable:
        least, most = self.rounds
        shown = sorted({max(1, round(self.config.rounds * share)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
        table = RichTable(
            title=f"epsilon at delta {self.config.privacy.delta:g} after rounds (privacy.epsilon "
            f"{self.config.privacy.epsilon or 'not set'})"
        )
        table.add_column("client")
        for number in shown:
            table.add_column(str(number), justify="right")
        counts = participations(self.config)
        for name, total in {"sampled most": most, "sampled least": least}.items():
            client = int(np.flatnonzero(counts[-1] == total)[0])
            table.add_row(name, *(f"{self.epsilon(int(counts[number, client])):.4g}" for number in shown))
            if least == most:
                break
        return table

    def _ratios(self, steps: int) -> Iterator[str]:
        """Yield what stands under ``_RATIOS``."""
        return (f"{self.signal_to_noise(taken):.3g}" for taken in (1, steps))

    def _alternatives(self) -> RichTable:
        config = self.config
        table = RichTable(title=f"noise that keeps to epsilon {config.privacy.epsilon:g}, by batch size and rounds")
        for column in ("batch size", "rounds", "steps", "noise multiplier", *_RATIOS):
            table.add_column(column, justify="right")
        for batch, rounds in ((1, 1.0), (2, 1.0), (4, 1.0), (1, 0.5), (2, 0.5), (1, 2.0)):
            size, count = config.train.batch_size * batch, int(config.rounds * rounds)
            if size > config.privacy.client_size or count == 0:
                continue
            plan = replace(
                self, config=fit_noise(replace(config, rounds=count, train=replace(config.train, batch_size=size)))
            )
            noise = f"{plan.mechanism.noise_multiplier:.4g}"
            table.add_row(str(size), str(count), str(plan.steps), noise, *plan._ratios(plan.steps))
        return table

    def _by_strategy(self, others: Mapping[str, int]) -> RichTable:
        table = RichTable(
            title="signal to noise by strategy: the clip bounds the whole gradient, noise is on each number"
        )
        for column in ("strategy", "trained numbers", *_RATIOS):
            table.add_column(column, justify="left" if column == "strategy" else "right")
        for name, count in others.items():
            table.add_row(name, f"{count:,}", *replace(self, trained=count)._ratios(self.steps))
        return table
