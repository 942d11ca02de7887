"""Files as programs and people leave them: each is read as it is meant, or refused with file, line, cause and cure."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.config import Config, DataConfig
from fedlora.data import load_corpus
from fedlora.data.files import load_file_corpus
from fedlora.data.text_files import parse_json, parse_separated

ROWS = [(f"film {n}", ("bad", "good")[n % 2]) for n in range(12)]
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
TSV = CSV.replace(",", "\t")
OBJECTS = [{"text": text, "label": label} for text, label in ROWS]
LINES = "".join(json.dumps(one) + "\n" for one in OBJECTS)


def read(path: Path, content: str | bytes, **changes: Any) -> list[tuple[str, str]]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    data = DataConfig(path=str(path), **{"test_path": str(path), **changes})
    corpus = load_file_corpus(Config(data=data))
    return [(text, corpus.classes[n]) for text, n in zip(corpus.train.texts, corpus.train.labels, strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("byte-order mark.csv", b"\xef\xbb\xbf" + CSV.encode()),
        ("excel's unicode text.csv", CSV.encode("utf-16")),
        ("big end.csv", b"\xfe\xff" + CSV.encode("utf-16-be")),
        ("utf-32.tsv", TSV.encode("utf-32")),
        ("windows.csv", CSV.replace("\n", "\r\n")),
        ("old mac.csv", CSV.replace("\n", "\r")),
        ("blank lines.csv", "\n" + CSV.replace("\n", "\n\n")),
        ("no last line end.csv", CSV.rstrip()),
        ("semicolons.csv", CSV.replace(",", ";")),
        ("tabs.csv", TSV),
        ("excel's separator.csv", "sep=;\n" + CSV.replace(",", ";")),
        ("spaces after commas.csv", CSV.replace(",", ", ")),
        ("packed.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("LOUD.CSV", CSV),
        ("windows.tsv", TSV.replace("\n", "\r\n")),
        ("lines.jsonl", LINES),
        ("lines.ndjson", LINES),
        ("windows.jsonl", b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode()),
        ("lines.json", LINES),
        ("array.json", json.dumps(OBJECTS)),
        ("pretty.json", json.dumps(OBJECTS, indent=2)),
        ("array.jsonl", json.dumps(OBJECTS)),
        ("columns.json", json.dumps({name: [one[name] for one in OBJECTS] for name in ("text", "label")})),
        ("pandas.json", str(pd.DataFrame(OBJECTS).to_json())),
        ("packed.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
    ],
)
def test_what_programs_write_is_read(name: str, content: str | bytes, tmp_path: Path) -> None:
    assert read(tmp_path / name, content) == ROWS


def tsv(first: str) -> str:
    return TSV.replace("film 0", first, 1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (tsv('He said "hi"'), 'He said "hi"'),
        (tsv('"film'), '"film'),
        (tsv('"Great" film'), '"Great" film'),
        (tsv('"Great film"'), '"Great film"'),  # nothing says that it is not part of the text
        (tsv('"Wow').replace("film 3", 'so good"'), '"Wow'),  # as csv the lines between would be one text
        (tsv('"He said ""hi"""'), 'He said "hi"'),
        (tsv('"a\tb"'), "a\tb"),
        (tsv('"a\nb"'), "a\nb"),
    ],
)
def test_quotes_in_tsv_are_what_the_file_makes_of_them(content: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path / "data.tsv", content) == [(text, "bad"), *read(tmp_path / "data.tsv", content)[1:]]
    assert len(read(tmp_path / "data.tsv", content)) == len(ROWS)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.sampled_from(",\t"), st.booleans())
def test_whatever_the_csv_module_writes_is_read_back(rows: list[tuple[str, str]], sign: str, everything: bool) -> None:
    """Text with quotes, line ends, separators, spaces; also where all is in quotes."""
    rows = [('\'tis "so"', "x"), *rows]  # what tells a tsv with quotes as syntax from one where they are text
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=sign, quoting=csv.QUOTE_ALL if everything else csv.QUOTE_MINIMAL)
    writer.writerows([("text", "label"), *rows])
    parsed = parse_separated(file.getvalue(), tabs=sign == "\t", header=True)
    assert [tuple(row) for row in parsed.rows] == rows


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.none() | cells | st.integers(), min_size=1), min_size=1))
def test_json_lines_and_arrays_say_the_same(values: list[dict[str, Any]]) -> None:
    lines = parse_json("\n".join(map(json.dumps, values)) + "\n")
    array = parse_json(json.dumps(values, indent=1))
    assert (lines.columns, lines.rows) == (array.columns, array.rows)
    assert list(lines.lines) == list(range(1, len(values) + 1))
    assert [{name: row[n] for n, name in enumerate(lines.columns)} for row in lines.rows] == [
        {name: value.get(name) for name in lines.columns} for value in values
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"it is empty"),
        ("a.csv", "\n \n", r"it is empty"),
        ("a.csv", "text,label\n", r"there are no rows after its header"),
        ("a.json", "[]", r"it is empty"),
        ("a.csv", CSV.replace("film 3", "café").encode("latin-1"), r"line 5 is not in UTF-8 \(byte 0xe9\); .*iconv"),
        (
            "a.csv",
            CSV.encode("utf-16-le"),
            r"line 1 holds a NUL character: .* UTF-16 without its byte-order mark; save",
        ),
        ("a.jsonl", LINES.replace("film 3", "fi\0lm"), r"line 4 holds a NUL character"),
        (
            "a.csv",
            CSV.replace("film 3", "fi, lm"),
            r"line 5 has 3 fields, .* columns \(2\); put texts that .* in quotes",
        ),
        (
            "a.csv",
            CSV.replace("film 3,", "film 3 "),
            r"line 5 has 1 field\(s\), fewer fields than its header .*complete",
        ),
        ("a.csv", CSV.replace("film 3", '"two\nlines"').replace("film 4", "fi, lm"), r"line 7 has 3 fields"),
        ("a.csv", CSV.replace("film 3", '"film'), r"line 5: a quote is opened and not closed .* double quotes"),
        ("a.csv", CSV.replace("film 3", '"so "good" film"'), r"line 5: a quote is opened and not closed"),
        ("a.csv", CSV.replace("text,label", "text,text"), r"header names the column 'text' twice; rename or remove"),
        ("a.csv", CSV.replace("text,label", "label , label"), r"header names the column 'label' twice"),
        ("a.tsv", tsv("fi\tlm"), r"line 2 has 3 fields, more fields than its header names columns"),
        (
            "a.jsonl",
            LINES.replace('"film 3",', '"film 3"'),
            r"line 4 is not JSON \(Expecting ',' delimiter at column 19",
        ),
        ("a.jsonl", LINES.replace('"film 0", ', ""), r"line 1 is not JSON"),
        ("a.jsonl", LINES.rstrip("}\n"), r"line 12 is not JSON"),
        ("a.json", json.dumps(OBJECTS, indent=1).replace('"film 3",', '"film 3"'), r"line 16 is not JSON"),
        ("a.jsonl", LINES.replace(json.dumps(OBJECTS[3]), "[1]"), r"line 4 is no object; each row must be one"),
        ("a.json", "[1, 2]", r"element 0 \(from 0\) is no object"),
        ("a.json", json.dumps({"rows": OBJECTS}, indent=1), r"it is one object; write an array of objects"),
        ("a.jsonl", LINES.replace('"film 3"', '"x", "text": "y"'), r"line 4: an object has the key 'text' twice"),
        ("a.csv.gz", CSV, r"gzip has not packed it, or it is cut short"),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-9], r"gzip has not packed it, or it is cut short"),
        ("a.csv", gzip.compress(CSV.encode(), mtime=0), r"it is packed by gzip; let its name end in .gz"),
        ("a.csv", b"PK\x03\x04\0", r"it is a zip archive or an Excel workbook; unpack it, or save it as csv"),
        ("a.csv", b"PAR1", r"it is a parquet file; let its name end in .parquet"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"a Git LFS pointer .* run git lfs pull"),
        ("a.json", "\n<!DOCTYPE html><html>", r"it is a web page; download the file itself"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    kind = name.removesuffix(".gz").partition(".")[2]
    with pytest.raises(ValueError, match=rf"^data.path = '.*{name}': cannot be read as {kind}: .*{message}") as caught:
        read(tmp_path / name, content, test_path="")
    assert "film" not in str(caught.value), "an error quotes no row"
    assert "\n" not in str(caught.value)


def test_a_long_text_is_a_text(tmp_path: Path) -> None:
    """The csv module's own limit is 128 KiB, and is the module's again afterwards."""
    limit = csv.field_size_limit()
    long = "word " * 50_000
    assert read(tmp_path / "a.csv", CSV.replace("film 0", long))[0] == (long, "bad")
    assert csv.field_size_limit() == limit


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a", "b"])] * 2, names=["text", "text"]), path)
    with pytest.raises(ValueError, match=r"a.parquet': cannot be read as parquet: it has the column 'text' twice"):
        load_file_corpus(Config(data=DataConfig(path=str(path))))


def test_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    """After a text of two lines and a blank line a row's number says little."""
    content = CSV.replace("film 1,", '"two\nlines",').replace("film 2,", "\n,")
    with pytest.raises(
        ValueError, match=r"1 rows have no text \(column 'text'\), the first is row 2 \(line 6\); remove"
    ):
        read(tmp_path / "a.csv", content)


def test_what_is_no_file(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_file_corpus(Config(data=DataConfig(name="file", path=str(path))))

    refused(tmp_path, r"is a folder; name a file in it, or, .* leave data.name out")
    refused(tmp_path / "no.csv", r"no such file")
    refused(Path(os.devnull), r"no such file")
    refused(tmp_path / f"{'long' * 100}.csv", r"cannot be opened \(File name too long\)")
    (tmp_path / "book.xlsx").write_bytes(b"PK\x03\x04")
    refused(tmp_path / "book.xlsx", r"must end in .csv, .tsv, .jsonl or .parquet \(known are .*\.gz after them\)")


# -- a path alone ---------------------------------------------------------------------------------------------


def test_a_path_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.plugins import read_config
    from simulations.options import absolute_paths, read_overrides
    from simulations.setup import resolve

    def name_of(path: str, **flat: Any) -> str:
        app = Path(__file__).parents[1]
        asked = absolute_paths({**read_overrides(app, [f"data.path='{path}'"]), **flat})
        monkeypatch.chdir(tmp_path)
        config = resolve(asked)
        assert read_config(config.to_flat()) == config, "as a run's folder keeps it"
        assert config.data.path == asked["data.path"]
        return f"{config.data.name} {config.data.path}"

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "reviews.csv").write_text(CSV)
    (tmp_path / "odd.name").write_text(CSV)
    assert name_of("") == "docstrings "
    assert name_of("reviews.csv") == f"file {tmp_path}/reviews.csv"
    assert name_of("odd.name") == f"file {tmp_path}/odd.name"
    assert name_of("still to come.jsonl.gz") == f"file {tmp_path}/still to come.jsonl.gz"
    assert name_of("folder") == f"hub {tmp_path}/folder"
    assert name_of("stanfordnlp/imdb") == "hub stanfordnlp/imdb"
    assert name_of("imdb") == "hub imdb"
    assert name_of("imdb", **{"data.name": "file"}) == f"file {tmp_path}/imdb"
    with pytest.raises(
        ValueError, match=r"data.path = '/no/such/folder': there is no such file or folder, and it is no"
    ):
        name_of("/no/such/folder")
    with pytest.raises(ValueError, match=r"data.path = 'https://.*csv': is an address; download the data"):
        name_of("https://example.org/data.csv")
    assert len(load_corpus(resolve({"data.path": "reviews.csv"})).train) == 10
