"""From flat, untyped values to typed fields and back: coercion, rules with their error messages, TOML.

Flower hands a configuration over as dotted keys (``train.batch-size = 16``). The rules below are what sections and
plug-ins' options check their fields with; each raises a :class:`ConfigError` that names key, value and cure.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.messages import closest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Scalar = bool | int | float | str


class ConfigError(ValueError):
    """The configuration cannot work; the message names the key, the value and the cure."""


@dataclass(frozen=True)
class Options:
    """Keys of a plug-in: a frozen dataclass beside the class that it configures, with a docstring after each field.

    It is registered with that class (``METHODS.register("gamma", GammaOptions)``), and read as
    ``config.options(GammaOptions)``. Fields are booleans, numbers or texts, and have defaults; ``__post_init__`` checks
    them with :func:`require` and the like.
    """

    section: ClassVar[str]
    """What its keys begin with: ``gamma`` for ``gamma.strength``."""


# -- rules ----------------------------------------------------------------------------------------------------


def require(condition: bool, key: str, value: Scalar, rule: str) -> None:
    """Raise ``key = value: rule`` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key} = {value!r}: {rule}")


def at_least(key: str, value: float, low: float) -> None:
    """Refuse a value below ``low``."""
    require(value >= low, key, value, f"must be at least {low}.")


def positive(key: str, value: float) -> None:
    """Refuse zero and below."""
    require(value > 0, key, value, "must be greater than 0.")


def share(key: str, value: float) -> None:
    """Refuse what is outside [0, 1)."""
    require(0.0 <= value < 1.0, key, value, "must be at least 0 and below 1.")


def one_of(key: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that is not among the ``known`` ones, and suggest the closest."""
    if value not in known:  # the closest is looked for among all, which a sweep of thousands of cells would wait for
        require(False, key, value, f"must be one of {', '.join(known)}.{closest(value, known)}")


def unread(section: DataclassInstance, name: str, field_name: str, rule: str) -> None:
    """Refuse a field of the section called ``name`` that was set (is not its default) where nothing reads it."""
    default = next(item.default for item in fields(section) if item.name == field_name)
    value = getattr(section, field_name)
    require(value == default, dotted(name, field_name), value, rule)


# -- keys and types -------------------------------------------------------------------------------------------

_NUMBERED = "numbered"
_KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
}


def dotted(section: str, name: str) -> str:
    """Return the key of a section's field: ``train.batch-size``; without a section ``batch-size``."""
    key = name.replace("_", "-")
    return f"{section}.{key}" if section else key


def numbered(default: str) -> Any:
    """Return a field for a name that may also be a whole number, such as that of a column."""
    return field(default=default, metadata={_NUMBERED: True})


def coerce(key: str, value: Any, kind: type, item: Field[Any]) -> Scalar:
    """Return ``value`` as ``kind``, the type of the field ``item``; only a whole number may stand for a float.

    Raises:
        ConfigError: It is of another type, not finite or too large.
    """
    if item.metadata.get(_NUMBERED) and type(value) is int:
        value = str(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**53 else math.inf
    if type(value) is not kind or not isinstance(value, Scalar):
        raise ConfigError(f"{key} = {value!r}: must be {_KINDS[kind]}, not {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r}: must be a finite number.")
    if isinstance(value, int) and abs(value) >= 2**53:
        raise ConfigError(f"{key} = {value!r}: is too large.")
    return value


# -- TOML -----------------------------------------------------------------------------------------------------


def to_toml(flat: Mapping[str, Scalar | list[Scalar]]) -> str:
    """Return dotted keys as TOML lines that ``--run-config`` reads (lists are for sweeps)."""
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in flat.items())


def from_toml(text: str) -> dict[str, Any]:
    """Return the dotted keys of a TOML text, the inverse of :func:`to_toml`.

    Raises:
        tomllib.TOMLDecodeError: The text is not TOML.
    """
    return flatten(tomllib.loads(text))


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted key, each behind a prefix."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _toml_value(value: Scalar | list[Scalar]) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else {"\\": "\\\\", '"': '\\"'}.get(char, char)
            for char in value
        )
        return f'"{escaped}"'
    return repr(value)
