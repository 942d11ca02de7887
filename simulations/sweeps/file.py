"""A sweep's file: a grid of runs, with hyper-parameters chosen on dev rows.

It is a run configuration with two more tables. ``[grid]`` lists values by key, and every combination of them is a
cell. ``[tune]`` lists hyper-parameters to choose: for each combination but for the seed, with the first seed, each is
tried on dev rows, with the test rows not even loaded; the best then runs for every seed, and each of those runs reads
the test rows once, after its last round.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fedlora.config import Config, ConfigError, from_toml, to_toml
from fedlora.messages import first_line
from fedlora.tasks import TASKS
from simulations.options import DEV_SHARE
from simulations.setup import resolve
from simulations.sweeps.cells import Cell, Share, Values, check_values, combinations, describe


@final
@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        base: The configuration that all cells share, by dotted key.
        grid: Values by key.
        tune: Values of the hyper-parameters to choose, by key.
    """

    base: Values
    grid: dict[str, list[Any]]
    tune: dict[str, list[Any]]

    @classmethod
    def read(cls, file: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Sweep:
        """Read a sweep's file over the app's ``defaults`` and under ``overrides``, and check every cell of it.

        Raises:
            ConfigError: It cannot be read, or a cell cannot work.
        """
        path = Path(file).expanduser()
        try:
            flat = from_toml(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the sweep {file} cannot be read: {first_line(error)}") from error
        parts: dict[str, dict[str, Any]] = {"grid": {}, "tune": {}, "": {}}
        for key, value in flat.items():
            table, _, rest = key.partition(".")
            where = table if table in ("grid", "tune") else ""
            parts[where][rest if where else key] = value
        for table in ("grid", "tune"):
            for key, values in parts[table].items():
                check_values(table, key, values)
        for key in overrides or {}:
            if key in parts["grid"] or key in parts["tune"]:
                raise ConfigError(f"{key}: the sweep goes through values of it; change them in {file}.")
        base = {
            **defaults,
            **parts[""],
            **(overrides or {}),
            "run.sweep": "",
            "run.share": str(Share()),
            "run.resume": False,
        }
        base["run.name"] = base["run.name"] or path.stem
        if parts["tune"]:
            base["data.dev-share"] = base["data.dev-share"] or DEV_SHARE
        sweep = cls(base, parts["grid"], parts["tune"])
        sweep._check()
        return sweep

    @property
    def first(self) -> Config:
        """The configuration with the first of all values: what all cells share can be read from it."""
        values = {key: values[0] for key, values in (*self.grid.items(), *self.tune.items())}
        return resolve({**self.base, **values})

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(str(self.base["run.dir"]), str(self.base["run.name"])).expanduser().resolve()

    def to_toml(self) -> str:
        """Return the sweep as a file that :meth:`read` understands."""
        tables = {"grid": self.grid, "tune": self.tune}
        return to_toml(
            {
                **self.base,
                **{f"{table}.{key}": values for table, part in tables.items() for key, values in part.items()},
            }
        )

    def _check(self) -> None:
        both = sorted(set(self.grid) & set(self.tune))
        if both:
            raise ConfigError(f"{both[0]} is in [grid] and in [tune]; a key is either compared or chosen.")
        if "seed" in self.tune:
            raise ConfigError("seed is in [tune]: a seed is not chosen by its result; put it in [grid].")
        rates = [key for key in ("train.learning-rate", "server.learning-rate", "server.tau") if key in self.grid]
        if rates and self.base["eval.test"]:
            raise ConfigError(
                f"{rates[0]} is in [grid]: the best of them would be chosen by the test rows. Put it in [tune], which "
                "chooses on dev rows, or set eval.test = false."
            )
        if not self.grid and not self.tune:
            raise ConfigError("the sweep has neither [grid] nor [tune]: it is a single run, for fedlora run.")
        assert self.expected()

    def groups(self, share: Share | None = None) -> list[Values]:
        """Return the combinations of the grid but for the seed, of a share or all."""
        share = share or Share()
        groups = list(combinations({key: values for key, values in self.grid.items() if key != "seed"}))
        return groups[share.number - 1 :: share.of]

    def tuning(self, group: Values | None = None) -> list[Cell]:
        """Return the cells on which hyper-parameters are chosen, of one group or of all."""
        if not self.tune:
            return []
        seed = {"seed": self.grid["seed"][0]} if "seed" in self.grid else {}
        chosen = self.groups() if group is None else [group]
        return [self._cell("tune", {**one, **seed, **tried}) for one in chosen for tried in combinations(self.tune)]

    def finals(self, group: Values, chosen: Values) -> list[Cell]:
        """Return the cells of a group for every seed, with the hyper-parameters that were chosen."""
        seeds: list[Values] = [{"seed": seed} for seed in self.grid["seed"]] if "seed" in self.grid else [{}]
        return [self._cell("final", {**group, **seed, **chosen}) for seed in seeds]

    def size(self) -> int:
        """Return the number of cells."""
        return len(self.tuning()) + sum(len(self.finals(group, {})) for group in self.groups())

    def _cell(self, stage: str, varied: Values) -> Cell:
        return Cell.of(stage, self.base, varied, self.folder / "cells")

    def choose(self, group: Values) -> Values:
        """Return the hyper-parameters that did best on the dev rows of a group.

        Raises:
            ValueError: None of the group's cells finished.
        """
        if not self.tune:
            return {}
        scored = [(score, cell) for cell in self.tuning(group) if (score := cell.score()) is not None]
        if not scored:
            raise ValueError(f"no cell of {describe(group)} finished, so nothing can be chosen for it")
        higher = TASKS[scored[0][1].config.task].measure.higher_is_better
        best = (max if higher else min)(scored, key=lambda pair: pair[0])[1]
        return {key: best.varied[key] for key in self.tune}

    def expected(self) -> list[Cell]:
        """Return all cells: each combination that may be chosen, and the final ones with what is, or with the first."""
        cells = []
        for group in self.groups():
            try:
                chosen = self.choose(group)
            except ValueError:  # nothing has run yet
                chosen = {key: values[0] for key, values in self.tune.items()}
            cells += [*self.tuning(group), *self.finals(group, chosen)]
        return cells

    # -- its cells so far ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what earlier calls noted of cells that failed, and of attempts: every cell is tried again."""
        for pattern in ("errors-*.json", "attempt-*.json"):
            for stale in self.folder.glob(pattern):
                stale.unlink()

    def errors(self) -> dict[str, str]:
        """Return why cells failed that have no result, by the names of their folders, whatever process ran them."""
        found: dict[str, str] = {}
        for file in sorted(self.folder.glob("errors-*.json")):
            found |= json.loads(file.read_text(encoding="utf-8"))
        finished = {cell.config.run.name for cell in self.cells() if cell.outcome() is not None}
        return {name: reason for name, reason in found.items() if name not in finished}

    def cells(self, share: Share | None = None) -> Iterator[Cell]:
        """Yield the cells that can be listed by now, of a share or all: tuning, and final ones once they are chosen."""
        for group in self.groups(share):
            yield from self.tuning(group)
            try:
                yield from self.finals(group, self.choose(group))
            except ValueError:
                continue

    def unfinished(self, share: Share | None = None) -> list[Cell]:
        """Return the cells of :meth:`cells` without a result, of a share or all."""
        return [cell for cell in self.cells(share) if cell.outcome() is None]

    def attempt_file(self, share: Share) -> Path:
        """Return the file with the cell that a share is running, and how often it was started without ending."""
        return self.folder / f"attempt-{share.number}.json"

    def errors_file(self, share: Share) -> Path:
        """Return the file with the cells of a share that failed, and why."""
        return self.folder / f"errors-{share.number}.json"

    def state(self, share: Share) -> tuple[int, str]:
        """Return how far a share is: cells without a result, and attempts at the one that is running."""
        file = self.attempt_file(share)
        return len(self.unfinished(share)), file.read_text(encoding="utf-8") if file.is_file() else ""
