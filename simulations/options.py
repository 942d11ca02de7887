"""Reads the configuration as the command line gives it: the app's own, and the ``--run-config`` options over it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from flwr.common.config import get_fused_config_from_dir, parse_config_args

from fedlora.config import ConfigError, Scalar
from fedlora.config.data_keys import corpus_of

DEV_SHARE = 0.1  # of the training rows, for choices, where the configuration does not say
_PAIR = re.compile(r"""\S+?=('[^']*'|"[^"]*"|\S+)""")  # what Flower finds in an option; the rest it drops


def read_overrides(app: Path, run_config: Sequence[str]) -> dict[str, Scalar]:
    """Return the app's own configuration with the ``--run-config`` options over it, by dotted key.

    Flower merges repeated options by section, so that of ``-c train.a=1 -c train.b=2`` only the second
    survives, and drops what it cannot read; here each option counts and must be readable.

    Raises:
        ConfigError: There is no app in the folder, or an option cannot be read.
    """
    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{app} holds no pyproject.toml; run from the checkout of fedlora, or name its folder.")
    overrides = read_options(run_config)
    try:
        defaults = get_fused_config_from_dir(app, {})
    except KeyError as error:
        raise ConfigError(f"{app / 'pyproject.toml'} is not a Flower app: it has no {error} table.") from error
    return {**defaults, **overrides}


def read_options(run_config: Sequence[str]) -> dict[str, Any]:
    """Return what the ``--run-config`` options say, by dotted key.

    Raises:
        ConfigError: An option cannot be read.
    """
    overrides: dict[str, Any] = {}
    for option in run_config:
        try:
            found = parse_config_args([option])
        except (click.ClickException, OSError, ValueError) as error:
            reason = error.message if isinstance(error, click.ClickException) else str(error)
            raise ConfigError(f"--run-config {option!r} cannot be read: {reason}") from error
        unread = "" if option.endswith(".toml") else _PAIR.sub("", option).strip()
        if unread or not found:
            raise ConfigError(
                f"--run-config {option!r}: cannot read {unread or 'anything'!r}; write key=value without spaces around "
                "the sign, and texts in quotes: key='text'."
            )
        overrides |= found
    return overrides


def for_tuning(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's configuration, by dotted key, as ``fedlora tune`` tries it: on dev rows, without the test rows."""
    own = {"eval.test": False, "eval.baselines": False, "eval.generate": 0, "run.trackers": ""}
    share = float(flat.get("data.dev-share") or DEV_SHARE)
    name = str(flat.get("run.name") or f"{time.strftime('%Y%m%d-%H%M%S')}-tune")
    return {**flat, **own, "data.dev-share": share, "run.name": name}


def absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with paths from this folder: the run itself starts in Flower's."""
    flat = dict(flat)
    if isinstance(plugins := flat.get("run.plugins"), str):
        names = [name.strip() for name in plugins.split(",")]
        flat["run.plugins"] = ",".join(_absolute(name) if name.endswith(".py") else name for name in names)
    for key in (
        "run.dir",
        "run.sweep",
        "data.path",
        "data.test-path",
        "data.public-path",
        "model.name",
        "method.start",
    ):
        value = flat.get(key)
        if not isinstance(value, str) or not value:
            continue
        if not _may_be_of_the_hub(key, value, flat.get("data.name")) or Path(value).expanduser().is_dir():
            flat[key] = _absolute(value)
    return flat


def _may_be_of_the_hub(key: str, value: str, data_name: object) -> bool:
    if key == "data.path":
        return data_name == "hub" or (data_name in ("auto", None) and corpus_of(value) == "hub")
    return key == "model.name"


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
