"""The HTML page in a real browser: its width, and tables that are sorted and copied. Needs Chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fedlora.reports.html import html_page
from fedlora.reports.run import Run
from fedlora.runs.folder import RunFolder
from tests.test_report import fake_run, spent_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


def seen(folder: Path, page: str, script: str, width: int = 1600) -> Any:
    """Open a page in a browser and return the value of a script's expression in it."""
    assert BROWSER is not None
    found = f"<script>document.title = JSON.stringify((() => {{ {script} }})());</script></body>"
    (folder / "page.html").write_text(page.replace("</body>", found), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},1000", "--dump-dom", (folder / "page.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", shown, re.DOTALL)
    return json.loads(html.unescape(title))


def runs(folder: Path) -> list[Run]:
    """Two runs, one under DP."""
    return [
        spent_run(folder, 2.0, 3.25),
        fake_run(folder, "a-run-with-a-long-name-of-many-words-" + "x" * 60, [0.4, 0.6]),
    ]


@pytest.mark.parametrize(("width", "columns"), [(1600, 2), (1000, 1), (500, 1)])
def test_two_columns_where_there_is_room(width: int, columns: int, tmp_path: Path) -> None:
    """And the page itself never scrolls sideways: a wide table does."""
    script = """
        const grids = [...document.querySelectorAll(".columns")].map(one => getComputedStyle(one).gridTemplateColumns);
        return [innerWidth, document.documentElement.scrollWidth, grids.map(one => one.split(" ").length)];
    """
    inner, scrolled, grids = seen(tmp_path, html_page(runs(tmp_path)), script, width)
    assert abs(inner - width) < 20
    assert scrolled <= inner
    assert grids == [columns] * 2


def test_tables_are_sorted_and_copied(tmp_path: Path) -> None:
    """By what the cells mean: units, signs, gaps last both ways; copied as they are sorted, tabs between cells."""
    cells = ["1.60 MB", "999 B", "-", "2.00 kB", "3.00 GB", "did not finish"]
    values = {
        "up": cells,
        "time": ["59 s", "2 min 05 s", "1 h 00 min", "-", "4 s", "1 min 00 s"],
        "epsilon": ["-0.5", "1e-05", "10.0000", "9.0000", "", "1,200"],
        "name": ["run-10", "Run-9", "run-2", "x", "a", "-"],
    }
    rows = "".join(
        f"<tr>{''.join(f'<td>{value}</td>' for value in row)}</tr>" for row in zip(*values.values(), strict=True)
    )
    head = "".join(f"<th>{name}</th>" for name in values)
    table = f"<table id=own><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    page = html_page([fake_run(tmp_path, "one", [0.5, 0.9])]).replace("<h1>", f"{table}<h1>")
    script = """
        const table = document.getElementById("own"), found = {};
        [...table.tHead.rows[0].cells].forEach((head, place) => {
          for (const way of ["ascending", "descending"]) {
            head.querySelector("button").click();
            if (head.getAttribute("aria-sort") !== way) throw new Error(way);
            found[head.textContent + " " + way] = [...table.tBodies[0].rows].map(row => row.cells[place].textContent);
          }
        });
        const count = what => document.querySelectorAll(what).length;
        return [found, lines(table), count("button.copy"), count("table")];
    """
    found, copied, buttons, tables = seen(tmp_path, page, script)
    assert found["up ascending"] == ["999 B", "2.00 kB", "1.60 MB", "3.00 GB", "did not finish", "-"]
    assert found["up descending"] == ["3.00 GB", "1.60 MB", "2.00 kB", "999 B", "did not finish", "-"]
    assert found["time ascending"] == ["4 s", "59 s", "1 min 00 s", "2 min 05 s", "1 h 00 min", "-"]
    assert found["epsilon ascending"] == ["-0.5", "1e-05", "9.0000", "10.0000", "1,200", ""]
    assert found["epsilon descending"] == ["1,200", "10.0000", "9.0000", "1e-05", "-0.5", ""]
    assert found["name ascending"] == ["a", "run-2", "Run-9", "run-10", "x", "-"]
    assert copied.splitlines()[0] == "up\ttime\tepsilon\tname"
    assert [line.split("\t")[3] for line in copied.splitlines()[1:]] == found["name descending"]
    assert buttons == tables > 3


def test_a_run_of_many_rounds_and_keys_is_shown(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "one", [0.5] * 300)
    RunFolder(run.path).write_json("result.json", {**(run.result or {}), "test_generated_rouge_l": 0.25})
    text = seen(tmp_path, html_page([Run.read(run.path)]), 'return document.querySelector("section").textContent;')
    assert "test generated rouge l0.2500" in text
    assert "roundtest accuracyloss" in text
