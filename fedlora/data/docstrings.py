"""The built-in data set: docstrings of installed libraries, to classify by library or to write from a name.

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
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fedlora.config import Config
from fedlora.data.table import Corpus, Table
from fedlora.messages import closest
from fedlora.seeded import Seeded
from fedlora.storage import write_whole

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
_OWNERS = "sub-package"  # the column that rows can be partitioned by
_ENOUGH = 500  # usable texts of a library after which no further file is read
_SPLIT_SEED = 0  # part of the data set's definition: the same test texts whatever the run's seed
_MIN_WORDS = 8
_MAX_CHARACTERS = 400
_FORMAT = 4  # raise when harvesting changes, so that old cache files are not read


@dataclass(frozen=True, order=True)
class Docstring:
    """One usable docstring.

    Attributes:
        text: The docstring, cleaned and cut.
        name: Of what it documents, such as ``Frame.merge``.
        owner: The sub-package that it comes from, such as ``pandas.core``.
    """

    text: str
    name: str
    owner: str


def load_docstrings(config: Config) -> Corpus:
    """Return the corpus: 200 training and 100 test texts of each of eight libraries.

    For ``causal-lm`` the names are prompts and the texts are answers.

    Raises:
        ValueError: A library is not installed, or ``data.partition-column`` is not ``sub-package``.
    """
    column = config.data.partition_column
    if column not in ("", _OWNERS):
        raise ValueError(
            f"data.partition-column = {column!r}: the built-in text has one such column, {_OWNERS}."
            f"{closest(column, [_OWNERS])}"
        )
    drawn, _ = _drawn()
    tables = {}
    for part, rows in drawn.items():
        texts, names = tuple(row.text for row, _ in rows), tuple(_prompt(row) for row, _ in rows)
        language = config.task == "causal-lm"
        tables[part] = Table(
            texts=names if language else texts,
            labels=tuple(label for _, label in rows),
            answers=texts if language else (),
            owners=tuple(row.owner for row, _ in rows) if column else (),
        )
    return Corpus(tables["train"], tables["test"], tuple(LIBRARIES))


def spare_docstrings() -> list[str]:
    """Return the texts that are in neither table, for what may be trained beforehand."""
    _, spare = _drawn()
    return [row.text for row in spare]


def _prompt(row: Docstring) -> str:
    return f"{row.name}: "


def _drawn() -> tuple[dict[str, list[tuple[Docstring, int]]], list[Docstring]]:
    texts = _read_cache()
    if texts is None:
        texts = harvest()
        _write_cache(texts)
    return _split(texts)


def _read_cache() -> dict[str, list[Docstring]] | None:
    """Return the cached texts; None where there are none, or they cannot be read."""
    try:
        texts: dict[str, list[list[str]]] = json.loads(_cache_file().read_text(encoding="utf-8"))
        return {library: [Docstring(*row) for row in rows] for library, rows in texts.items()}
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(texts: dict[str, list[Docstring]]) -> None:
    """Keep the texts for the next run; a folder that cannot be written costs seconds, not the run."""
    path = _cache_file()
    rows = {library: [[row.text, row.name, row.owner] for row in found] for library, found in texts.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rows).encode())  # another process may be writing the same texts
    except OSError as error:
        logging.getLogger(__name__).warning("the texts cannot be cached in %s: %s", path.parent, error)


def harvest() -> dict[str, list[Docstring]]:
    """Return usable docstrings of each library, sorted, each text once over all libraries.

    Files are read in an order that depends on their names alone, until there are enough texts.
    """
    versions()
    texts = {library: sorted(_library_texts(library)) for library in LIBRARIES}
    count = Counter(row.text for library in texts.values() for row in library)
    return {library: [row for row in found if count[row.text] == 1] for library, found in texts.items()}


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


def cache_folder() -> Path:
    """Return where fedlora keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~")) / ".cache") / "fedlora"


def corpus_key() -> str:
    """Return what names this version of the text: equal where the same libraries give the same texts."""
    key = json.dumps([_FORMAT, _MIN_WORDS, _MAX_CHARACTERS, sorted(versions().items())])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _cache_file() -> Path:
    return cache_folder() / f"docstrings-{corpus_key()}.json"


def _split(texts: dict[str, list[Docstring]]) -> tuple[dict[str, list[tuple[Docstring, int]]], list[Docstring]]:
    """Draw the same number of texts of each library, by a seed that is part of the data set; return the rest, too."""
    rows: dict[str, list[tuple[Docstring, int]]] = {"train": [], "test": []}
    spare: list[Docstring] = []
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
        spare += [found[at] for at in order[_TEST_EACH + _TRAIN_EACH :]]
    return rows, spare


def _library_texts(library: str) -> list[Docstring]:
    spec = importlib.util.find_spec(library)
    assert spec is not None, f"{library} has a version but no files"
    assert spec.submodule_search_locations, f"{library} is not a package"
    root = Path(next(iter(spec.submodule_search_locations)))
    mentions = re.compile(rf"\b(?:{LIBRARIES[library][1]})\b", re.IGNORECASE)
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths.sort(key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())
    texts: dict[str, Docstring] = {}
    for path in paths:
        if len(texts) >= _ENOUGH:
            break
        if _is_test(path):
            continue
        owner = ".".join((library, *path.with_suffix("").parts[:1]))
        for name, text in _docstrings(root / path):
            cleaned = _clean(text, mentions)
            if len(cleaned.split()) >= _MIN_WORDS:
                texts.setdefault(cleaned, Docstring(cleaned, name, owner))
    return list(texts.values())


def _is_test(path: Path) -> bool:
    """Whether a file is a library's test, or code of others that the library carries along."""
    parts = {part.lower().lstrip("_") for part in path.parts[:-1]}
    other = {"tests", "test", "testing", "vendor", "vendored", "thirdparty_files", "third_party", "externals", "extern"}
    return bool(parts & other) or path.stem.startswith("test_") or path.stem in ("conftest", "testing")


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield each docstring of a file with the name of what it documents."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    yield from _documented(tree, path.stem)


def _documented(node: ast.AST, name: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        if text := ast.get_docstring(node):
            yield name, text
        prefix = "" if isinstance(node, ast.Module) else f"{name}."
    for child in ast.iter_child_nodes(node):
        yield from _documented(child, f"{prefix}{getattr(child, 'name', '')}", prefix)


def _clean(text: str, mentions: re.Pattern[str]) -> str:
    """Return the text without the library's name, in single spaces, cut at a word."""
    flat = " ".join(mentions.sub(" ", text).split())
    if len(flat) <= _MAX_CHARACTERS:
        return flat
    return flat[:_MAX_CHARACTERS].rsplit(" ", 1)[0]
