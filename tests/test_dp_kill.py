"""kill -9 at any moment: no ledger ever shows less than what was released."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def killed(folder: Path, kills: int, plant: str) -> tuple[int, int, int]:
    """Return the updates that left, those that no ledger knows, and by how many they are more than its entries."""
    command = [sys.executable, "-m", "tests.support.kill_client", str(folder), str(kills), plant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"left (\d+) unpaid (\d+) more than the ledger (-?\d+)", done.stdout)
    assert found is not None, done.stdout
    left, unpaid, more = map(int, found.groups())
    return left, unpaid, more


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_kills_at_random_moments(kills: int, tmp_path: Path) -> None:
    left, unpaid, more = killed(tmp_path, kills, "honest")
    assert left > 0.4 * kills, "the kills hit processes at work"
    assert unpaid == 0
    assert more <= 0


@pytest.mark.slow
def test_a_ledger_that_is_written_late_is_noticed(tmp_path: Path) -> None:
    """The control: the same kills find the planted bug."""
    left, _, more = killed(tmp_path, 40, "late")
    assert left > 10
    assert more > 0
