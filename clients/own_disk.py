"""Whether a trainer sees the site's own state folder: on a Ray cluster it may run on another machine.

A ledger that a trainer began on another machine's disk would be a new budget.
"""

from __future__ import annotations

import logging
import secrets
import socket
from pathlib import Path

from clients.errors import TrainerDiffersError
from fedlora.storage import write_whole

_NAME = "site-id"
_logger = logging.getLogger(__name__)


def folder_id(folder: Path) -> str:
    """Return what is written in a state folder to know it by; written at the first call."""
    file = folder / _NAME
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_whole(file, secrets.token_hex(16).encode())
    return file.read_text(encoding="utf-8")


def check_folder(folder: Path, expected: str) -> None:
    """Check that this process sees the folder that the site's daemon sees.

    Args:
        folder: The folder.
        expected: What the daemon knows it by; empty: in a simulation, which has no daemon.

    Raises:
        TrainerDiffersError: It does not.
    """
    if not expected:
        return
    file = folder / _NAME
    if not file.is_file() or file.read_text(encoding="utf-8") != expected:
        _logger.error("%s has no state folder %s, or another", socket.gethostname(), folder)
        raise TrainerDiffersError(
            "a trainer of the site does not see the site's state folder; a Ray cluster of several machines needs it on "
            "storage that they share"
        )
