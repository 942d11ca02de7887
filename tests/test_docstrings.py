"""The built-in data: docstrings of installed libraries."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fedlora.config import Config, DataConfig
from fedlora.data import docstrings, load_federated
from fedlora.data.docstrings import LIBRARIES, load_docstrings
from fedlora.data.table import Corpus


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_docstrings(Config())


def test_docstrings_are_balanced_and_apart(corpus: Corpus) -> None:
    assert corpus.classes == tuple(LIBRARIES)
    assert np.bincount(corpus.train.labels).tolist() == [200] * 8
    assert np.bincount(corpus.test.labels).tolist() == [100] * 8
    assert len(set(corpus.train.texts + corpus.test.texts)) == 2400
    assert corpus.majority_share(corpus.test) == 0.125


def test_docstrings_do_not_name_their_library(corpus: Corpus) -> None:
    for table in (corpus.train, corpus.test):
        for text, label in zip(table.texts, table.labels, strict=True):
            assert not re.search(rf"\b(?:{LIBRARIES[corpus.classes[label]][1]})\b", text, re.IGNORECASE), text
            name = corpus.classes[label]
            assert name == "ray" or name not in text.lower(), text


@pytest.mark.slow
def test_harvesting_is_deterministic(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the files again, not from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_docstrings(Config()) == corpus
    assert len(list((tmp_path / "fedlora").iterdir())) == 1
    assert load_docstrings(Config()) == corpus


def test_a_missing_library_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(docstrings.LIBRARIES, "nosuch", ("no-such-distribution", "nosuch"))
    with pytest.raises(ValueError, match=r"no-such-distribution, which is not installed. Install it with: pip install"):
        docstrings.versions()


def test_docstrings_have_natural_clients(corpus: Corpus) -> None:
    natural = DataConfig(partition="natural", partition_column="sub-package")
    data = load_federated(Config(data=natural), 0)
    assert len(data.clients) > 50
    assert data.corpus.test == corpus.test.take(np.arange(800)) or data.corpus.test.texts == corpus.test.texts
    for name, rows in zip(data.names, data.clients, strict=True):
        assert {data.corpus.classes[data.corpus.train.labels[row]] for row in rows} == {name.split(".")[0]}
    with pytest.raises(ValueError, match=r"has one such column, sub-package. Did you mean 'sub-package'"):
        load_federated(Config(data=DataConfig(partition="natural", partition_column="subpackage")), 0)
