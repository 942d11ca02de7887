"""A federation in this process, of the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clients.worker import Worker
from simulations.in_process import InProcess
from simulations.setup import resolve
from tests.support.trainers import tiny_job


def federation(flat: dict[str, Any], folder: Path) -> InProcess:
    """Return the federation of a configuration before its first round."""
    config = resolve(flat)
    job = tiny_job(config, folder)
    worker = Worker(lambda: job, 1)
    worker.load()
    return InProcess(config, job.data, worker)
