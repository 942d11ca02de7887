"""A run, read back from the files of its folder."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fedlora.config import Config, ConfigError, from_toml
from fedlora.config.data_section import column_names
from fedlora.metrics import OUTSIDE, Metric, Population, is_covered
from fedlora.plugins import schema
from fedlora.reports.losses import FILE as LOSSES_FILE
from fedlora.runs.folder import read_lines
from fedlora.runs.privacy import FILE as PRIVACY_FILE
from fedlora.runs.ranks import read_strengths


@final
@dataclass(frozen=True)
class Run:
    """A finished (or unfinished) run, read from its folder.

    Attributes:
        path: The folder.
        config: Its configuration.
        metrics: Lines of ``metrics.jsonl``.
        partition: ``partition.json``: classes, and label counts by client.
        plan: ``plan.json``: what is measured, roles, bytes.
        scores: Lines of ``scores.jsonl``: each client on its own rows; empty where that is not measured.
        privacy: ``privacy.json``: what left the clients, under which guarantee, and what it cost.
        result: ``result.json``, or None where the run did not finish.
        losses: Lines of ``losses.jsonl``: trainers that were lost; empty where none was.
    """

    path: Path
    config: Config
    metrics: list[dict[str, Any]]
    partition: dict[str, Any]
    plan: dict[str, Any]
    scores: list[dict[str, Any]]
    privacy: dict[str, Any]
    result: dict[str, Any] | None
    losses: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a run folder.

        Raises:
            ValueError: It is not one.
        """

        def lines(name: str) -> list[dict[str, Any]]:
            return read_lines(path / name) if (path / name).is_file() else []

        try:
            config = schema().read(from_toml((path / "config.toml").read_text(encoding="utf-8")), foreign=True)
            partition = json.loads((path / "partition.json").read_text(encoding="utf-8"))
            plan = json.loads((path / "plan.json").read_text(encoding="utf-8"))
            record = path / PRIVACY_FILE
            privacy = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {"guarantee": "none"}
            done = path / "result.json"
            result = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
            metrics, scores, losses = (lines(name) for name in ("metrics.jsonl", "scores.jsonl", LOSSES_FILE))
            return cls(path, config, metrics, partition, plan, scores, privacy, result, losses)
        except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError, ConfigError) as error:
            raise ValueError(f"{path} is not a run folder that can be read: {error}") from error

    @cached_property
    def strengths(self) -> dict[str, NDArray[np.float64]]:
        """The strengths of each layer's components, [adapters, r]; empty where nothing was exported."""
        return read_strengths(self.path)

    @cached_property
    def measure(self) -> Metric:
        """The number that this run reports each round, such as ``test_accuracy``."""
        return Metric.parse(str(self.plan["measure"]))

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the columns of texts, of which a sentence pair has two."""
        return tuple(self.plan.get("texts", column_names(self.config.data.text_column)))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a head's outputs stand for: the classes, the labels, or a regression's one number."""
        return tuple(self.plan.get("outputs", self.partition["classes"]))

    @property
    def loss(self) -> Metric:
        """The loss on the same rows, such as ``test_loss``."""
        return Metric("loss", self.measure.population)

    @property
    def outcome(self) -> Metric:
        """The number that a finished run comes to: on the test rows where they were read, else the measure."""
        on_test = Metric(self.measure.name, Population.TEST)
        return on_test if on_test.key in (self.result or {}) else self.measure

    def value(self, metric: Metric) -> float | None:
        """Return a number of ``result.json``; None where it is not there."""
        value = (self.result or {}).get(metric.key)
        return None if value is None else float(value)

    def curve(self) -> tuple[list[int], list[float]]:
        """Return the rounds that were measured, and their measure."""
        key = self.measure.key
        points = [(line["round"], line[key]) for line in self.metrics if line[key] is not None]
        return [x for x, _ in points], [y for _, y in points]

    @property
    def spent(self) -> list[tuple[int, float, float]]:
        """Rounds, and epsilon of the clients that spent the most and the least until then; empty without DP."""
        return [
            (line["round"], *(math.inf if line[name] is None else line[name] for name in ("epsilon", "epsilon_least")))
            for line in self.metrics
            if "epsilon" in line
        ]

    @property
    def guarantee(self) -> str:
        """What is guaranteed about clients' rows, and which of a report's numbers that does not cover."""
        outside = (
            f" Numbers of clients' own rows, and of baselines, are {OUTSIDE}." if "clients" in self.privacy else ""
        )
        return f"{self.privacy['guarantee']}{outside}"

    def label(self, key: str, words: str = "") -> str:
        """Return a column in words; under DP they say where the guarantee does not cover it.

        Args:
            key: The column.
            words: The words, where they are not those of its name.
        """
        words = words or key.replace("_", " ")
        covered = self.config.privacy.mode == "none" or is_covered(key)
        return words if covered else f"{words} ({OUTSIDE})"

    def references(self) -> dict[str, float]:
        """Return what the measure is compared with, by its words: the start, a constant answer, the baselines."""
        name = self.measure.name
        start: dict[str, Metric] = {}
        end: dict[str, Metric] = {}
        if self.measure.population is Population.PERSONAL:
            alone = Metric(name, Population.ALONE_CLIENTS)
        else:
            alone, central = Metric(name, Population.ALONE_TEST), Metric(name, Population.CENTRAL_TEST)
            if self.value(alone) is None:
                alone, central = Metric(name, Population.ALONE_DEV), Metric(name, Population.CENTRAL_DEV)
            start = {
                "before training": Metric(name, Population.BEFORE),
                "always the commonest class": Metric("majority_share", Population.TRAINING),
            }
            end = {"all data in one place": central}
        lone = {"each client alone, mean": alone, "each client alone, worst tenth": alone.worst_tenth}
        values = {self.label(one.key, words): self.value(one) for words, one in {**start, **lone, **end}.items()}
        return {words: value for words, value in values.items() if value is not None}
