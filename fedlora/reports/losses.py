"""Trainers that were lost in a run, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

FILE: Final = "losses.jsonl"


def loss_line(loss: Mapping[str, Any]) -> str:
    """Return in words that a trainer was lost, or could not do a pack, and what became of its work.

    Args:
        loss: A line of ``losses.jsonl``.
    """
    when = f" in round {loss['round']}" if loss["round"] else ""
    packs, where = len(loss["packs"]), Counter(loss["repeated_on"])
    by = ", ".join(f"{count} on trainer {trainer}" for trainer, count in sorted(where.items()))
    unit = "pack(s)" if any(loss["packs"]) else "piece(s) of evaluation"
    what = f"{packs} {unit} were repeated: {by}" if packs else "nothing was repeated"
    return f"trainer {loss['trainer']} on {loss['host'] or 'its machine'} was lost{when} ({loss['cause']}); {what}"
