"""The documents: links lead somewhere, and the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def broken(page: Path, text: str) -> list[str]:
    """Return the relative links of a page whose file, or whose heading in it, is not there."""
    missing = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text(encoding="utf-8"))):
            missing.append(link)
    return missing


def headings(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    return {
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("#")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_a_broken_link_is_seen() -> None:
    text = "[a](docs/none.md) [b](docs/privacy-reference.md#no-such-heading) [c](docs/privacy-reference.md#keys) [d](https://flower.ai)"
    assert broken(ROOT / "README.md", text) == ["docs/none.md", "docs/privacy-reference.md#no-such-heading"]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_that_a_page_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:tests/)?((?:e2e/)?test_\w+\.py)`", page.read_text(encoding="utf-8")))
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()
