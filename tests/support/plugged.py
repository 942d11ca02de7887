"""The plug-ins of the tutorial as files, and a process that forgets them again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora import plugins

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


@contextmanager
def forgotten() -> Iterator[None]:
    """Take back, at the end, what plug-ins registered meanwhile."""
    before = {registry: set(registry) for registry in plugins.REGISTRIES}
    loaded = dict(plugins._loaded)
    try:
        yield
    finally:
        for registry, names in before.items():
            for name in set(registry) - names:
                registry.remove(name)
        plugins._loaded.clear()
        plugins._loaded.update(loaded)


def blocks(language: str) -> list[str]:
    """Return the tutorial's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_tutorial(folder: Path) -> list[Path]:
    """Write each Python block into the file that its first line names; return the files."""
    files = []
    for block in blocks("python"):
        name = block.splitlines()[0].removeprefix("# ")
        assert name.endswith(".py"), "a block begins with its file's name"
        (folder / name).write_text(block, encoding="utf-8")
        files.append(folder / name)
    return files
