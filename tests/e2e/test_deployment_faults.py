"""What happens to a deployed federation when something fails or misbehaves; `make test-deploy`, with real processes.

Each test notes what was observed and what it cost, a line in the file that FEDLORA_FAULT_LOG names; docs/reliability.md
is written from it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from deploy.demo import FEDLORA
from fedlora.privacy import Ledger
from simulations.superlink import flower_command, flower_environment, free_ports
from tests.support.deployment import DP, RAW, ROOT, SITES, Federation, deployed, hosts

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


def supervised(federation: Federation, what: str) -> Callable[[], None]:
    """Start a process again whenever it ends, as systemd does; return what ends that."""
    ended = threading.Event()

    def again() -> None:
        while not ended.is_set():
            federation.start(what)
            process = federation.processes[what]
            while process.poll() is None and not ended.wait(0.5):
                pass
            ended.wait(5.0)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join()

    return end


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


def test_machine_of_a_site_dies_while_it_trains(federation: Federation) -> None:
    """Daemon, trainers and SuperNode at once; the machine is back two minutes later."""
    with running(federation, "machine-dies", rounds=8, **{"train.local-steps": 80}) as folder:
        after_round(federation, folder, 1)
        federation.until(lambda: busy(federation, "daemon-c"), "run", 60)
        federation.kill("daemon-c")
        federation.kill("supernode-c")
        after_round(federation, folder, 3)
        time.sleep(45)
        federation.start("daemon-c")
        federation.until_listening("c")
        end = supervised(federation, "supernode-c")
        after_round(federation, folder, 7, 300)
    end()
    why, back = refusals(federation, folder, 2), rounds_of(federation, folder, 2)
    assert why, "it was in a round when it died"
    assert 8 in back, back
    assert rounds_of(federation, folder, 0) == list(range(1, 9))
    note(
        "machine of a site dies while it trains, back after two minutes",
        str(why),
        f"site in rounds {back}; seconds {seconds(folder)}",
    )


def busy(federation: Federation, what: str) -> bool:
    """Whether a trainer computes now."""
    family = psutil.Process(federation.processes[what].pid).children(recursive=True)
    trainers = [one for one in family if "TrainerProcess" in " ".join(one.cmdline())]
    return any(one.cpu_percent(0.5) > 20 for one in trainers)


def test_supernode_killed_and_back(federation: Federation) -> None:
    with running(federation, "supernode-killed", rounds=14) as folder:
        after_round(federation, folder, 1)
        federation.kill("supernode-c")
        end = supervised(federation, "supernode-c")
        killed = time.monotonic()
        after_round(federation, folder, 13, 200)
    end()
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


def test_coordinator_killed_within_a_round_under_dp(federation: Federation) -> None:
    """The round is asked again, and no site pays for it twice: the budget holds for all rounds."""
    name = "killed-under-dp"
    folder = federation.configure(name, {**DP, "rounds": 3, "federation.wait": 240.0})
    federation.launch()

    def left() -> list[tuple[int, bool]]:
        return [(line["round"], line["again"]) for line in federation.released("a") if line["run"] == name]

    federation.until(lambda: (2, False) in left(), "run", 150)
    federation.kill("run")
    federation.kill("superlink")
    assert federation.rounds(folder) == 1, "round 2 had ended"
    federation.start("superlink")
    process = federation.launch()
    assert process.wait(300) == 0, federation.said("run")[-4000:]
    federation.processes.pop("run", None)
    assert federation.rounds(folder) == 3
    paid = [
        len(
            [
                entry
                for entry in Ledger(federation.site(site) / "state/ledger.jsonl", site).entries()
                if entry.run == name
            ]
        )
        for site in SITES
    ]
    assert paid == [3, 3, 3]
    assert (2, True) in left()
    note(
        "coordinator killed -9 within a round, under DP, and started again",
        f"what had left was sent again: {left()} at site a; rounds paid {paid}",
        f"seconds {seconds(folder)}",
    )


@contextmanager
def behind_a_proxy(federation: Federation, name: str, folder: Path) -> Iterator[Callable[[str], None]]:
    """Put a bad network between a site and the coordinator; yield what sets how bad it is.

    TLS is end to end, so all that the proxy can do is to be a bad network.
    """
    mode, site, supernode = folder / "mode", federation.site(name) / "site.toml", f"supernode-{name}"

    def set_mode(bad: str) -> None:
        mode.write_text(bad)

    set_mode("pass")
    federation.kill(supernode, signal.SIGTERM)
    text, (port,) = site.read_text(), free_ports(1)
    host = federation.net.address("coordinator")
    target = hosts(federation).port
    site.write_text(text.replace(f'superlink = "{host}:{target}"', f'superlink = "127.0.0.1:{port}"'))
    command = [*federation.net.prefix(name), sys.executable, "-m", "tests.support.proxy"]
    proxy = subprocess.Popen([*command, str(port), host, str(target), str(mode)], cwd=ROOT)
    time.sleep(1)
    end = supervised(federation, supernode)
    try:
        yield set_mode
    finally:
        end()
        federation.kill(supernode, signal.SIGTERM)
        proxy.kill()
        proxy.wait(10)
        site.write_text(text)
        federation.start(supernode)


def test_network_that_delays_stalls_and_resets(federation: Federation, tmp_path: Path) -> None:
    with (
        behind_a_proxy(federation, "a", tmp_path) as set_mode,
        running(federation, "bad-network", rounds=24) as folder,
    ):
        for number, bad in enumerate(("delay", "stall", "reset")):
            after_round(federation, folder, 1 + 3 * number)
            set_mode(bad)
            time.sleep(20)
            set_mode("pass")
    back = rounds_of(federation, folder, 0)
    assert max(back) == 24, (back, refusals(federation, folder, 0))
    assert rounds_of(federation, folder, 1) == list(range(1, 25))
    note(
        "a network that delays each packet by 0.3 s, stalls and resets, 20 s each",
        str(refusals(federation, folder, 0)),
        f"site in rounds {back}; seconds {seconds(folder)}",
    )


def test_killed_while_its_update_is_on_the_way(federation: Federation, tmp_path: Path) -> None:
    """Daemon and SuperNode die after the update has left the daemon and before it has reached the coordinator."""

    def left() -> list[int]:
        return [line["round"] for line in federation.released("b") if line["run"] == "upload"]

    with (
        behind_a_proxy(federation, "b", tmp_path) as set_mode,
        running(federation, "upload", rounds=16) as folder,
    ):
        after_round(federation, folder, 1)
        federation.until(lambda: max(left()) > 1, "run", 60)
        set_mode("stall")
        dead = max(left())
        federation.kill("daemon-b")
        federation.kill("supernode-b")
        set_mode("pass")
        federation.start("daemon-b")
        federation.until_listening("b")
        after_round(federation, folder, 15, 300)
    why, back = refusals(federation, folder, 1), rounds_of(federation, folder, 1)
    assert dead in why, (dead, why, back)
    assert max(back) == 16, back
    assert set(back) < set(left()), "what has left and did not arrive is in the log all the same"
    assert rounds_of(federation, folder, 0) == list(range(1, 17))
    note(
        "site killed -9 while its update was on the way",
        str(why),
        f"left {left()}, arrived {back}; seconds {seconds(folder)}",
    )


def test_clock_of_a_site_a_day_ahead(federation: Federation, tmp_path: Path) -> None:
    """Refused by the gateway, named in its log; taken again once the clock is right."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler: a process cannot be given another clock")
    clock = tmp_path / "clock.so"
    source = ROOT / "tests/support/clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(clock), str(source), "-ldl"], check=True)
    federation.kill("supernode-c", signal.SIGTERM)
    federation.start("supernode-c", LD_PRELOAD=str(clock), CLOCK_SHIFT="86400")
    with running(federation, "clock", rounds=6) as folder:
        after_round(federation, folder, 2)
        federation.kill("supernode-c", signal.SIGTERM)
        federation.start("supernode-c")
    back = rounds_of(federation, folder, 2)
    assert back
    assert min(back) > 2
    assert rounds_of(federation, folder, 0) == list(range(1, 7))
    (named, *_) = [line for line in federation.said("superlink").splitlines() if "the clock of site c is" in line]
    note("clock of a site a day ahead", named.split("the clock")[-1], f"site in rounds {back}; {seconds(folder)}")


def test_a_key_that_is_used_twice(federation: Federation) -> None:
    """The second SuperNode is refused, and the first goes on."""
    site, (port,) = federation.site("b"), free_ports(1)
    lines = (site / "site.toml").read_text().splitlines()
    twin = [f"port = {port}" if line.startswith("port = ") else line for line in lines]
    (site / "twin.toml").write_text("\n".join(twin))
    with running(federation, "twice", rounds=4) as folder:
        after_round(federation, folder, 1)
        command = [*federation.net.prefix("b"), *FEDLORA, "site", "supernode", str(site / "twin.toml")]
        with (site / "twin.log").open("wb") as log:  # not a pipe, which a child of it keeps open
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=60, check=False)
    said = (site / "twin.log").read_text()[-3000:]
    assert done.returncode != 0, said
    assert "Failed to activate" in said
    for client in range(3):
        assert rounds_of(federation, folder, client) == [1, 2, 3, 4]
    note("a registered key used by a second SuperNode", f"refused, exit code {done.returncode}", str(seconds(folder)))


def test_disk_of_a_site_full(federation: Federation) -> None:
    """Its log cannot be written, so nothing leaves; it takes part again when there is room."""
    if os.getuid() != 0:
        pytest.skip("a small disk is mounted for this, which takes root")
    state = federation.site("b") / "state"
    federation.kill("daemon-b", signal.SIGTERM)
    kept = state.with_name("kept")
    state.rename(kept)
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(state)], check=True)
    try:
        shutil.copytree(kept, state, dirs_exist_ok=True)
        federation.start("daemon-b")
        federation.until_listening("b")
        with running(federation, "disk-full", rounds=6) as folder:
            after_round(federation, folder, 1)
            with suppress(OSError), (state / "fill").open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            after_round(federation, folder, 3)
            (state / "fill").unlink()
        why, back = refusals(federation, folder, 1), rounds_of(federation, folder, 1)
        assert set(why.values()) == {"it failed at the site; its own log says why"}, why
        assert max(back) == 6
        assert "No space left on device" in federation.said("daemon-b")
        released = [line["round"] for line in federation.released("b") if line["run"] == "disk-full"]
        assert released == back, "what is not in the log has not left"
        note("disk of a site full", str(why), f"site in rounds {back}; seconds {seconds(folder)}")
    finally:
        federation.kill("daemon-b", signal.SIGTERM)
        subprocess.run(["umount", str(state)], check=True)
        state.rmdir()
        kept.rename(state)
        federation.start("daemon-b")
        federation.until_listening("b")


def test_a_site_joins_late_and_another_leaves_and_comes_back(federation: Federation) -> None:
    federation.kill("supernode-c", signal.SIGTERM)
    with running(federation, "late", rounds=10) as folder:
        after_round(federation, folder, 3)
        federation.start("supernode-c")
        after_round(federation, folder, 5)
        federation.kill("supernode-b", signal.SIGTERM)
        after_round(federation, folder, 7)
        federation.start("supernode-b")
    late, back = rounds_of(federation, folder, 2), rounds_of(federation, folder, 1)
    assert late
    assert min(late) > 3
    assert max(late) == 10
    assert 10 in back
    assert back != list(range(1, 11)), "it was away"
    assert "site c: its SuperNode is not connected" in federation.said("run")
    note("a site joins late, another leaves and comes back", f"late {late}, back {back}", f"seconds {seconds(folder)}")


@pytest.mark.timeout(7200)
def test_soak(federation: Federation) -> None:
    """Many rounds: flat memory, no process and no file descriptor leaked."""
    count = int(os.environ.get("FEDLORA_SOAK_ROUNDS", "200"))
    measured: list[tuple[float, int, int]] = []
    with running(federation, "soak", rounds=count) as folder:
        for number in (count // 4, count // 2, 3 * count // 4, count - 1):
            after_round(federation, folder, number, 3600)
            measured.append(resources(federation))
    memory, descriptors, processes = (list(column) for column in zip(*measured, strict=True))
    assert memory[-1] < 1.05 * memory[1] + 0.05, memory
    assert max(descriptors[1:]) - min(descriptors[1:]) < 40, descriptors
    assert max(processes[1:]) - min(processes[1:]) <= 6, processes  # ClientApps come and go
    note(
        f"{count} rounds",
        f"GB {memory}, descriptors {descriptors}, processes {processes}",
        f"median {np.median(seconds(folder)):.1f} s a round",
    )


def resources(federation: Federation) -> tuple[float, int, int]:
    """Memory in GB (unique to processes), open files and number of all of a federation's lasting processes."""
    memory, files, count = 0, 0, 0
    for process in federation.processes.values():
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                if "flwr-clientapp" in " ".join(one.cmdline()):
                    continue
                memory, files, count = memory + one.memory_full_info().uss, files + one.num_fds(), count + 1
            except psutil.Error:
                continue
    return round(memory / 1e9, 3), files, count


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


def test_malicious_site(federation: Federation) -> None:
    """A site's SuperNode sends something else than its daemon gave it, another thing each round."""
    federation.kill("supernode-c", signal.SIGTERM)
    federation.start("supernode-c", PYTHONPATH=str(ROOT / "tests/support/hostile"), FEDLORA_HOSTILE=",".join(HOSTILE))
    changes = {"rounds": len(HOSTILE), "federation.max-change": 50.0, "federation.min-replies": 2}
    try:
        with running(
            federation, "malicious", **changes, **{"federation.grace": 120.0, "federation.timeout": 240.0}
        ) as folder:
            after_round(federation, folder, len(HOSTILE) - 1, 300)
    finally:
        federation.kill("supernode-c", signal.SIGTERM)
        federation.start("supernode-c")
    why = refusals(federation, folder, 2)
    assert rounds_of(federation, folder, 2) == [], "nothing of it was used"
    assert rounds_of(federation, folder, 0) == list(range(1, len(HOSTILE) + 1)), "nobody else was harmed"
    for number, (what, fits) in enumerate(HOSTILE.values(), start=1):
        assert number in why, f"{what}: {why}"
        assert fits(why[number]), f"{what}: {why[number]}"
        note(f"malicious site: {what}", why[number], f"the round took {seconds(folder)[number - 1]} s")


LARGE = """
import time
from pathlib import Path
import numpy as np
import psutil
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from fedlora.server.mail import Mail
from fedlora.wire import decode, encode

client = ClientApp()
server = ServerApp()

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
    def messages():
        yield Message(RecordDict({"a": encode(tensors)}), node, "train", ttl=900.0)

    (reply,) = Mail(grid, 900.0, deployed=True).exchange(messages())
    back = decode(reply.content["a"])
    right = all((back[name] == value + 1).all() for name, value in tensors.items())
    Path(context.run_config["out"]).write_text(f"{right} {time.monotonic() - started:.1f}")
"""


@pytest.mark.timeout(1200)
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
    while process.poll() is None and time.monotonic() < end:
        for one in psutil.process_iter(["cmdline", "memory_info"]):
            line = " ".join(one.info["cmdline"] or [])
            for name in (
                "flower-superlink",
                "deploy superlink",
                "own_supernode",
                "flwr-clientapp",
                "flwr-serverapp",
            ):
                if name in line and one.info["memory_info"]:
                    most[name] = max(most.get(name, 0.0), one.info["memory_info"].rss / 1e9)
        time.sleep(0.5)
    process.wait(60)
    assert out.is_file(), f"the run left no result: {process.returncode}"
    right, took = out.read_text().split()
    assert right == "True"
    shown = ", ".join(f"{name.replace('deploy superlink', 'gateway')} {value:.2f} GB" for name, value in most.items())
    assert max(most.values()) < 1 + 3.5 * size / 1e9, shown
    note(f"a message of {size / 1e9:g} GB down and up", f"passed in {took} s", f"most memory: {shown}")
