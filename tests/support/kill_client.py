"""Kills a client's process at random moments, and checks its ledger after each; run by test_dp_kill.py.

    python -m tests.support.kill_client FOLDER KILLS honest|late

The process trains round after round; an update has left once its ledger head stands in a pipe. Every process is forked
from this one, which has loaded the model. ``late`` plants a bug: the ledger is written after the update has left.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from clients.accounts import Accounts
from fedlora.privacy import Ledger
from tests.support.trainers import ask, dp_worker

CLIENTS = (0, 1)


def late(self: Accounts, client: int, number: int, head: str) -> str:
    """Say that the ledger is written, and write it a moment later."""
    self.ledger(client).path.parent.mkdir(parents=True, exist_ok=True)
    owed.append((self.ledger(client), number, self.mechanism.use()))
    return f"{client}-{number}-{time.monotonic_ns()}"


owed: list[tuple[Ledger, int, object]] = []


def train_on(worker: object, pipe: int) -> None:
    """Train until killed; what has left stands in the pipe."""
    for number in itertools.count(1):
        for update in ask(worker, CLIENTS, number):  # type: ignore[arg-type]
            os.write(pipe, f"{update.client} {update.report.ledger_head}\n".encode())
        while owed:
            ledger, at, use = owed.pop()
            ledger.charge(at, use)  # type: ignore[arg-type]


def main(folder: Path, kills: int, plant: str) -> None:
    """Print the updates that left, and those of them that no ledger knows of."""
    torch.set_num_threads(1)
    if plant == "late":
        Accounts.charge = late  # type: ignore[method-assign]
    worker = dp_worker(folder)
    ask(worker, CLIENTS)  # loads the model
    owed.clear()
    generator = random.Random(0)
    left: list[tuple[int, str]] = []
    for _ in range(kills):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            train_on(worker, write)
        os.close(write)
        time.sleep(generator.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            whole = [line for line in pipe.read().splitlines(keepends=True) if line.endswith("\n")]
        left += [(int(line.split()[0]), line.split()[1]) for line in whole]
        for client in CLIENTS:
            Ledger(folder / "sites" / f"client-{client}" / "ledger.jsonl", client).entries()  # the chain holds
    known = {
        client: {
            entry.hash for entry in Ledger(folder / "sites" / f"client-{client}" / "ledger.jsonl", client).entries()
        }
        for client in CLIENTS
    }
    unpaid = sum(head not in known[client] for client, head in left)
    counted = [sum(client == one for one, _ in left) - len(known[client]) for client in CLIENTS]
    sys.stdout.write(f"left {len(left)} unpaid {unpaid} more than the ledger {max(counted)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
