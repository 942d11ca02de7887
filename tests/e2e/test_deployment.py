"""A federation of three sites through real processes: SuperLink, gateway, daemons, SuperNodes, TLS, MiniLM.

Each site is a host of its own, in a network namespace; where those are not allowed, all are on loopback.
"""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from clients.release_log import ReleaseLog
from deploy.demo import FEDLORA
from fedlora.config import to_toml
from fedlora.privacy import Ledger, epsilon
from fedlora.runs.folder import read_lines
from tests.support.deployment import DP, RAW, ROOT, SITES, Federation, deployed
from tests.support.runs import fedlora

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with deployed(tmp_path_factory.mktemp("federation") / "files") as started:
        yield started


def simulated(federation: Federation, folder: Path) -> Path:
    """Simulate the same federation: rows by site, one client a pack, trainers of one thread."""
    classes = federation.corpus.classes
    tables = {"rows.csv": federation.rows, "test.csv": {"nobody": federation.corpus.test}}
    for name, by_site in tables.items():
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "site"])
            for site, table in by_site.items():
                writer.writerows(
                    zip(table.texts, [classes[label] for label in table.labels], [site] * len(table), strict=True)
                )
    keys = {key: value for key, value in RAW.items() if not key.startswith(("federation.", "privacy."))}
    keys |= {
        "rounds": 2,
        "strategy.name": "ffa-lora",
        "data.name": "file",
        "data.path": str(folder / "rows.csv"),
        "data.test-path": str(folder / "test.csv"),
        "data.classes": ",".join(classes),
        "data.partition": "natural",
        "data.partition-column": "site",
        "federation.num-clients": 3,
        "engine.pack": 1,
        "engine.trainers": 2,
    }
    keys |= {"run.dir": str(folder / "runs"), "run.name": "simulated"}
    (folder / "run.toml").write_text(to_toml(keys))
    done = fedlora("run", "-c", folder / "run.toml")
    assert done.returncode == 0, done.stdout
    return folder / "runs/simulated"


@pytest.mark.slow
def test_same_result_as_a_simulation(federation: Federation, tmp_path: Path) -> None:
    """Without privacy: the same adapter to the bit, and an adapter that verifies."""
    deployment = federation.run("raw", {**RAW, "rounds": 2})
    simulation = simulated(federation, tmp_path)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (deployment, simulation))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    for line, other in zip(
        read_lines(deployment / "metrics.jsonl"), read_lines(simulation / "metrics.jsonl"), strict=True
    ):
        assert line["train_loss"] == other["train_loss"]
        assert line["bytes_up"] == other["bytes_up"]
    verify = [
        *FEDLORA,
        "verify",
        str(deployment / "adapter"),
        "--key",
        str(federation.site("a") / "signing/adapter.pub"),
    ]
    assert subprocess.run(verify, cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_ledgers_add_up(federation: Federation) -> None:
    """Under DP: what the coordinator says was spent is what each site's own ledger says."""
    deployment = federation.run("dp", {**DP, "rounds": 2})
    record = json.loads((deployment / "privacy.json").read_text())
    for client, name in enumerate(SITES):
        entries = Ledger(federation.site(name) / "state/ledger.jsonl", name).entries()
        assert len(entries) == 2
        spent = epsilon([entry.use for entry in entries], target_delta=record["delta"], accountant="pld")
        assert record["clients"][client]["epsilon"] == spent
        released = [
            line for line in ReleaseLog(federation.site(name) / "state/released.jsonl").lines() if line["run"] == "dp"
        ]
        assert [line["ledger"] for line in released] == [entry.hash for entry in entries]
        assert all(line["examples"] == 0 and not line["metrics"] for line in released)
    assert record["private"]
