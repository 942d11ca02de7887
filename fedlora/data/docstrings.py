"""The built-in text: which library does this docstring come from?

Docstrings of eight libraries that are installed beside fedlora, read with ``ast`` (nothing is imported), tests
left out, every mention of the library's own name removed. Real text of real authors, with nothing to
download. The same versions give the same texts on every machine; they are kept in a cache file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from fedlora.data.table import Corpus, Table
from fedlora.seeded import Seeded

# Import name: (distribution, what gives the library away). A name goes with the whole word around it
# (``torch_dtype``, ``TorchScript``); where that would take innocent words too (``array``), only its own forms.
LIBRARIES: dict[str, tuple[str, str]] = {
    "numpy": ("numpy", r"\w*numpy\w*|np"),
    "scipy": ("scipy", r"\w*scipy\w*|sp"),
    "sklearn": ("scikit-learn", r"\w*sklearn\w*|scikit-learn|\w*scikit\w*"),
    "pandas": ("pandas", r"\w*pandas\w*|pd"),
    "torch": ("torch", r"\w*torch\w*"),
    "transformers": ("transformers", r"\w*transformers\w*|hugging ?face"),
    "ray": ("ray", r"ray|ray_\w+|\w+_ray|(?-i:Ray[A-Z]\w*)|\w*rllib\w*|\w*anyscale\w*"),
    "sqlalchemy": ("SQLAlchemy", r"\w*sqlalchemy\w*"),
}
_TRAIN_EACH = 200
_TEST_EACH = 100
_ENOUGH = 500  # usable texts of a library after which no further file is read
_SPLIT_SEED = 0  # part of the data set's definition: the same test texts whatever the run's seed
_MIN_WORDS = 8
_MAX_CHARACTERS = 400
_FORMAT = 3  # raise when harvesting changes, so that old cache files are not read


def load_docstrings() -> Corpus:
    """Return the corpus: 200 training and 100 test texts of each of eight libraries.

    Raises:
        ValueError: A library is not installed.
    """
    texts = _read_cache()
    if texts is None:
        texts = harvest()
        _write_cache(texts)
    return _split(texts)


def _read_cache() -> dict[str, list[str]] | None:
    """Return the cached texts; None where there are none, or they cannot be read."""
    try:
        texts: dict[str, list[str]] = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return texts


def _write_cache(texts: dict[str, list[str]]) -> None:
    """Keep the texts for the next run; a folder that cannot be written costs seconds, not the run."""
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(texts, file)
        Path(name).replace(path)  # another process may be writing the same texts
    except OSError as error:
        logging.getLogger(__name__).warning("the texts cannot be cached in %s: %s", path.parent, error)


def harvest() -> dict[str, list[str]]:
    """Return usable docstrings of each library, sorted, each text once over all libraries.

    Files are read in an order that depends on their names alone, until there are enough texts.
    """
    versions()
    texts = {library: sorted(_library_texts(library)) for library in LIBRARIES}
    count: dict[str, int] = {}
    for library in texts.values():
        for text in library:
            count[text] = count.get(text, 0) + 1
    return {library: [text for text in found if count[text] == 1] for library, found in texts.items()}


def versions() -> dict[str, str]:
    """Return the installed version of each library.

    Raises:
        ValueError: One is missing.
    """
    found: dict[str, str] = {}
    for library, (distribution, _) in LIBRARIES.items():
        try:
            found[library] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(
                f"data.name = 'docstrings' reads the docstrings of {distribution}, which is not installed. Install it "
                f"with: pip install {distribution} (all eight come with the extra fedlora[demo]), or set data.name."
            ) from error
    return found


def _cache_file() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache")
    key = json.dumps([_FORMAT, _MIN_WORDS, _MAX_CHARACTERS, sorted(versions().items())])
    return root / "fedlora" / f"docstrings-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _split(texts: dict[str, list[str]]) -> Corpus:
    """Draw the same number of texts of each library, by a seed that is part of the data set."""
    rows: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    seeded = Seeded(_SPLIT_SEED)
    for label, (library, found) in enumerate(texts.items()):
        if len(found) < _TRAIN_EACH + _TEST_EACH:
            raise ValueError(
                f"data.name = 'docstrings': {library} {versions()[library]} has {len(found)} usable docstrings, fewer "
                f"than the {_TRAIN_EACH + _TEST_EACH} that are needed; install another version."
            )
        order = seeded.permutation("docstrings", library, size=len(found))
        rows["test"] += [(found[at], label) for at in order[:_TEST_EACH]]
        rows["train"] += [(found[at], label) for at in order[_TEST_EACH : _TEST_EACH + _TRAIN_EACH]]
    tables = {
        part: Table(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))
        for part, pairs in rows.items()
    }
    return Corpus(tables["train"], tables["test"], tuple(texts))


def _library_texts(library: str) -> set[str]:
    spec = importlib.util.find_spec(library)
    assert spec is not None, f"{library} has a version but no files"
    assert spec.submodule_search_locations, f"{library} is not a package"
    root = Path(next(iter(spec.submodule_search_locations)))
    mentions = re.compile(rf"\b(?:{LIBRARIES[library][1]})\b", re.IGNORECASE)
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    texts: set[str] = set()
    for path in paths:
        if len(texts) >= _ENOUGH:
            break
        if not _is_test(path):
            cleaned = (_clean(text, mentions) for text in _docstrings(root / path))
            texts.update(text for text in cleaned if len(text.split()) >= _MIN_WORDS)
    return texts


def _is_test(path: Path) -> bool:
    """Whether a file is a library's test, or code of others that the library carries along."""
    parts = {part.lower().lstrip("_") for part in path.parts[:-1]}
    other = {"tests", "test", "testing", "vendor", "vendored", "thirdparty_files", "third_party", "externals", "extern"}
    return bool(parts & other) or path.stem.startswith("test_") or path.stem in ("conftest", "testing")


def _docstrings(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                yield text


def _clean(text: str, mentions: re.Pattern[str]) -> str:
    """Return the text without the library's name, in single spaces, cut at a word."""
    flat = " ".join(mentions.sub(" ", text).split())
    if len(flat) <= _MAX_CHARACTERS:
        return flat
    return flat[:_MAX_CHARACTERS].rsplit(" ", 1)[0]
