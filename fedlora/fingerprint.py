"""A fingerprint of the code that a process runs, so that two sides can see whether theirs is the same.

Ray workers look for modules in the working directory of the process that started them before they look in
the installed Flower app; with names like ``clients`` two checkouts are easily mixed up, silently.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

CLIENT_PACKAGES = ("fedlora", "clients")


@functools.cache
def code_fingerprint(packages: tuple[str, ...] = CLIENT_PACKAGES) -> tuple[str, str]:
    """Return the digest of the packages' Python files as this process imports them, and their folders.

    Returns:
        A SHA-256 digest, and the folders, separated by commas.
    """
    sha = hashlib.sha256()
    folders: list[str] = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        assert spec is not None, f"{package} cannot be imported"
        assert spec.submodule_search_locations, f"{package} is not a package"
        folder = Path(next(iter(spec.submodule_search_locations)))
        folders.append(str(folder.resolve()))
        sha.update(f"{package}/{files_digest(folder)}\0".encode())
    return sha.hexdigest(), ", ".join(folders)


def files_digest(place: Path) -> str:
    """Return a SHA-256 digest of a Python file, or of all those in a folder with their names."""
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    sha = hashlib.sha256()
    for path in sorted(place.rglob("*.py")):
        sha.update(f"{path.relative_to(place).as_posix()}\0".encode())
        sha.update(path.read_bytes() + b"\0")
    return sha.hexdigest()
