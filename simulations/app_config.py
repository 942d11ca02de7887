"""Writes the defaults of :mod:`fedlora.config` into ``[tool.flwr.app.config]`` (``make config``)."""

from __future__ import annotations

import sys
from pathlib import Path

from fedlora.config import Config, to_toml

_HEADER = "[tool.flwr.app.config]\n"


def with_defaults(pyproject: str) -> str:
    """Return the text of a ``pyproject.toml`` with the configuration table generated anew."""
    before, found, rest = pyproject.partition(_HEADER)
    assert found, f"pyproject.toml has no {_HEADER.strip()} table"
    following = rest.find("\n[")
    return before + _HEADER + to_toml(Config().to_flat()) + (rest[following:] if following >= 0 else "")


def main(path: str) -> None:
    """Rewrite the file at ``path``."""
    file = Path(path)
    file.write_text(with_defaults(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
