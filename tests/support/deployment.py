"""A federation of real processes for tests: SuperLink, gateway, daemons and SuperNodes, each site a host of its own.

Where network namespaces are allowed (root on Linux, with iproute2), coordinator and sites have one each, with an
address of its own on a bridge; elsewhere all are on loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from deploy.coordinator_file import CoordinatorFile
from deploy.demo import FEDLORA, change, prepare
from fedlora.config import Config, Scalar
from fedlora.data import Corpus, Table, load_corpus
from fedlora.runs.folder import read_lines

ROOT = Path(__file__).parents[2]
SITES = ("a", "b", "c")
RAW: Mapping[str, Scalar] = {
    "privacy.mode": "none",
    "privacy.epsilon": 0.0,
    "privacy.delta": 0.0,
    "privacy.client-size": 0,
    "train.optimizer": "adamw",
    "train.learning-rate": 0.01,
    "train.batch-size": 8,
    "train.local-steps": 2,
    "train.max-length": 24,
    "federation.min-replies": 0,
    "data.test-path": "test.csv",
}
DP: Mapping[str, Scalar] = {
    "privacy.client-size": 24,
    "train.batch-size": 12,
    "train.local-steps": 2,
    "train.max-length": 24,
    "privacy.epsilon": 60.0,
    "federation.min-replies": 0,
}


def namespaces_allowed() -> bool:
    """Whether this machine lets us make network namespaces."""
    if os.getuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"fl-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=False)
    return made


@dataclass
class Net:
    """Hosts: a network namespace each, on a bridge of the coordinator's; or all on loopback.

    Attributes:
        names: The hosts; the first is the coordinator.
        real: Whether they have namespaces.
    """

    names: Sequence[str]
    real: bool
    tag: str = field(default_factory=lambda: uuid.uuid4().hex[:5])

    def address(self, name: str) -> str:
        return f"10.99.7.{list(self.names).index(name) + 1}" if self.real else "127.0.0.1"

    def prefix(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._ns(name)] if self.real else []

    def up(self) -> None:
        if not self.real:
            return
        first = self._ns(self.names[0])
        for name in self.names:
            _ip("netns", "add", self._ns(name))
            _ip("-n", self._ns(name), "link", "set", "lo", "up")
        _ip("-n", first, "link", "add", "br0", "type", "bridge")
        _ip("-n", first, "addr", "add", f"{self.address(self.names[0])}/24", "dev", "br0")
        _ip("-n", first, "link", "set", "br0", "up")
        for number, name in enumerate(self.names[1:]):
            inner, outer = f"v{self.tag}{number}", f"w{self.tag}{number}"
            _ip("link", "add", inner, "type", "veth", "peer", "name", outer)
            _ip("link", "set", inner, "netns", self._ns(name))
            _ip("link", "set", outer, "netns", first)
            _ip("-n", first, "link", "set", outer, "master", "br0")
            _ip("-n", first, "link", "set", outer, "up")
            _ip("-n", self._ns(name), "addr", "add", f"{self.address(name)}/24", "dev", inner)
            _ip("-n", self._ns(name), "link", "set", inner, "up")

    def down(self) -> None:
        for name in self.names if self.real else ():
            subprocess.run(["ip", "netns", "del", self._ns(name)], check=False)

    def cut(self, name: str, *, on: bool) -> None:
        """Cut a site's network, or put it back."""
        number = list(self.names).index(name) - 1
        _ip("-n", self._ns(self.names[0]), "link", "set", f"w{self.tag}{number}", "down" if on else "up")

    def _ns(self, name: str) -> str:
        return f"fl{self.tag}-{name}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Federation:
    """A federation's folder and processes.

    Attributes:
        folder: Its files.
        net: Its hosts.
        corpus: The texts.
        rows: Each site's rows.
        template: The ``run.toml`` that each run starts from.
    """

    folder: Path
    net: Net
    corpus: Corpus
    rows: Mapping[str, Table]
    template: str
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def coordinator(self) -> Path:
        return self.folder / "coordinator"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name

    # -- processes ----------------------------------------------------------------------------------------

    def start(self, what: str, **environment: str) -> None:
        """Start ``superlink``, ``daemon-NAME`` or ``supernode-NAME``."""
        kind, _, name = what.partition("-")
        if kind == "superlink":
            host, command = "coordinator", ["deploy", "superlink", str(self.coordinator / "coordinator.toml")]
        else:
            host, command = name, ["site", "run" if kind == "daemon" else kind, str(self.site(name) / "site.toml")]
        with self.log(what).open("ab") as log:
            self.processes[what] = subprocess.Popen(
                [*self.net.prefix(host), *FEDLORA, *command],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )

    def start_all(self, sites: Sequence[str] = ()) -> None:
        self.start("superlink")
        for name in sites or self.rows:
            self.start(f"daemon-{name}")
        self.until((self.coordinator / "state/roster.json").is_file, "superlink")
        for name in sites or self.rows:
            self.until_listening(name)
            self.start(f"supernode-{name}")

    def until(self, there: Callable[[], Any], what: str, seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not there():
            died = self.processes[what].poll() is not None if what in self.processes else False
            assert not died, f"{what} ended: {self.said(what)[-3000:]}"
            assert time.monotonic() < end, f"{what}: not within {seconds} s: {self.said(what)[-3000:]}"
            time.sleep(0.2)

    def until_listening(self, name: str) -> None:
        """Wait for a site's daemon to have its socket."""
        self.until((self.site(name) / "run/site.sock").is_socket, f"daemon-{name}")

    def kill(self, what: str, number: int = signal.SIGKILL) -> None:
        """Kill a process with all its children, as a machine that fails does."""
        process = self.processes.pop(what)
        if process.poll() is not None:
            return
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in family:
            try:
                one.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
        process.wait(20)

    def stop(self) -> None:
        """End everything, SuperNodes first, so that they sign off."""
        ordered = sorted(self.processes.items(), key=lambda item: not item[0].startswith("supernode"))
        self.processes.clear()
        for _, process in ordered:
            process.terminate()
        for _, process in ordered:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def log(self, what: str) -> Path:
        kind, _, name = what.partition("-")
        return (self.site(name) if name else self.coordinator) / f"{kind}.log"

    def said(self, what: str) -> str:
        path = self.log(what)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    # -- runs ---------------------------------------------------------------------------------------------

    def configure(self, name: str, changes: Mapping[str, Scalar]) -> Path:
        """Write run.toml for a run of this name, and return its folder."""
        changed = {"run.name": name, **changes}
        if "data.test-path" in changed:
            changed["data.test-path"] = str(self.coordinator / str(changed["data.test-path"]))
        file = self.coordinator / "run.toml"
        file.write_text(self.template)
        change(file, changed)
        return self.coordinator / "runs" / name

    def launch(self) -> subprocess.Popen[bytes]:
        """Start ``fedlora deploy run``."""
        command = [*FEDLORA, "deploy", "run", str(self.coordinator / "coordinator.toml")]
        with self.log("run").open("ab") as log:
            process = subprocess.Popen(
                [*self.net.prefix("coordinator"), *command], stdout=log, stderr=log, cwd=ROOT, start_new_session=True
            )
        self.processes["run"] = process
        return process

    def run(self, name: str, changes: Mapping[str, Scalar], seconds: float = 240.0) -> Path:
        """Run to the end, and return the run's folder."""
        folder = self.configure(name, changes)
        process = self.launch()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        self.processes.pop("run", None)
        if code != 0:
            if code is None:
                process.kill()
            raise AssertionError(f"the run ended with {code}: {self.said('run')[-4000:]}")
        return folder

    def rounds(self, folder: Path) -> int:
        path = folder / "metrics.jsonl"
        return len(read_lines(path)) if path.is_file() else 0

    def clients(self, folder: Path) -> list[dict[str, Any]]:
        return read_lines(folder / "clients.jsonl")

    def released(self, name: str) -> list[dict[str, Any]]:
        path = self.site(name) / "state/released.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@contextmanager
def deployed(
    folder: Path, *, rows: int = 24, raw: bool = True, sites: Sequence[str] = SITES, start: bool = True
) -> Iterator[Federation]:
    """Set up a federation and run its processes for the time of the block; nothing is left of it.

    Args:
        folder: Where its files go.
        rows: Rows of each site.
        raw: Whether the sites let updates leave without privacy.
        sites: Their names.
        start: Whether all processes are started.
    """
    corpus = load_corpus(Config())
    order = np.random.default_rng(1).permutation(len(corpus.train))
    parts = {name: corpus.train.take(order[at * rows : (at + 1) * rows]) for at, name in enumerate(sites)}
    test = corpus.test.take(np.random.default_rng(2).permutation(len(corpus.test))[:48])
    corpus = Corpus(corpus.train, test, corpus.classes)
    net = Net(("coordinator", *sites), namespaces_allowed())
    prepare(folder, parts, corpus, {}, address=net.address("coordinator"))
    for name in sites:
        edit(folder / "sites" / name / "site.toml", raw=raw)
    federation = Federation(folder, net, corpus, parts, (folder / "coordinator/run.toml").read_text())
    net.up()
    try:
        if start:
            federation.start_all()
        yield federation
    finally:
        federation.stop()
        net.down()


def edit(file: Path, *, raw: bool) -> None:
    """Make a site's file one for tests: one thread, a larger budget, and raw updates where they are asked for."""
    text = file.read_text()
    text = re.sub(r"\nthreads = \d+", "\nthreads = 1", text)
    text = text.replace("max-rounds-per-day = 200", "max-rounds-per-day = 0")
    text = text.replace("rows = 500", "rows = 30").replace('strategies = ["ffa-lora"]', "strategies = []")
    if raw:
        lines = [line for line in text.splitlines() if not line.startswith(("max-epsilon", "max-delta", "min-noise"))]
        text = "\n".join(lines).replace("[limits]", "[limits]\nraw-updates = true\nmax-epsilon = 0.0")
    else:
        text = re.sub(r"max-epsilon = [0-9.]+", "max-epsilon = 90.0", text).replace("min-noise-multiplier = 0.5", "")
    file.write_text(text)


def hosts(federation: Federation) -> CoordinatorFile:
    return CoordinatorFile.read(federation.coordinator / "coordinator.toml")
