"""A Ray cluster of two nodes on this machine: clients train on both, and one is killed in the middle of a round."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, final

import psutil
import pytest

from clients.own_ray import RAY_ENVIRONMENT
from fedlora.runs.folder import read_lines
from simulations.superlink import free_ports
from tests.support.runs import BIN, Family, fedlora, fedlora_run

pytestmark = [pytest.mark.e2e, pytest.mark.slow]  # two runs and a cluster: two minutes on two busy cores

STEPS: dict[str, Any] = {
    "rounds": 3,
    "strategy.name": "fedavg",
    "train.local-steps": 200,  # a round of a second or more, to be killed in the middle of
    "engine.pack": 1,
}


@final
class Cluster:
    """Nodes of one core each, started as an operator starts them.

    Args:
        folder: Where Ray's files go: a short path.
    """

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"
        self.nodes = [
            self._start("--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"),
        ]
        self.nodes.append(self._start(f"--address={self.address}"))

    def _start(self, *options: str) -> subprocess.Popen[str]:
        command = [str(BIN / "ray"), "start", *options, "--num-cpus=1", "--node-ip-address=127.0.0.1", "--block"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "--block" in line:  # it runs, and says what this means
                return process
        raise AssertionError(said)

    def kill(self, node: int) -> None:
        """kill -9 of all of a node: raylet, workers, agents."""
        family = [psutil.Process(self.nodes[node].pid)]
        family += family[0].children(recursive=True)
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes[node].communicate()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two nodes, which all that this process starts uses."""
    for name, value in RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with TemporaryDirectory(prefix="ray-") as folder:
        two = Cluster(Path(folder))
        monkeypatch.setenv("RAY_ADDRESS", two.address)
        try:
            yield two
        finally:
            for node in (1, 0):
                if two.nodes[node].poll() is None:
                    two.kill(node)


def test_a_node_that_dies_costs_its_packs_one_repetition(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(number: int, family: Family) -> bool:
        if number == 1:
            time.sleep(0.5)
            cluster.kill(1)
        return True

    run = fedlora_run(tmp_path / "killed", on_round=kill, **STEPS)
    assert run.code == 0, run.output
    assert run.left == [], "the cluster itself is not the run's to end"
    assert [line["clients_refused"] for line in run.metrics] == [0, 0, 0]
    one, two = run.json("plan.json")["shards"]
    assert one["node"] != two["node"], "a trainer on each node"
    assert one["seconds"] > 0
    assert one["memory_bytes"] > 1e6
    assert sorted(one["clients"] + two["clients"]) == [0, 1, 2, 3]
    (loss,) = read_lines(run.folder / "losses.jsonl")
    lost = two if loss["node"] == two["node"] else one
    assert (loss["round"], loss["trainer"]) == (2, lost["trainer"])
    assert loss["packs"], "it was at work"
    assert set(loss["repeated_on"]) == {1 - lost["trainer"]}
    said = f"trainer {loss['trainer']} on {loss['host']} was lost in round 2 (its process or its machine died); "
    assert said + f"{len(loss['packs'])} pack(s) were repeated: " in run.output
    assert said in (run.folder / "summary.md").read_text()

    monkeypatch.delenv("RAY_ADDRESS")  # the same packs on a Ray of its own, undisturbed
    alone = fedlora_run(tmp_path / "alone", **STEPS, **{"engine.trainers": 2})
    assert alone.json("result.json")["test_accuracy"] == run.json("result.json")["test_accuracy"]
    for name in (alone.checkpoint()).keys() | run.checkpoint().keys():
        assert (alone.checkpoint()[name] == run.checkpoint()[name]).all(), "to the bit"
    assert not (alone.folder / "losses.jsonl").exists()


def test_what_cannot_work_on_a_cluster_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    done = fedlora("plan", timeout=60)
    assert done.returncode == 2
    assert "RAY_ADDRESS = '127.0.0.1:9': no Ray cluster that this machine is part of answers there" in done.stdout
    done = fedlora("run", "--federation-config", "init-args-num-cpus=2", timeout=60)
    assert "leave init-args-num-cpus and init-args-num-gpus out" in done.stdout
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert "which Ray's client cannot" in fedlora("run", timeout=60).stdout
