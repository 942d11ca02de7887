"""What happens to a deployed federation when something fails or misbehaves; `make test-deploy`, with real processes.

Each test notes what was observed and what it cost, a line in the file that FEDLORA_FAULT_LOG names; docs/reliability.md
is written from it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from simulations.launch import flower_command, flower_environment
from tests.support.deployment import RAW, ROOT, Federation, deployed, hosts

pytestmark = [pytest.mark.e2e, pytest.mark.deploy]

QUORUM = {**RAW, "federation.min-replies": 2, "federation.grace": 15.0, "federation.timeout": 90.0}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with deployed(tmp_path_factory.mktemp("faults") / "files") as started:
        yield started


def note(fault: str, observed: str, cost: str) -> None:
    line = json.dumps({"fault": fault, "observed": observed, "cost": cost})
    print(line)
    if named := os.environ.get("FEDLORA_FAULT_LOG"):
        with Path(named).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@contextmanager
def running(federation: Federation, name: str, **changes: Any) -> Iterator[Path]:
    """A run in the background; it is over, and well, when the block has ended."""
    folder = federation.configure(name, {**QUORUM, **changes})
    process = federation.launch()
    yield folder
    try:
        assert process.wait(400) == 0, federation.said("run")[-4000:]
    finally:
        federation.processes.pop("run", None)
        if process.poll() is None:
            process.kill()


def after_round(federation: Federation, folder: Path, number: int, seconds: float = 150.0) -> None:
    federation.until(lambda: federation.rounds(folder) >= number, "run", seconds)


def refusals(federation: Federation, folder: Path, client: int) -> dict[int, str]:
    """Why a site was left out, by round."""
    lines = federation.clients(folder)
    return {line["round"]: line["refused"] for line in lines if line["client"] == client and line["refused"]}


def rounds_of(federation: Federation, folder: Path, client: int) -> list[int]:
    """The rounds that a site's update is in."""
    lines = federation.clients(folder)
    return [line["round"] for line in lines if line["client"] == client and not line["refused"]]


def seconds(folder: Path) -> list[float]:
    return [round(json.loads(line)["seconds"], 1) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def supervised(federation: Federation, what: str) -> threading.Event:
    """Start a process again whenever it ends, as systemd does; return what ends that."""
    ended = threading.Event()

    def again() -> None:
        while not ended.is_set():
            federation.start(what)
            process = federation.processes[what]
            while process.poll() is None and not ended.wait(0.5):
                pass
            ended.wait(5.0)

    threading.Thread(target=again, daemon=True).start()
    return ended


def test_daemon_killed_and_back(federation: Federation) -> None:
    with running(federation, "daemon-killed", rounds=6) as folder:
        after_round(federation, folder, 1)
        federation.kill("daemon-b")
        after_round(federation, folder, 2)
        federation.start("daemon-b")
    why, back = refusals(federation, folder, 1), rounds_of(federation, folder, 1)
    assert why
    assert any("daemon does not answer" in reason for reason in why.values()), why
    assert max(back) == 6, "it has come back"
    assert rounds_of(federation, folder, 0) == [1, 2, 3, 4, 5, 6]
    note("site's daemon killed -9 and started again", str(why), f"site in rounds {back}; seconds {seconds(folder)}")


def test_supernode_killed_and_back(federation: Federation) -> None:
    with running(federation, "supernode-killed", rounds=14) as folder:
        after_round(federation, folder, 1)
        federation.kill("supernode-c")
        ended = supervised(federation, "supernode-c")
        killed = time.monotonic()
        after_round(federation, folder, 13, 200)
    ended.set()
    back = rounds_of(federation, folder, 2)
    assert max(back) > 2, f"in no round after it was killed: {back}, {time.monotonic() - killed:.0f} s"
    note(
        "SuperNode killed -9, started again at once, refused by Flower for a minute",
        str(refusals(federation, folder, 2)),
        f"site in rounds {back}; seconds {seconds(folder)}",
    )


def test_network_cut_for_a_minute(federation: Federation) -> None:
    if not federation.net.real:
        pytest.skip("no network namespaces on this machine: there is no network to cut")
    with running(federation, "network-cut", rounds=14) as folder:
        after_round(federation, folder, 1)
        federation.net.cut("a", on=True)
        try:
            time.sleep(60)
        finally:
            federation.net.cut("a", on=False)
        after_round(federation, folder, 13, 200)
    back = rounds_of(federation, folder, 0)
    assert max(back) > 2, back
    note(
        "network of a site cut for a minute",
        str(refusals(federation, folder, 0)),
        f"site in rounds {back}; seconds {seconds(folder)}",
    )


def test_superlink_killed_and_back(federation: Federation) -> None:
    """The run ends with its SuperLink; `fedlora deploy run` goes on with it from the last finished round."""
    with running(federation, "superlink-killed", rounds=4, **{"federation.min-replies": 3}) as folder:
        after_round(federation, folder, 2)
        federation.kill("superlink")
        federation.start("superlink")
    undisturbed = federation.run("undisturbed", {**QUORUM, "federation.min-replies": 0, "rounds": 4})
    assert federation.rounds(folder) == 4
    same(folder, undisturbed)
    note(
        "SuperLink killed -9 and started again",
        "run failed, started again by `deploy run`, same adapter to the bit",
        f"seconds {seconds(folder)}",
    )


def test_coordinator_killed_and_resumed(federation: Federation) -> None:
    """Everything of the coordinator dies at once, as its machine does."""
    folder = federation.configure("coordinator-killed", {**QUORUM, "federation.min-replies": 0, "rounds": 4})
    federation.launch()
    after_round(federation, folder, 2)
    federation.kill("run")
    federation.kill("superlink")
    federation.start("superlink")
    process = federation.launch()
    assert process.wait(300) == 0, federation.said("run")[-4000:]
    federation.processes.pop("run", None)
    same(folder, federation.coordinator / "runs/undisturbed")
    note(
        "coordinator killed -9 (SuperLink, gateway, ServerApp) and started again",
        "same adapter to the bit",
        f"seconds {seconds(folder)}",
    )


def same(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (one, other))
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


HOSTILE: dict[str, tuple[str, Callable[[str], bool]]] = {
    "nan": ("NaN", lambda why: "NaN or infinity" in why),
    "names": ("other names", lambda why: "is missing" in why or "is not expected" in why),
    "shapes": ("other shapes", lambda why: "has shape" in why),
    "many": ("a million keys", lambda why: bool(why)),
    "scaled": ("scaled by 1e6", lambda why: "max-change" in why),
    "claims": ("a million times its rows", lambda why: "claims" in why),
    "pickle": ("pickled bytes", lambda why: bool(why)),
    "other": ("somebody else's report", lambda why: "answers for clients" in why),
    "large": ("2 GB", lambda why: bool(why)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_malicious_site(federation: Federation, kind: str, tmp_path: Path) -> None:
    """A site's SuperNode sends something else than its daemon gave it."""
    federation.kill("supernode-c")
    hostile = ROOT / "tests/support/hostile"
    with running(federation, f"hostile-{kind}", rounds=3, **{"federation.max-change": 50.0}) as folder:
        time.sleep(65)  # Flower takes the killed one for alive for a minute
        federation.start("supernode-c", PYTHONPATH=str(hostile), FEDLORA_HOSTILE=kind)
        after_round(federation, folder, 2)
    why = refusals(federation, folder, 2)
    what, fits = HOSTILE[kind]
    assert rounds_of(federation, folder, 2) == []
    assert rounds_of(federation, folder, 0) == [1, 2, 3]
    assert all(fits(reason) for reason in why.values()), why
    note(f"malicious site: {what}", str(why), f"seconds {seconds(folder)}")


LARGE = """
import time
from pathlib import Path
import numpy as np
import psutil
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedlora.wire import decode, encode

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    tensors = decode(message.content["a"])
    return Message(RecordDict({"a": encode({name: value + 1 for name, value in tensors.items()})}), reply_to=message)

@server.main()
def main(grid, context):
    count = int(context.run_config["numbers"]) // 8
    tensors = {f"layer.{n}": np.full((count,), n, dtype=np.float32) for n in range(8)}
    node = sorted(grid.get_node_ids())[0]
    started = time.monotonic()
    message = Message(RecordDict({"a": encode(tensors)}), node, "train", ttl=900.0)
    (reply,) = grid.send_and_receive([message], timeout=900)
    back = decode(reply.content["a"])
    right = all((back[name] == value + 1).all() for name, value in tensors.items())
    Path(context.run_config["out"]).write_text(f"{right} {time.monotonic() - started:.1f}")
"""


@pytest.mark.parametrize("size", [1_000_000_000, 2_500_000_000])
def test_large_messages(federation: Federation, size: int, tmp_path: Path) -> None:
    """An adapter of 1 GB, and a stacked one of 2.5 GB, down to a site and up again, through TLS and the gateway."""
    app, out = tmp_path / "app", tmp_path / "out"
    shutil.copytree(ROOT / "fedlora", app / "fedlora", ignore=shutil.ignore_patterns("__pycache__"))
    (app / "large").mkdir()
    (app / "large/__init__.py").touch()
    (app / "large/both.py").write_text(LARGE)
    project = {"name": '"large"', "version": '"1.0.0"', "license": '"Apache-2.0"', "dependencies": '["flwr"]'}
    (app / "pyproject.toml").write_text(
        "[project]\n" + "".join(f"{key} = {value}\n" for key, value in project.items()) + "[tool.flwr.app]\n"
        'publisher = "tests"\n[tool.flwr.app.components]\nserverapp = "large.both:server"\n'
        'clientapp = "large.both:client"\n[tool.flwr.app.config]\nout = ""\nnumbers = 0\n'
    )
    home = hosts(federation).flower_home
    command = [flower_command(), "run", str(app), "deployment", "--stream"]
    command += ["--run-config", f'out="{out}" numbers={size // 4}']
    process = subprocess.Popen(
        [*federation.net.prefix("coordinator"), *command],
        env={**flower_environment(home), "FLWR_HOME": str(home)},
        stdout=subprocess.DEVNULL,
    )
    most: dict[str, float] = {}
    end = time.monotonic() + 600
    while not out.exists() and time.monotonic() < end:
        for one in psutil.process_iter(["cmdline", "memory_info"]):
            line = " ".join(one.info["cmdline"] or [])
            for name in (
                "flower-superlink",
                "deploy superlink",
                "flower-supernode",
                "flwr-clientapp",
                "flwr-serverapp",
            ):
                if name in line and one.info["memory_info"]:
                    most[name] = max(most.get(name, 0.0), one.info["memory_info"].rss / 1e9)
        time.sleep(0.5)
    process.wait(60)
    right, took = out.read_text().split()
    assert right == "True"
    shown = ", ".join(f"{name.replace('deploy superlink', 'gateway')} {value:.2f} GB" for name, value in most.items())
    assert max(most.values()) < 1 + 5 * size / 1e9, shown
    note(f"a message of {size / 1e9:g} GB down and up", f"passed in {took} s", f"most memory: {shown}")
