"""Joining: what a site is told, by what digest both sides name it, and what must agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedlora.codec import WireError
from fedlora.config import Config
from fedlora.headers import HeaderReader
from fedlora.joining import PROTOCOL, JoinReport, JoinRequest, said
from fedlora.wire import (
    read_join_report,
    read_join_request,
    write_join_report,
    write_join_request,
)

FLAT = Config().to_flat()
REQUEST = JoinRequest("north", 1, 3, FLAT)
REPORT = JoinReport("north", "", PROTOCOL, "0.1", "f", 24, "d" * 64, "i" * 64, "c" * 64, "cpu", 2, 1)
scalars = st.one_of(st.booleans(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.text(max_size=8))


def other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


def test_a_request_arrives_as_what_a_site_is_told() -> None:
    back = read_join_request(write_join_request(REQUEST))
    assert (back.site, back.client, back.clients, back.protocol) == ("north", 1, 3, PROTOCOL)
    assert dict(back.flat) == said(FLAT)
    assert back.job == REQUEST.job


@given(st.dictionaries(st.text(max_size=8), scalars, max_size=6))
def test_both_sides_name_a_job_alike(flat: dict[str, Any]) -> None:
    """Any plain values: a number that another machine reads as another one would make another job."""
    request = JoinRequest("north", 0, 1, flat)
    assert read_join_request(write_join_request(request)).job == request.job


SERVERS = {
    *(key for key in FLAT if key.startswith(("federation.", "eval.", "server."))),
    *(
        "rounds",
        "run.dir",
        "run.resume",
        "run.sweep",
        "run.share",
        "run.trackers",
        "data.name",
        "data.path",
        "data.test-path",
        "data.public-path",
    ),
    *("data.subset", "data.train-split", "data.test-split", "data.text-column", "data.label-column"),
    *("data.answer-column", "data.header", "data.partition", "data.alpha", "data.shards-per-client"),
    *("data.partition-column", "data.min-size", "data.holdout", "data.dev-share"),
}


@pytest.mark.parametrize("key", sorted(FLAT))
def test_a_job_is_another_exactly_if_the_site_is_told_something_else(key: str) -> None:
    """The planted bug: a resumed run with more rounds, or a longer timeout, that no site would know any more."""
    changed = replace(REQUEST, flat={**FLAT, key: other(FLAT[key])})
    assert (changed.job == REQUEST.job) == (key in SERVERS)
    assert (key in said(changed.flat)) == (key not in SERVERS)


@pytest.mark.parametrize("change", [{"site": "south"}, {"client": 0}, {"clients": 4}])
def test_each_site_has_a_job_of_its_own(change: dict[str, Any]) -> None:
    assert replace(REQUEST, **change).job != REQUEST.job


def test_a_path_of_the_servers_does_not_reach_a_site() -> None:
    """Neither by a request of ours nor by one that somebody else has written."""
    forged = {**REQUEST.header(), "flat": '{"data.path": "/etc/passwd", "federation.roster": "x", "seed": 3}'}
    assert dict(JoinRequest.read(HeaderReader(forged, "join")).flat) == {"seed": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": 3}, "client 3 of 3: must be one of them"),
        ({"client": -1}, "client -1 of 3: must be one of them"),
        ({"clients": 2**40}, f"client 1 of {2**40}: must be one of them, of 1048576 at most"),
        ({"client": True}, "join.client is not int"),
        ({"client": 1.0}, "join.client is not int"),
        ({"site": 3}, "join.site is not str"),
        ({"protocol": "1"}, "join.protocol is not int"),
        ({"flat": {}}, "join.flat is not str"),
        ({"flat": "{"}, "the configuration cannot be read"),
        ({"flat": "[" * 100_000}, "the configuration cannot be read"),
        ({"flat": "[]"}, "the configuration is not a table of plain values"),
        ({"flat": '{"seed": [1]}'}, "the configuration is not a table of plain values"),
        ({"flat": '{"seed": null}'}, "the configuration is not a table of plain values"),
    ],
)
def test_a_request_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        JoinRequest.read(HeaderReader({**REQUEST.header(), **change}, "join"))


@pytest.mark.parametrize("key", ["site", "client", "clients", "flat", "protocol"])
def test_a_request_that_lacks_something_is_refused(key: str) -> None:
    header = {name: value for name, value in REQUEST.header().items() if name != key}
    with pytest.raises(WireError, match=f"join.{key} is not "):
        JoinRequest.read(HeaderReader(header, "join"))


@pytest.mark.parametrize("report", [REPORT, JoinReport("north", "it must not"), JoinReport("", "no daemon")])
def test_a_report_arrives_with_all_its_fields(report: JoinReport) -> None:
    assert read_join_report(write_join_report(report)) == report


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rows": "24"}, "joined.rows is not int"), ({"rows": True}, "rows is not int"), ({"site": 3}, "site is not str")],
)
def test_a_report_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=message):
        JoinReport.read(HeaderReader({**REPORT.header(), **change}, "joined"))
    with pytest.raises(WireError, match="the message holds no joined"):
        read_join_report(RecordDict({"reply": ConfigRecord({})}))


def test_what_differs_is_named_with_both_values() -> None:
    own = replace(REPORT, site="", rows=0, device="cuda", threads=8, trainers=0)
    assert REPORT.differs(own) == ""
    for field, words in (
        ("protocol", "the version of the protocol differs: '7' at the site, '1' at the coordinator"),
        (
            "digest",
            f"the base model, its quantisation or its tokenizer differs: 'x' at the site, '{'d' * 16}' at the coord",
        ),
        ("initial_digest", f"the tensors drawn from the seed differs: 'x' at the site, '{'i' * 16}' at the coord"),
        ("constants_digest", f"the method's constants differs: 'x' at the site, '{'c' * 16}' at the coordinator"),
    ):
        value: Any = 7 if field == "protocol" else "x"
        assert replace(REPORT, **{field: value}).differs(own).startswith(words)


def test_another_version_of_the_code_is_no_difference() -> None:
    """A site installs fedlora itself: what must agree is compared by what it comes to."""
    assert replace(REPORT, fingerprint="g", version="9").differs(REPORT) == ""
