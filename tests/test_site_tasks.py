"""Deployed sites with rows that are no text and class: numbers, sets of labels, conversations, pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clients.deployed import own_job
from clients.errors import RefusedError
from fedlora.data import load_corpus
from fedlora.exchange import Outcome
from tests.support.sites import RAW, ROWS, Deployment, coordinators_worker, request_of, server_config, site_file
from tests.support.tiny import WORDS

CASES: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "regression": ({"data.classes": ""}, 'label-column = "x"', [f"{n % 5}" for n in range(ROWS)]),
    "multi-label": ({}, 'label-column = "x"', ["bad|good" if n % 2 else "" for n in range(ROWS)]),
    "classification": ({}, 'text-column = "text,second"\nlabel-column = "x"', ["bad", "good"] * (ROWS // 2)),
}


@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
@pytest.mark.parametrize("task", CASES)
def test_a_site_trains(task: str, private: bool, tmp_path: Path) -> None:
    """On rows that the server never sees; its model and the site's have the same head."""
    keys, data, labels = CASES[task]
    mode = {} if private else {"privacy.mode": "none"}
    file = site_file(tmp_path, *([] if private else [RAW]), data=f"{data}\nholdout = 0.25")
    lines = [f"{WORDS[n]} {WORDS[n + 1]},{WORDS[n + 2]},{label}" for n, label in enumerate(labels)]
    (tmp_path / "data.csv").write_text("\n".join(["text,second,x", *lines]) + "\n")
    config = server_config(task=task, **keys, **mode)
    north = Deployment(file, config).joined()
    server = coordinators_worker(tmp_path, config).describe()
    assert server.specs == north.place.worker.describe().specs
    assert north.train().report.outcome is Outcome.OK
    (report,) = north.site.evaluate(north.instruction())
    measured = {"regression": "spearman", "multi-label": "true_positive.0", "classification": "accuracy"}[task]
    assert (measured in report.metrics) is not private, "under DP nothing of its rows leaves"
    assert load_corpus(config).classes == (("value",) if task == "regression" else ("bad", "good"))


def test_a_site_says_what_its_rows_are_for(tmp_path: Path) -> None:
    """And how their labels are written, which a server cannot know."""
    file = site_file(tmp_path, RAW, data='task = "multi-label"\nlabel-separator = ";"')
    rows = [f"{WORDS[n]},{'bad;good' if n % 2 else ''}" for n in range(ROWS)]
    (tmp_path / "data.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    raw = {"privacy.mode": "none"}
    job = own_job(file, request_of(server_config(task="multi-label", **raw)))
    assert job.data.corpus.train.numbers[:2] == ((0, 0), (1, 1))
    with pytest.raises(RefusedError, match=r"job has task = 'classification', and this site's rows are for 'multi-la"):
        own_job(file, request_of(server_config(**raw)))


@pytest.mark.parametrize("learn", ["last", "all"])
def test_the_server_says_which_turns_are_learned(learn: str, tmp_path: Path) -> None:
    file = site_file(tmp_path, RAW, data="")
    turns = [{"role": role, "content": "w1"} for role in ("user", "assistant") * 2]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(ROWS)), encoding="utf-8")
    text = (tmp_path / "site.toml").read_text().replace("data.csv", "rows.jsonl")
    (tmp_path / "site.toml").write_text(text)
    file = type(file).read(tmp_path / "site.toml")
    keys = {"task": "causal-lm", "data.classes": "", "privacy.mode": "none", "data.learn": learn}
    job = own_job(file, request_of(server_config(**keys)))
    assert [turn.learned for turn in job.data.corpus.train.chats[0]] == [False, learn == "all", False, True]
