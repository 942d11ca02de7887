"""The plug-ins of the tutorial as files, and a process that forgets them again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedlora import plugins
from simulations.options import read_options
from tests.support.tiny import save_tiny_model

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


def tutorial_flat(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return the configuration of the tutorial's command, its files in ``folder``, on a tiny model."""
    files = {file.name: file for file in write_tutorial(folder)}
    (command,) = blocks("console")
    words = shlex.split(command)
    assert words[:2] == ["fedlora", "run"]
    assert set(words[2::2]) == {"-c"}
    flat = read_options(words[3::2])
    flat["run.plugins"] = ",".join(str(files[name]) for name in flat["run.plugins"].split(","))
    tiny = {
        "model.name": save_tiny_model(folder / "model"),
        "federation.num-clients": 3,
        "train.local-steps": 3,
        "method.rank": 2,
        "engine.dtype": "float64",
    }
    return {**tiny, **flat, **changes}
