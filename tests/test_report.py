"""Tables and plots of whatever names the classes have."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from fedlora.config import Config
from fedlora.runs.folder import RunFolder, read_lines
from fedlora.runs.report import Run, clients_table, human_bytes, plot_partition, write_report

CLASSES = ["[/b]", "[sci]", "$x_1$", "_hidden", "a\\b"]
COUNTS = [[3, 1, 0, 2, 5], [1, 0, 7, 2, 1]]


def test_class_names_are_text_not_markup() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(clients_table(CLASSES, COUNTS))
    assert isinstance(console.file, io.StringIO)
    assert all(name in console.file.getvalue() for name in CLASSES)


def test_plots_take_any_class_name(tmp_path: Path) -> None:
    plan = {"measure": "test_accuracy", "higher_is_better": True, "roles": {"A": "frozen"}}
    run = Run(tmp_path, Config(), [], {"classes": CLASSES, "counts": COUNTS}, plan, [], None)
    plot_partition(run)
    assert (tmp_path / "partition.png").stat().st_size > 5000
    write_report(run)
    assert "did not finish" in (tmp_path / "summary.md").read_text()


def test_lines_are_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("clients.jsonl", {"loss": float("nan"), "steps": 3, "other": float("inf")})
    assert "NaN" not in (tmp_path / "clients.jsonl").read_text()
    assert read_lines(tmp_path / "clients.jsonl") == [{"loss": None, "steps": 3, "other": None}]


def test_a_run_folder_is_not_shared(tmp_path: Path) -> None:
    config = Config.from_flat({"run.dir": str(tmp_path), "run.name": "one"})
    RunFolder.create(config)
    with pytest.raises(ValueError, match=r"run.name = 'one': .* is there already; choose another name"):
        RunFolder.create(config)


def test_bytes_have_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 1_597_760, 3_000_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "1.60 MB",
        "3.00 GB",
    ]
