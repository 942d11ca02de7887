"""One place for each name: the registry that methods, tasks, data sets and strategies share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fedlora.messages import closest

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps the names that a configuration may use to what they stand for.

    Args:
        key: The configuration key whose values live here, for error messages.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files its argument under ``name``."""

        def add(entry: T) -> T:
            assert name not in self._entries, f"{self.key} = {name!r} is registered twice"
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ValueError: No such name; the message lists the known ones and the closest.
        """
        if name not in self._entries:
            raise ValueError(
                f"{self.key}: unknown name {name!r}.{closest(name, self._entries)} "
                f"Known: {', '.join(sorted(self._entries))}."
            )
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the known names, sorted."""
        return iter(sorted(self._entries))
