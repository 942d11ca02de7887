"""Eighteen small federations come to the numbers that were stored: a change of mathematics does not pass unseen."""

from __future__ import annotations

import copy
import json

import pytest

from tests.support.recordings import FILE, differences, record

STORED = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.e2e
@pytest.mark.slow
def test_numbers_are_those_recorded() -> None:
    assert differences(STORED, record()) == []


def test_a_difference_is_seen() -> None:
    """Planted: a loss that is off by a millionth, a byte too many, a client that was lost; rounding is none."""
    assert len(STORED) >= 12
    assert differences(STORED, STORED) == []
    for number, key, change in (("1", "train_loss", 1.000001), ("2", "bytes_up", 1.01), ("3", "clients_ok", 0.75)):
        planted = copy.deepcopy(STORED)
        planted["classification fedavg"]["rounds"][number][key] *= change
        assert len(differences(STORED, planted)) == 1
    rounded = copy.deepcopy(STORED)
    rounded["classification fedavg"]["adapters"]["adapter"]["update norm"] *= 1 + 1e-10
    assert differences(STORED, rounded) == []
