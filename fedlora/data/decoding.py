"""From a file's bytes to its text: which kind of file it is, whether it is packed, and its encoding.

Encodings are not guessed: a text is in UTF-8, or in what its byte-order mark says.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

_HEAD = 64  # bytes by which a kind of file is known
_KNOWN_BY = (
    (b"version https://git-lfs", "it is a Git LFS pointer in place of the file; run git lfs pull"),
    (b"<!doctype html", "it is a web page; download the file itself"),
    (b"<html", "it is a web page; download the file itself"),
)
_BINARY = (
    (b"PK\x03\x04", "it is a zip archive or an Excel workbook; unpack it, or save it as csv"),
    (b"\xd0\xcf\x11\xe0", "it is an Excel workbook; save it as csv"),
    (b"\x1f\x8b", "it is packed by gzip; let its name end in .gz, such as data.csv.gz"),
    (b"PAR1", "it is a parquet file; let its name end in .parquet"),
)
_MARKS = (  # the longer first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def check_kind(head: bytes, *, binary: bool) -> None:
    """Refuse what is another kind of file than its name says, by its first bytes.

    Args:
        head: The first bytes.
        binary: Whether the name promises a file that is no text.

    Raises:
        ValueError: It is another kind.
    """
    start = head[:_HEAD].lstrip().lower()
    for begins, what in _KNOWN_BY:
        if start.startswith(begins):
            raise ValueError(what)
    for begins, what in () if binary else _BINARY:
        if head.startswith(begins):
            raise ValueError(what)


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in what its byte-order mark says; ``.gz`` is unpacked.

    Raises:
        ValueError: It is empty, is no text, or is in another encoding.
        OSError: It cannot be opened.
    """
    raw = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError("gzip has not packed it, or it is cut short; write it again") from error
    check_kind(raw[:_HEAD], binary=False)
    mark, encoding = next(((mark, name) for mark, name in _MARKS if raw.startswith(mark)), (b"", "utf-8"))
    raw = raw[len(mark) :]
    if not raw.strip():
        raise ValueError("it is empty")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line} is not in {encoding.upper()} (byte 0x{raw[error.start]:02x}); save the file in UTF-8, such "
            "as by: iconv -f WINDOWS-1252 -t UTF-8 old > new, with the encoding that it has"
        ) from error
    if (at := text.find("\0")) >= 0:
        raise ValueError(
            f"line {text.count(chr(10), 0, at) + 1} holds a NUL character: this is no text, or UTF-16 without its "
            "byte-order mark; save the file in UTF-8"
        )
    return text
