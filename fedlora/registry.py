"""One place for each name: the registry that methods, tasks, data sets and strategies share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, final

from fedlora.config import ConfigError, Options
from fedlora.messages import closest

T = TypeVar("T")


@final
class Registry(Generic[T]):
    """Maps the names that a configuration may use to what they stand for.

    Args:
        key: The configuration key whose values live here, for error messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}
        self._options: dict[str, type[Options]] = {}
        self._renamed: dict[str, str] = {}

    def register(self, name: str, options: type[Options] | None = None) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``.

        Args:
            name: A value of the registry's key.
            options: The entry's own keys in the configuration.

        Raises:
            ConfigError: The name is taken.
        """
        if name in self._entries or name in self._renamed:
            raise ConfigError(f"{self.key} = {name!r} is registered already; choose another name.")

        def add(entry: T) -> T:
            self._entries[name] = entry
            if options is not None:
                self._options[name] = options
            return entry

        return add

    def alias(self, old: str, new: str) -> None:
        """Keep a former name of ``new`` usable, with a warning."""
        assert new in self._entries, f"{self.key} = {new!r} is not registered"
        self._renamed[old] = new

    def remove(self, name: str) -> None:
        """Forget an entry, one of a plug-in that failed."""
        del self._entries[name]
        self._options.pop(name, None)

    def current(self, name: str) -> str:
        """Return the name under which ``name`` is registered now; a former one warns."""
        if name not in self._renamed:
            return name
        warnings.warn(f"{self.key} = {name!r} is now called {self._renamed[name]!r}.", FutureWarning, stacklevel=3)
        return self._renamed[name]

    def __getitem__(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ConfigError: No such name; the message lists the known ones and the closest.
        """
        name = self.current(name)
        if name not in self._entries:
            raise ConfigError(
                f"{self.key}: unknown name {name!r}.{closest(name, self._entries)} "
                f"Known: {', '.join(sorted(self._entries))}."
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the known names, sorted."""
        return iter(sorted(self._entries))

    def options_of(self, name: str) -> type[Options] | None:
        """Return the options of an entry; None where it has none."""
        return self._options.get(self.current(name))

    def options(self) -> list[type[Options]]:
        """Return the options of all entries, each once."""
        return list(dict.fromkeys(self._options.values()))
