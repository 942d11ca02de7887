"""A whole federation on this machine, three sites and a coordinator, through the files of a real one."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console

from deploy.coordinator_file import CoordinatorFile
from deploy.init import Setup, initialise
from deploy.run import app_folder, read_run
from deploy.superlink import roster_path
from fedlora.config import Config, Scalar, to_toml
from fedlora.config.data_keys import write_names
from fedlora.data import Corpus, Table, load_corpus
from fedlora.runs.folder import run_path
from fedlora.storage import write_whole
from simulations.superlink import free_ports

SITES = ("north", "south", "west")
_TRAINING: Mapping[str, Scalar] = {"privacy.client-size": 500, "train.batch-size": 500, "data.test-path": "test.csv"}
"""What the demo changes of ``run.toml``: a public size that fits its sites, and rows for the coordinator to test on."""
_START_S = 180.0
_END_S = 30.0


def run_demo(folder: Path, console: Console) -> int:
    """Set up a federation, run it to its end, verify its adapter; return 0 when all of it went well.

    Args:
        folder: Where its files go; it must not exist, or be empty.
        console: Where progress goes.

    Raises:
        ValueError: The folder is in use, or a process of the federation does not start.
    """
    folder = folder.expanduser().resolve()
    corpus = load_corpus(Config())
    parts = np.array_split(np.random.default_rng(0).permutation(len(corpus.train)), len(SITES))
    rows = {name: corpus.train.take(np.sort(part)) for name, part in zip(SITES, parts, strict=True)}
    prepare(folder, rows, corpus, _TRAINING)
    coordinator, own = folder / "coordinator/coordinator.toml", folder / "sites" / SITES[0]
    console.print(f"three sites and a coordinator in {folder}, each with its own log there", markup=False)
    with federation(folder, SITES):
        code = subprocess.run([*FEDLORA, "deploy", "run", str(coordinator)], check=False).returncode
    if code == 0:
        _, config = read_run(CoordinatorFile.read(coordinator), app_folder())
        verify = ["verify", str(run_path(config) / "adapter"), "--key", str(own / "signing/adapter.pub")]
        code = subprocess.run([*FEDLORA, *verify], check=False).returncode
        console.print(
            f"what left a site: {shlex.join(['fedlora', 'site', 'show', str(own / 'site.toml')])}", markup=False
        )
    return code


FEDLORA = (sys.executable, "-m", "deploy.cli")
"""The command ``fedlora`` of this Python."""


def prepare(
    folder: Path,
    rows: Mapping[str, Table],
    corpus: Corpus,
    changes: Mapping[str, Scalar],
    address: str = "127.0.0.1",
) -> None:
    """Write the files of a federation on this machine.

    Args:
        folder: Where to.
        rows: Each site's rows, by its name.
        corpus: Where they come from; its test rows become the coordinator's.
        changes: Keys of ``run.toml`` with other values.
        address: By which sites reach the coordinator.
    """
    port, link, *nodes = free_ports(2 + len(rows))
    names, classes = tuple(rows), write_names(corpus.classes)
    setup = Setup(names, address, port=port, classes=classes, rows=500, link_port=link, node_ports=tuple(nodes))
    initialise(folder, setup)
    for name, table in rows.items():
        write_rows(folder / "sites" / name / "data.csv", table, corpus.classes)
        own = folder / "sites" / name / "site.toml"  # here daemon and SuperNode run as one user
        write_whole(own, _on_one_machine(own.read_text(encoding="utf-8"), len(rows)).encode())
    write_rows(folder / "coordinator/test.csv", corpus.test, corpus.classes)
    changed = dict(changes)
    if "data.test-path" in changed:
        changed["data.test-path"] = str(folder / "coordinator" / str(changed["data.test-path"]))
    change(folder / "coordinator/run.toml", changed)


def _on_one_machine(text: str, sites: int) -> str:
    """Return a site's file for a site that shares machine and user with others."""
    threads = max(1, (os.cpu_count() or 1) // sites)
    return text.replace('users = ["flower"]', "users = []").replace(
        "[trainers]\n", f"[trainers]\nthreads = {threads}\n"
    )


def change(file: Path, changes: Mapping[str, Scalar]) -> None:
    """Give keys of a file of dotted keys other values, in place of the lines that they have or at its end."""
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.partition("=")[0].strip() not in changes]
    write_whole(file, ("\n".join(kept) + "\n" + to_toml(changes)).encode())


def write_rows(path: Path, table: Table, classes: Sequence[str]) -> None:
    """Write rows as a csv file of texts and labels."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(zip(table.texts, (classes[label] for label in table.labels), strict=True))
    path.chmod(0o600)


@contextmanager
def federation(folder: Path, sites: Sequence[str]) -> Iterator[None]:
    """Run a SuperLink with its gateway, and each site's daemon and SuperNode, for the time of the block.

    Raises:
        ValueError: One of them does not start.
    """
    coordinator = folder / "coordinator/coordinator.toml"
    started: list[subprocess.Popen[bytes]] = []

    def start(log: Path, *command: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            process = subprocess.Popen([*FEDLORA, *command], stdout=file, stderr=file, start_new_session=True)
        started.append(process)
        return process

    try:
        log = folder / "coordinator/superlink.log"
        roster = roster_path(CoordinatorFile.read(coordinator))
        wait_until(roster.is_file, start(log, "deploy", "superlink", str(coordinator)), log)
        daemons = []
        for name in sites:
            own = folder / "sites" / name
            daemons.append((own, start(own / "daemon.log", "site", "run", str(own / "site.toml"))))
        for own, daemon in daemons:
            wait_until((own / "run/site.sock").is_socket, daemon, own / "daemon.log")
            start(own / "supernode.log", "site", "supernode", str(own / "site.toml"))
        yield
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
        for process in started:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until(there: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a process has made what it makes when it is ready.

    Raises:
        ValueError: It ended before, or takes too long; with the end of its log.
    """
    end = time.monotonic() + _START_S
    while not there():
        if process.poll() is not None or time.monotonic() > end:
            tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise ValueError(f"the process that writes {log} does not start; the end of it:\n{tail}")
        time.sleep(0.2)
