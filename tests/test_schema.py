"""The schema: sections of plug-ins, how their options must be declared, and keys that it does not know."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fedlora.config import Config, ConfigError, Options, Schema
from fedlora.methods import MosOptions, S2Options
from fedlora.plugins import read_config, schema


def test_a_section_is_read_by_its_type() -> None:
    """A configuration made by hand has a plug-in's defaults; the schema's has all sections."""
    assert Config().options(MosOptions) == MosOptions()
    assert Config().with_options(MosOptions(budget=9)).options(MosOptions).budget == 9
    config = read_config({"mos.budget": 9})
    assert (config.options(MosOptions).budget, config.options(S2Options)) == (9, S2Options())
    assert config.with_options(MosOptions()) == read_config({})


def test_keys_of_unknown_sections_are_kept_where_asked() -> None:
    """A report reads a run whose plug-in is not there; an unknown key of a known section stays an error."""
    flat = {"gamma.strength": 2.0, "gamma.depth": 3}
    with pytest.raises(ConfigError, match=r"unknown key 'gamma.strength'"):
        schema().read(flat)
    config = schema().read(flat, foreign=True)
    assert {key: config.to_flat()[key] for key in flat} == flat
    for key in ("mos.gamma", "gamma"):
        with pytest.raises(ConfigError, match=f"unknown key {key!r}"):
            schema().read({key: 1}, foreign=True)


@dataclass(frozen=True)
class Unread(Options):
    section = "mos"


class Undeclared(Options):
    section = "toy"
    strength: float = 1.0


@dataclass(frozen=True)
class Listed(Options):
    section = "toy"
    strengths: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bare(Options):
    section = "toy"
    strength: float


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unread, r"Unread.section = 'mos': is MosOptions's section"),
        (Undeclared, r"Undeclared must be declared with @dataclass\(frozen=True\)"),
        (Listed, r"Listed.strengths: must be a bool, int, float or str"),
        (Bare, r"Bare: every field needs a default"),
    ],
)
def test_options_are_declared_as_they_must_be(kind: type[Options], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schema([MosOptions, kind])


@pytest.mark.parametrize("section", ["train", "seed", "grid", "", "a.b"])
def test_sections_are_words_that_nobody_has(section: str) -> None:
    kind = type("Taken", (Options,), {"section": section})
    with pytest.raises(ConfigError, match=r"Taken.section = "):
        Schema([kind])
