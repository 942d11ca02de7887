"""Writes what is generated from :mod:`fedlora.config` (``make config``).

That is the table ``[tool.flwr.app.config]`` of ``pyproject.toml``, and ``docs/configuration.md``.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

from fedlora import config as config_module
from fedlora.config import Config, to_toml

_HEADER = "[tool.flwr.app.config]\n"


def with_defaults(pyproject: str) -> str:
    """Return the text of a ``pyproject.toml`` with the configuration table generated anew."""
    before, found, rest = pyproject.partition(_HEADER)
    assert found, f"pyproject.toml has no {_HEADER.strip()} table"
    following = rest.find("\n[")
    return before + _HEADER + to_toml(Config().to_flat()) + (rest[following:] if following >= 0 else "")


def reference() -> str:
    """Return ``docs/configuration.md``: every key with its default and what its field's docstring says."""
    meanings = _meanings()
    lines = [
        "# Configuration",
        "",
        "Generated from `fedlora/config.py` by `make config`. Set keys with",
        "`fedlora run -c \"key=value key='text'\"` or `-c file.toml`; `flwr run` takes the same.",
        "",
        "| key | default | meaning |",
        "| --- | --- | --- |",
    ]
    for line in to_toml(Config().to_flat()).splitlines():
        key, default = line.split(" = ", 1)
        lines.append(f"| `{key}` | `{default}` | {meanings[key]} |")
    return "\n".join(lines) + "\n"


def _meanings() -> dict[str, str]:
    """Return the docstring after each field, by dotted key."""
    meanings: dict[str, str] = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if not isinstance(node, ast.ClassDef) or not node.name.endswith("Config"):
            continue
        section = node.name.removesuffix("Config").lower()
        for field, text in zip(node.body, node.body[1:], strict=False):
            match field, text:
                case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning)))):
                    key = name.replace("_", "-")
                    meanings[f"{section}.{key}" if section else key] = " ".join(meaning.split()).replace("``", "`")
    return meanings


def main(root: str) -> None:
    """Rewrite the generated parts of the project in the folder ``root``."""
    pyproject = Path(root) / "pyproject.toml"
    pyproject.write_text(with_defaults(pyproject.read_text(encoding="utf-8")), encoding="utf-8")
    (Path(root) / "docs" / "configuration.md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
