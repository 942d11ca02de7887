"""Cases of a sweep: keys that go together, each combination under a name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from fedlora.config import ConfigError, flatten, to_toml
from fedlora.reports.paired import draws_data
from simulations.sweeps.cells import Values, check_values


@final
@dataclass(frozen=True)
class Case:
    """Keys that go together.

    Attributes:
        name: What the tables call it.
        values: The keys that it sets.
        tune: Values of hyper-parameters to choose among for it, in place of those of ``[tune]``.
    """

    name: str
    values: Values
    tune: dict[str, list[Any]]

    def to_toml(self, column: str) -> str:
        """Return the case as a table of a sweep's file."""
        tune = {f"tune.{key}": values for key, values in self.tune.items()}
        return f"[[cases.{column.removeprefix(DATA)}]]\n" + to_toml({"name": self.name, **self.values, **tune})


RATES = ("train.learning-rate", "server.learning-rate", "server.tau")
"""Keys that are chosen, by dev rows, and not compared by test rows."""
DATA = "data."
"""Before the column of cases that decide which rows clients get: over them nothing is paired."""
ONCE = "once"
"""The key of ``[tune]``, beside the hyper-parameters, that names columns over which nothing is chosen anew."""


def read_cases(tables: Mapping[str, Any], tune: Mapping[str, Any]) -> dict[str, list[Case]]:
    """Return the cases of a sweep's file, by the column that names them in the tables.

    Args:
        tables: What the file has under ``cases``, by name.
        tune: What it has under ``tune``.

    Raises:
        ConfigError: They are no lists of tables with names, or choose what ``[tune]`` does not.
    """
    found = {}
    for name, listed in tables.items():
        place = f"[[cases.{name}]]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"{place}: the name of a list is made of letters, digits, - and _.")
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise ConfigError(f"{place} = {listed!r}: must be a list of tables, such as {place} with name = 'a'.")
        cases = [_case(place, flatten(one), tune) for one in listed]
        check_values("cases", name, [case.name for case in cases])
        found[DATA * any(map(draws_data, keys_of(cases))) + name] = cases
    return found


def differing_rates(cases: Sequence[Case]) -> list[str]:
    """Return the rates in which two of these cases differ that have all else in common."""
    seen: dict[str, Case] = {}
    for case in cases:
        rest = repr(sorted((key, value) for key, value in case.values.items() if key not in RATES))
        first = seen.setdefault(rest, case)
        if first is not case:
            return [key for key in RATES if first.values.get(key) != case.values.get(key)]
    return []


def keys_of(cases: Sequence[Case]) -> set[str]:
    """Return the keys that some of these cases set."""
    return {key for case in cases for key in case.values}


def once_columns(named: Any, columns: list[str]) -> tuple[str, ...]:
    """Return the columns that ``once`` names: a list of cases by its name, a key of the grid as it is.

    Raises:
        ConfigError: There is none of that name, or it is the seed.
    """
    if not isinstance(named, list):
        raise ConfigError(f"[tune] {ONCE} = {named!r}: must be a list of names, such as ['split'].")
    by_name = {column: column for column in columns if column != "seed"} | {
        column.removeprefix(DATA): column for column in columns if column.startswith(DATA)
    }
    for name in named:
        if name not in by_name:
            raise ConfigError(
                f"[tune] {ONCE} = {named!r}: {name!r} is neither a list of [[cases.NAME]] nor a key of [grid] but the "
                f"seed; there are {', '.join(sorted(by_name)) or 'none'}."
            )
    return tuple(by_name[name] for name in named)


def _case(place: str, flat: dict[str, Any], tune: Mapping[str, Any]) -> Case:
    name = flat.pop("name", "")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{place} {flat}: needs a name of its own, a text, which the tables call it.")
    own = {key.removeprefix("tune."): flat.pop(key) for key in list(flat) if key.startswith("tune.")}
    for key, values in own.items():
        check_values(f"cases {name}", f"tune.{key}", values)
        if key not in tune:
            raise ConfigError(f"{place} {name}: tune.{key} is not in [tune], so it is not chosen for the other cases.")
    return Case(name, flat, own)
