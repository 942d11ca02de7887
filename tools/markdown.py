"""Tables in pages of ``docs/``: generated lines between a pair of marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

Table = Callable[[], list[str]]
"""Makes a table's lines of Markdown."""


def with_tables(text: str, tables: Mapping[str, Table]) -> str:
    """Return the text of a page with every one of ``tables`` made anew between its marks."""
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        assert all([mark, end]), f"no pair of marks for the table {name}"
        text = "".join([before, mark, *(f"{line}\n" for line in table()), end, after])
    return text


def rewrite(page: Path, tables: Mapping[str, Table]) -> None:
    """Make the tables of a page anew."""
    page.write_text(with_tables(page.read_text(encoding="utf-8"), tables), encoding="utf-8")
