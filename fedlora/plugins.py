"""Plug-ins: methods, strategies, tasks, data sets, trackers registered from outside; the schema of all of them.

A plug-in is a module that registers when it is imported (``METHODS.register("gamma", GammaOptions)(Gamma)``). Every
process of a run imports those of installed packages, which name their modules as entry points of the group
``fedlora.plugins``, and those that the key ``run.plugins`` names.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from fedlora.config import Config, ConfigError, Options, Schema
from fedlora.data import CORPORA
from fedlora.fingerprint import code_fingerprint, files_digest
from fedlora.messages import first_line
from fedlora.methods import METHODS
from fedlora.registry import Registry
from fedlora.strategy import Strategy
from fedlora.tasks import TASKS
from fedlora.tracking import TRACKERS

STRATEGIES: Registry[type[Strategy]] = Registry(
    "strategy.name"
)  # filled by the package strategies, which stands above this one
REGISTRIES: tuple[Registry[Any], ...] = (STRATEGIES, METHODS, TASKS, CORPORA, TRACKERS)
GROUP = "fedlora.plugins"


class _Code(NamedTuple):
    """The code of a plug-in that this process has imported."""

    digest: str
    place: str


class _Source(NamedTuple):
    """Where a plug-in comes from."""

    key: str  # the module's name, or the file's path
    where: str  # what names it, for errors
    load: Callable[[], ModuleType]


_loaded: dict[str, _Code] = {}  # by key; as in sys.modules, what a process has imported stays


def methods_of(strategy: str) -> tuple[str, ...]:
    """Return the methods that a strategy works with: its own first, then those that name it."""
    own = STRATEGIES[strategy].methods
    return *own, *(name for name in METHODS if name not in own and strategy in METHODS[name].strategies)


def usual_strategy(method: str) -> str:
    """Return the strategy that a method is shown and measured under: plain averaging, or else one that brings it."""
    if "fedavg" in STRATEGIES and method in methods_of("fedavg"):
        return "fedavg"
    return next(name for name in STRATEGIES if method == STRATEGIES[name].methods[0])


def schema() -> Schema:
    """Return the schema of the configuration: the core's keys, and those of all that is registered in this process."""
    return _schema(tuple(options for registry in REGISTRIES for options in registry.options()))


@functools.lru_cache(maxsize=1)  # a sweep reads thousands of configurations
def _schema(options: tuple[type[Options], ...]) -> Schema:
    return Schema(options)


def read_config(flat: Mapping[str, Any], *, foreign: bool = False) -> Config:
    """Import the plug-ins that dotted keys name, and return the configuration that the keys say.

    Args:
        flat: The keys.
        foreign: Whether keys of unknown sections are kept, see :meth:`fedlora.config.Schema.read`.

    Raises:
        ConfigError: A plug-in cannot be used, or the configuration cannot work.
    """
    names = flat.get("run.plugins", "")
    load(names if isinstance(names, str) else "")
    return schema().read(flat, foreign=foreign)


def load(names: str) -> None:
    """Import the plug-ins of installed packages, and those that ``run.plugins`` names; each once in a process.

    Raises:
        ConfigError: One cannot be imported, registers nothing, or registers what is there already.
    """
    for source in _sources(names):
        if source.key not in _loaded:
            _loaded[source.key] = _load(source)


def fingerprint(names: str) -> tuple[str, str]:
    """Return the digest of the code of a run's clients, and where it is: that of fedlora and of its loaded plug-ins."""
    own, folders = code_fingerprint()
    code = [_loaded[key] for key in sorted({source.key for source in _sources(names)})]
    digest = hashlib.sha256("".join([own, *(one.digest for one in code)]).encode()).hexdigest() if code else own
    return digest, ", ".join([folders, *(one.place for one in code)])


def _sources(names: str) -> Iterator[_Source]:
    for point in _installed():
        package = point.dist.name if point.dist else "a package"
        where = f"the entry point {point.name} = {point.value!r} of {package}"
        yield _Source(point.module, where, functools.partial(importlib.import_module, point.module))
    for name in filter(None, map(str.strip, names.split(","))):
        where = f"run.plugins = {name!r}"
        if name.endswith(".py"):
            path = Path(name).expanduser().resolve()
            yield _Source(str(path), where, functools.partial(_import_file, path))
        else:
            yield _Source(name, where, functools.partial(importlib.import_module, name))


@functools.cache
def _installed() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _load(source: _Source) -> _Code:
    before = {registry: set(registry) for registry in REGISTRIES}
    try:
        module = source.load()
        if not _registered(module, before):
            raise ConfigError(f"registers nothing for {', '.join(registry.key for registry in REGISTRIES)}.")
        schema()  # its options fit beside the others'
    except Exception as error:  # whatever its code raises
        for registry, names in before.items():
            for name in set(registry) - names:
                registry.remove(name)
        kind = "" if isinstance(error, ConfigError) else f"cannot be imported: {type(error).__name__}: "
        raise ConfigError(f"{source.where}: {kind}{first_line(error)}") from error
    assert module.__file__ is not None, "a module that registers has a file"
    folders = module.__spec__.submodule_search_locations if module.__spec__ else None
    place = Path(next(iter(folders))) if folders else Path(module.__file__)
    return _Code(files_digest(place), str(place))


def _registered(module: ModuleType, before: Mapping[Registry[Any], set[str]]) -> bool:
    """Return whether something of a module is registered, by its import now or by one before."""
    return any(
        name not in names or f"{registry[name].__module__}.".startswith(f"{module.__name__}.")
        for registry, names in before.items()
        for name in registry
    )


def _import_file(path: Path) -> ModuleType:
    """Import a file as a module of its own."""
    if not path.is_file():
        raise ConfigError(f"no such file ({path}).")
    name = f"fedlora_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the name ends in .py"
    assert spec.loader is not None, "a file has a loader"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
