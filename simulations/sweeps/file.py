"""A sweep's file: a grid of runs, with hyper-parameters chosen on dev rows.

It is a run configuration with more tables. ``[grid]`` lists values by key, and every combination of them is a cell.
``[[cases.NAME]]`` lists keys that go together, such as a strategy with the rank that suits it, and every case is
combined with the grid, too. ``[tune]`` lists hyper-parameters to choose: for each combination but for the seed, with
the first seed, each is tried on dev rows, with the test rows not even loaded; the best then runs for every seed, and
each of those runs reads the test rows once, after its last round. ``once`` in ``[tune]`` names cases and grid keys
over which nothing is chosen anew: what is best with the first of their values runs with all of them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from fedlora.config import Config, ConfigError, from_toml, to_toml
from fedlora.messages import first_line
from fedlora.tasks import TASKS
from simulations.options import DEV_SHARE
from simulations.setup import resolve
from simulations.sweeps.cases import DATA, ONCE, RATES, Case, differing_rates, keys_of, once_columns, read_cases
from simulations.sweeps.cells import Cell, Share, Values, check_values, combinations, describe


@final
@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        base: The configuration that all cells share, by dotted key.
        grid: Values by key.
        tune: Values of the hyper-parameters to choose, by key.
        cases: Keys that go together, by the column of the tables that names them.
        once: Columns of cases and grid with whose first values hyper-parameters are chosen, for all of them.
    """

    base: Values
    grid: dict[str, list[Any]]
    tune: dict[str, list[Any]]
    cases: dict[str, list[Case]] = field(default_factory=dict)
    once: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, file: str, defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, *, check: bool = True
    ) -> Sweep:
        """Read a sweep's file over the app's ``defaults`` and under ``overrides``.

        Args:
            file: The file.
            defaults: Values of all keys.
            overrides: What goes over the file's.
            check: Whether to check the configuration of every cell: not where whoever wrote the file has.

        Raises:
            ConfigError: It cannot be read, or a cell cannot work.
        """
        path = Path(file).expanduser()
        try:
            flat = from_toml(path.read_text(encoding="utf-8"))
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"the sweep {file} cannot be read: {first_line(error)}") from error
        parts: dict[str, dict[str, Any]] = {"grid": {}, "tune": {}, "cases": {}, "": {}}
        for key, value in flat.items():
            table, _, rest = key.partition(".")
            where = table if table in ("grid", "tune", "cases") else ""
            parts[where][rest if where else key] = value
        once = parts["tune"].pop(ONCE, [])
        for table in ("grid", "tune"):
            for key, values in parts[table].items():
                check_values(table, key, values)
        cases = read_cases(parts["cases"], parts["tune"])
        own = {key for some in cases.values() for case in some for key in case.values}
        for key in overrides or {}:
            if key in parts["grid"] or key in parts["tune"] or key in own:
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
        sweep = cls(base, parts["grid"], parts["tune"], cases, once_columns(once, [*cases, *parts["grid"]]))
        if check:
            sweep._check()
        return sweep

    @property
    def first(self) -> Config:
        """The configuration with the first of all values: what all cells share can be read from it."""
        values = {key: values[0] for key, values in (*self.grid.items(), *self.tune.items())}
        named = {column: cases[0].name for column, cases in self.cases.items()}
        return resolve({**self.base, **self._settings({**named, **values})})

    @property
    def columns(self) -> list[str]:
        """What distinguishes cells: names of cases, keys of the grid, hyper-parameters."""
        return [*self.cases, *self.grid, *self.tune]

    @property
    def folder(self) -> Path:
        """The sweep's folder."""
        return Path(str(self.base["run.dir"]), str(self.base["run.name"])).expanduser().resolve()

    @property
    def rows(self) -> Path:
        """Where its processes keep tokenized rows while they are at work, if they train by themselves."""
        return self.folder / "rows"

    def to_toml(self) -> str:
        """Return the sweep as a file that :meth:`read` understands."""
        tables = {"grid": self.grid, "tune": self.tune | ({ONCE: list(self.once)} if self.once else {})}
        plain = to_toml(
            {
                **self.base,
                **{f"{table}.{key}": values for table, part in tables.items() for key, values in part.items()},
            }
        )
        return plain + "".join(case.to_toml(column) for column, cases in self.cases.items() for case in cases)

    def _check(self) -> None:
        places = {"[grid]": set(self.grid), "[tune]": set(self.tune)}
        places |= {f"[[cases.{column}]]": keys_of(cases) for column, cases in self.cases.items()}
        own = {
            f"[[cases.{column}]]": {f"tune.{key}" for case in cases for key in case.tune}
            for column, cases in self.cases.items()
        }
        for found, rule in (
            (own, ": which of them a cell would take is not said."),
            (places, "; leave it in one of them."),
        ):
            for (one, keys), (other, others) in itertools.combinations(found.items(), 2):
                if both := sorted(keys & others):
                    raise ConfigError(f"{both[0]} is in {one} and in {other}{rule}")
        for column in self.cases:
            if column in self.base:
                raise ConfigError(f"[[cases.{column.removeprefix(DATA)}]]: {column} is a key; call the list otherwise.")
        if self.once and not self.tune:
            raise ConfigError(
                f"[tune] {ONCE} = {list(self.once)!r}: there is nothing to choose in [tune]; leave it out."
            )
        for column in self.once:
            for case in self.cases.get(column, ()):
                if case.tune:
                    raise ConfigError(
                        f"[tune] once names {column}, and {case.name} has rates of its own: leave one out."
                    )
        if "seed" in self.tune:
            raise ConfigError("seed is in [tune]: a seed is not chosen by its result; put it in [grid].")
        rates = [key for key in RATES if key in self.grid]
        tested = self.base["eval.test"] or any(
            case.values.get("eval.test") for cases in self.cases.values() for case in cases
        )
        rates += [key for cases in self.cases.values() for key in differing_rates(cases)]
        if rates and tested:
            raise ConfigError(
                f"{rates[0]} is compared: the best of them would be chosen by the test rows. Put it in [tune], which "
                "chooses on dev rows, or set eval.test = false."
            )
        if not self.grid and not self.tune and not self.cases:
            raise ConfigError("the sweep has neither [grid] nor [tune]: it is a single run, for fedlora run.")
        # What a seed draws is within bounds whatever it is: each seed is checked once, and all else with the first.
        first = self.grid.get("seed", [None])[0]
        seeds = self.finals(self.groups()[0], {})
        for cell in (*seeds, *(one for one in self.expected() if one.varied.get("seed") == first)):
            assert cell.config

    def groups(self, share: Share | None = None) -> list[Values]:
        """Return the combinations for which hyper-parameters are chosen, of a share or all."""
        share = share or Share()
        groups = list(combinations({key: values for key, values in self._varied().items() if key not in self.once}))
        return groups[share.number - 1 :: share.of]

    def _varied(self) -> dict[str, list[Any]]:
        """Return the values of cases and grid but for the seed, by column."""
        named: dict[str, list[Any]] = {column: [case.name for case in cases] for column, cases in self.cases.items()}
        return named | {key: values for key, values in self.grid.items() if key != "seed"}

    def _over_once(self) -> list[Values]:
        """Return the combinations over which nothing is chosen anew."""
        return list(combinations({key: self._varied()[key] for key in self.once}))

    def tuning(self, group: Values | None = None) -> list[Cell]:
        """Return the cells on which hyper-parameters are chosen, of one group or of all."""
        if not self.tune:
            return []
        seed = {"seed": self.grid["seed"][0]} if "seed" in self.grid else {}
        chosen = self.groups() if group is None else [group]
        first = self._over_once()[0]
        return [
            self._cell("tune", {**one, **first, **seed, **tried})
            for one in chosen
            for tried in combinations(self.tune | self._own_tune(one))
        ]

    def _own_tune(self, group: Values) -> dict[str, list[Any]]:
        """Return the hyper-parameters for which the cases of a group have values of their own, and these."""
        return {key: values for case in self._cases(group) for key, values in case.tune.items()}

    def _cases(self, varied: Values) -> list[Case]:
        """Return the cases that a combination names."""
        return [case for column, cases in self.cases.items() for case in cases if case.name == varied.get(column)]

    def _settings(self, varied: Values) -> Values:
        """Return the keys that a combination sets, those of its cases among them."""
        own = {key: value for key, value in varied.items() if key not in self.cases}
        return {key: value for case in self._cases(varied) for key, value in case.values.items()} | own

    def finals(self, group: Values, chosen: Values) -> list[Cell]:
        """Return the cells of a group, seed after seed, with the hyper-parameters that were chosen."""
        return [cell for cells in self.finals_by_seed(group, chosen) for cell in cells]

    def finals_by_seed(self, group: Values, chosen: Values) -> list[list[Cell]]:
        """Return the cells of :meth:`finals`, those together that differ by their seed alone."""
        seeds: list[Values] = [{"seed": seed} for seed in self.grid["seed"]] if "seed" in self.grid else [{}]
        return [
            [self._cell("final", {**group, **one, **seed, **chosen}) for seed in seeds] for one in self._over_once()
        ]

    def size(self) -> int:
        """Return the number of cells."""
        return len(self.tuning()) + sum(len(self.finals(group, {})) for group in self.groups())

    def _cell(self, stage: str, varied: Values) -> Cell:
        return Cell.of(stage, {**self.base, **self._settings(varied)}, varied, self.folder / "cells")

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
                chosen = {key: values[0] for key, values in (self.tune | self._own_tune(group)).items()}
            cells += [*self.tuning(group), *self.finals(group, chosen)]
        return cells

    # -- its cells so far ---------------------------------------------------------------------------------

    def begin(self) -> None:
        """Forget what earlier calls noted of cells that failed, and of attempts: every cell is tried again."""
        for pattern in ("errors-*.json", "attempt-*.json"):
            for stale in self.folder.glob(pattern):
                stale.unlink()
        shutil.rmtree(self.rows, ignore_errors=True)  # of a call that was killed

    def errors(self) -> dict[str, str]:
        """Return why cells failed that have no result, by the names of their folders, whatever process ran them."""
        found: dict[str, str] = {}
        for file in sorted(self.folder.glob("errors-*.json")):
            found |= json.loads(file.read_text(encoding="utf-8"))
        finished = {cell.name for cell in self.cells() if cell.outcome() is not None}
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

    def again(self, workers: int) -> Callable[[int], bool]:
        """Return what says whether a process that died is to be started again: not if it did so where it did before.

        Args:
            workers: Processes that the sweep is shared among.
        """
        before: dict[int, tuple[int, str]] = {}

        def again(number: int) -> bool:
            now = self.state(Share(number, workers))
            moved = now[0] > 0 and before.get(number) != now
            before[number] = now
            return moved

        return again

    def attempt_file(self, share: Share) -> Path:
        """Return the file with the cells that a share is running, and how often each was started without ending."""
        return self.folder / f"attempt-{share.number}.json"

    def errors_file(self, share: Share) -> Path:
        """Return the file with the cells of a share that failed, and why."""
        return self.folder / f"errors-{share.number}.json"

    def state(self, share: Share) -> tuple[int, str]:
        """Return how far a share is: cells without a result, and attempts at those that are running."""
        file = self.attempt_file(share)
        return len(self.unfinished(share)), file.read_text(encoding="utf-8") if file.is_file() else ""
