"""Tables and plots of whatever names the classes have."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedlora.config import Config
from fedlora.plugins import read_config
from fedlora.reports.card import model_card
from fedlora.reports.comparison import comparison, paired_comparison
from fedlora.reports.format import human_bytes, number
from fedlora.reports.html import html_page
from fedlora.reports.plots import plot_partition
from fedlora.reports.run import Run
from fedlora.reports.summary import summary, write_report
from fedlora.reports.tables import clients_table, outcome_table
from fedlora.roles import Role, Roles
from fedlora.runs.folder import RunFolder
from tests.support.runs import BIN, environment, fedlora

CLASSES = ["[/b]", "[sci]", "$x_1$", "_hidden", "a\\b"]
COUNTS = [[3, 1, 0, 2, 5], [1, 0, 7, 2, 1]]


def printed(table: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_class_names_are_text_not_markup() -> None:
    shown = printed(clients_table(CLASSES, COUNTS))
    assert all(name in shown for name in CLASSES)


def test_small_numbers_are_not_shown_as_zero() -> None:
    texts = {1e-5: "1e-05", -0.00012345: "-0.0001234", 0.0: "0.0000", 0.001: "0.0010", 12.0: "12.0000"}
    assert {value: number(value) for value in texts} == texts
    assert number(None) == number(float("inf")) == "-"


def test_plots_take_any_class_name(tmp_path: Path) -> None:
    plan = {"measure": "test_accuracy", "higher_is_better": True, "roles": {"A": "frozen"}}
    run = Run(tmp_path, Config(), [], {"classes": CLASSES, "counts": COUNTS}, plan, [], {"guarantee": "none"}, None)
    plot_partition(run)
    assert (tmp_path / "partition.png").stat().st_size > 5000
    write_report(run)
    assert "did not finish" in (tmp_path / "summary.md").read_text()


def fake_run(folder: Path, name: str, values: list[float], **flat: Any) -> Run:
    """A run folder with a curve, as Simulation writes it."""
    config = read_config({"run.dir": str(folder), "run.name": name, "rounds": len(values), **flat})
    with RunFolder.opened(config) as written:
        pass
    measure = "test_perplexity" if config.task == "causal-lm" else "test_accuracy"
    higher = measure == "test_accuracy"
    written.write_json("plan.json", {"measure": measure, "higher_is_better": higher, "roles": {"A": "frozen"}})
    written.write_json("partition.json", {"classes": CLASSES, "counts": COUNTS, "names": []})
    written.write_json("privacy.json", {"guarantee": "none"})
    for at, value in enumerate(values):
        line = {"round": at + 1, measure: value, "test_loss": 1.0, "clients_ok": 2, "clients_refused": 0}
        written.append("metrics.jsonl", {**line, "bytes_up": 1000, "bytes_down": 2000, "seconds": 2.0})
    written.write_lines("scores.jsonl", [{"client": k, "accuracy": 0.5, "perplexity": 9.0} for k in range(2)])
    central = {"central_test_accuracy": 0.95, "majority_share": 0.5, "alone_test_accuracy": 0.6}
    written.write_json(
        "result.json", {measure: values[-1], "bytes_up": 3000, "seconds": 6.0, **(central if higher else {})}
    )
    return Run.read(written.path)


def spent_run(folder: Path, *spent: float) -> Run:
    """A run under DP, of whose two clients the first has spent so much after each round."""
    privacy = {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0, "privacy.delta": 1e-5}
    run = fake_run(folder, "spent", [0.5] * len(spent), **privacy)
    written = RunFolder(run.path)
    lines = [{**line, "epsilon": value, "epsilon_least": 1.0} for line, value in zip(run.metrics, spent, strict=True)]
    written.write_lines("metrics.jsonl", lines)
    use = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 20}
    clients = [
        {"client": k, "rounds": 2, "ledger": [use], "epsilon": value, "epsilon_rdp": 2 * value, "budget": 5.0}
        | {"remaining": max(0.0, 5.0 - value)}
        for k, value in enumerate((spent[-1], 1.0))
    ]
    released = [{"what": "tensors of kind B", "guarantee": "differential privacy"}]
    record = {"delta": 1e-5, "guarantee": f"epsilon {spent[-1]:.4g}.", "released": released, "clients": clients}
    written.write_json("privacy.json", record)
    return Run.read(run.path)


def test_what_was_spent_is_the_same_everywhere(tmp_path: Path) -> None:
    """In the table of the terminal, ``summary.md`` and the page; and that clients' own numbers are not covered."""
    run = spent_run(tmp_path, 2.0, 3.25)
    row = ("0", "2", "20 steps at noise multiplier 1, sample rate 0.1", "3.2500", "6.5000", "5.0000", "1.7500")
    write_report(run)
    summary, page = (run.path / "summary.md").read_text(), html_page([run])
    assert f"| {' | '.join(row)} |" in summary
    assert "".join(f"<td>{cell}</td>" for cell in row) in page
    for text in (summary, page):
        assert "tensors of kind B" in text
        assert "Numbers of clients' own rows" in text.replace("&#x27;", "'")
    assert "3.2500" in printed(outcome_table(run))


def test_an_epsilon_that_became_infinite_is_not_shown_as_the_last_finite_one(tmp_path: Path) -> None:
    """JSON has no such number; a ledger that was edited on the way makes one."""
    run = spent_run(tmp_path, 2.0, float("inf"))
    assert [most for _, most, _ in run.spent] == [2.0, float("inf")]
    assert "infinite" in printed(outcome_table(run))
    assert "2.0000" not in printed(outcome_table(run))
    write_report(run)
    assert "| infinite | infinite | 5.0000 | 0.0000 |" in (run.path / "summary.md").read_text()
    assert (run.path / "epsilon.png").stat().st_size > 5000


def test_runs_of_several_seeds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Under DP noise multipliers that follow from an epsilon distinguish nothing; those that were given do."""

    def runs(named: str, **flat: Any) -> list[Run]:
        return [
            fake_run(
                tmp_path,
                f"{named}-{name}-{seed}",
                [0.5 + 0.2 * seed + gap],
                **{"strategy.name": name, "seed": seed},
                **flat,
            )
            for name, gap in (("fedavg", 0.0), ("ffa-lora", -0.1))
            for seed in range(3)
        ]

    def seeds(lines: list[str]) -> list[str]:
        return [line.split(" | ")[2] for line in lines if line.startswith("| `")]

    lines = paired_comparison(runs("plain"))
    assert seeds(lines) == ["3"]
    assert "| `ffa-lora` | `fedavg` | 3 | -0.1000 |" in lines[4]
    dp = {"privacy.mode": "dp", "privacy.client-size": 50}
    given = [
        *runs("a", **dp, **{"privacy.noise-multiplier": 0.5}),
        *runs("b", **dp, **{"privacy.noise-multiplier": 1.0}),
    ]
    assert seeds(paired_comparison(given)) == ["3", "3", "3"], "four configurations, each beside the best"
    budget = {**dp, "privacy.epsilon": 3.0}
    first, second = (
        runs("c", **budget, **{"privacy.noise-multiplier": 0.5}),
        runs("d", **budget, **{"privacy.noise-multiplier": 1.0}),
    )
    assert seeds(paired_comparison([first[0], *second[1:]])) == ["3"]
    twice = paired_comparison(
        [*runs("e"), fake_run(tmp_path, "again", [0.5], **{"strategy.name": "fedavg", "seed": 1})]
    )
    assert "two runs of one configuration have the seed 1" in twice[1]
    assert paired_comparison(runs("f")[::3]) == [], "one seed"


def test_runs_side_by_side(tmp_path: Path) -> None:
    """What differs is a column; the best round follows the way the measure improves; tasks do not mix."""
    one = fake_run(tmp_path, "one", [0.5, 0.9, 0.8])
    two = fake_run(tmp_path, "two", [0.4, 0.6, 0.7], **{"strategy.name": "fedavg", "seed": 3})
    columns, rows = comparison([one, two])
    assert columns[1:3] == ["seed", "strategy.name"]
    assert [row[columns.index("best round")] for row in rows] == ["2", "3"]
    assert [row[columns.index("accuracy")] for row in rows] == ["0.8000", "0.7000"]
    language = [fake_run(tmp_path, f"lm{n}", [30.0, 20.0, 25.0], task="causal-lm", seed=n) for n in range(2)]
    columns, rows = comparison(language)
    assert [row[columns.index("best round")] for row in rows] == ["2", "2"], "a lower perplexity is better"
    with pytest.raises(ValueError, match="accuracy and perplexity cannot be compared"):
        comparison([one, language[0]])


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    """One file: no script, link or picture of elsewhere; names are text, whatever they hold."""
    page = html_page([fake_run(tmp_path, "<b>one", [0.5, 0.9]), fake_run(tmp_path, "two", [0.4, 0.6])])
    assert "&lt;b&gt;one" in page
    assert "<b>one" not in page
    assert not re.findall(r"<script[^>]|<link|https?://|url\(|@import", page)
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == 1 + 2 * 3, "the comparison; of each run its curve, clients and rows"
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "all data in one place" in page
    assert HTMLParser().feed(page) is None


def test_reports_off_a_terminal_and_without_color(tmp_path: Path) -> None:
    """Plain text into a pipe; on a terminal NO_COLOR takes the colors out."""
    fake_run(tmp_path, "one", [0.5, 0.9])
    fake_run(tmp_path, "two", [0.4, 0.6], seed=1)
    runs, page = [tmp_path / "one", tmp_path / "two"], tmp_path / "page.html"
    done = fedlora("report", *runs, "--html", page)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    assert "2 runs" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    wrong = [str(BIN / "fedlora"), "report", *map(str, runs), str(tmp_path)]
    terminal = environment(TERM="xterm-256color", COLUMNS="100")
    terminal.pop("NO_COLOR", None)
    colored, plain = (on_a_terminal(wrong, {**terminal, **extra}) for extra in ({}, {"NO_COLOR": "1"}))
    assert "is not a run folder" in plain
    assert re.search(r"\x1b\[[0-9;]*3[0-9]m", colored), "control: errors are red on a terminal"
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", plain)


def on_a_terminal(command: list[str], terminal: dict[str, str]) -> str:
    """Run a command on a pseudo-terminal and return what it shows."""
    leader, follower = pty.openpty()
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=terminal) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(leader)
    assert process.returncode == 2
    return shown.decode()


def test_many_clients_are_drawn_at_once(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).integers(0, 9, size=(10_000, 3)).tolist()
    run = replace(fake_run(tmp_path, "many", [0.5]), partition={"classes": ["a", "b", "c"], "counts": counts})
    started = time.monotonic()
    plot_partition(run)
    assert time.monotonic() - started < 20, "a bar for each of them would take minutes"


def test_bytes_have_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_597_760, 3_000_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.60 MB",
        "3.00 GB",
    ]


def test_numbers_outside_of_the_guarantee_say_so(tmp_path: Path) -> None:
    """Under DP in the tables, the summary and the card; planted: a column that nobody has declared."""
    run = spent_run(tmp_path, 2.0, 3.25)
    planted = {**(run.result or {}), "clients_accuracy": 0.4, "clients_accuracy_worst_tenth": 0.2, "rows_seen": 7.0}
    RunFolder(run.path).write_json("result.json", planted)
    run = Run.read(run.path)
    roles: Roles = {"A": Role.FROZEN, "B": Role.SHARED, "head": Role.SHARED}
    card = model_card(run.config, ("a", "b"), planted, roles, run.privacy, 2)
    for text, outside, covered in (
        (summary(run), "accuracy on clients' own rows, mean", "test accuracy"),
        (card, "clients_accuracy: 0.4", "test_accuracy: 0.5"),
    ):
        (line,) = [one for one in text.splitlines() if one.startswith(f"- {outside}")]
        assert "(outside the guarantee)" in line
        assert "rows seen (outside the guarantee): 7.0000" in text or "rows_seen: 7.0 (outside the guarantee)" in text
        (line,) = [one for one in text.splitlines() if one.startswith(f"- {covered}")]
        assert "outside" not in line
    assert "each client alone, mean (outside the guarantee)" in run.references()
    without = fake_run(tmp_path, "plain", [0.5])
    assert "outside" not in summary(without)
