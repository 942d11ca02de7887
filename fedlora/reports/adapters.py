"""The adapters that a finished run exported, and where they are."""

from __future__ import annotations

from pathlib import Path

from fedlora.lora_files import CONFIG
from fedlora.reports.run import Run


def adapter_of(run: Run, client: int | None = None) -> Path:
    """Return the folder of a run's adapter, or of a client's own.

    Raises:
        ValueError: The run did not finish, or has no such adapter; the message says which it has.
    """
    if run.result is None:
        raise ValueError(
            f"{run.path}: the run did not finish, so it has no adapter; continue it with run.resume = true."
        )
    own = sorted(int(file.parent.name.removeprefix("client-")) for file in run.path.glob(f"adapters/client-*/{CONFIG}"))
    if client is None:
        folder = run.path / "adapter"
        if (folder / CONFIG).is_file():
            return folder
        cure = f"choose one with --client, of {_listed(own)}" if own else "the run's sites kept theirs"
        raise ValueError(f"{run.path}: the server has no adapter of its own; {cure}.")
    if client not in own:
        have = f"those of clients {_listed(own)}" if own else "none of clients; leave --client out"
        raise ValueError(f"--client {client}: no such adapter in {run.path / 'adapters'}, which has {have}.")
    return run.path / "adapters" / f"client-{client}"


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (f", ... {numbers[-1]}" if len(numbers) > 10 else "")
