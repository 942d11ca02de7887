"""A coordinator that sends a hostile ClientApp to a site, through a real SuperLink, to a SuperNode of another user."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.limits import SiteLimits
from clients.site import Job
from clients.site_file import SiteFile
from clients.worker import Worker
from deploy.coordinator_file import CoordinatorFile
from deploy.run import app_folder, read_run
from deploy.supernode import supernode_command
from fedlora.data import FederatedData
from fedlora.headers import instruction_header
from fedlora.joining import JoinRequest
from fedlora.privacy import Ledger
from simulations.privacy import settle_privacy
from simulations.superlink import flower_command, flower_environment
from tests.support.deployment import DP, ROOT, Federation, deployed
from tests.support.sites import instruction_of

pytestmark = [pytest.mark.e2e, pytest.mark.deploy]

NOBODY = 65534
PACKAGES = sysconfig.get_paths()["purelib"]
SCRIPT = """#!{python}
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="{name}")
sys.argv[0] = "{name}"
sys.exit(script.load()())
"""


def as_nobody(command: list[str], **environment: str) -> tuple[list[str], dict[str, str]]:
    """Return a command that another user runs, and its environment."""
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{PACKAGES}:{ROOT}", "LANG": "C.UTF-8", **environment}
    own = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    return [*own, "/usr/bin/env", *command], clean  # env, since setpriv itself still has root's way to files


def their_python() -> str:
    """A Python of this version that other users can run, with the packages of this one."""
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if Path(python).exists():
            command, environment = as_nobody([python, "-c", "import flwr, numpy"])
            if subprocess.run(command, env=environment, cwd="/", capture_output=True, check=False).returncode == 0:
                return python
    pytest.skip("no Python here that another user can run with these packages")


@pytest.fixture
def federation() -> Iterator[Federation]:
    """One site, with privacy; its folder is where other users may enter, so that they are stopped by what is in it."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can start a process of another user, with setpriv")
    folder = Path(tempfile.mkdtemp(prefix="fl-h-"))
    folder.chmod(0o755)
    try:
        with deployed(folder / "files", raw=False, sites=("a",), start=False) as made:
            file = made.site("a") / "site.toml"
            file.write_text(file.read_text().replace("users = []", 'users = ["nobody"]'))
            made.site("a").parent.chmod(0o755)
            made.start("superlink")
            made.start("daemon-a")
            made.until((made.coordinator / "state/roster.json").is_file, "superlink")
            made.until_listening("a")
            yield made
    finally:
        shutil.rmtree(folder)


def supernode(federation: Federation, folder: Path) -> None:
    """Start the site's SuperNode as another user, as its systemd unit does."""
    python, tools = their_python(), folder / "bin"
    tools.mkdir()
    for name in ("flower-superexec", "flwr-clientapp"):
        (tools / name).write_text(SCRIPT.format(python=python, name=name))
        (tools / name).chmod(0o755)
    site, home = federation.site("a"), folder / "home"
    home.mkdir()
    for path in (home, *site.joinpath("keys").rglob("*"), site / "keys"):
        os.chown(path, NOBODY, NOBODY)
    command, environment = supernode_command(SiteFile.read(site / "site.toml"))
    changed = {name: value for name, value in environment.items() if name.startswith("FLWR_")}
    changed |= {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(home), "FLWR_HOME": str(home)}
    command, environment = as_nobody([python, *command[1:]], **changed)
    with federation.log("supernode-a").open("ab") as log:
        federation.processes["supernode-a"] = subprocess.Popen(
            [*federation.net.prefix("a"), *command],
            env=environment,
            stdout=log,
            stderr=log,
            cwd=home,
            start_new_session=True,
        )


def asked(federation: Federation) -> dict[str, Any]:
    """What an honest coordinator would send: the hostile one changes it."""
    federation.configure("hostile", {**DP, "data.test-path": ""})
    _, config = read_run(CoordinatorFile.read(federation.coordinator / "coordinator.toml"), app_folder())
    config = settle_privacy(config, [config.privacy.client_size])
    nobody = (np.zeros(0, dtype=np.int64),)
    data = FederatedData(federation.corpus, nobody, nobody)
    model = Worker(lambda: Job(config.to_flat(), data, SiteLimits("/tmp")), 1).loaded.model
    request = JoinRequest("a", 0, 1, config.to_flat())
    instruction = instruction_of(config, model.specs, model.initial, request)
    sent, header = instruction.tensors, request.header()
    return {
        "join": header,
        "flat": json.loads(header["flat"]),
        "instruction": instruction_header(instruction),
        "tensors": {"tensors": [[name, str(value.dtype), list(value.shape)] for name, value in sent.items()]},
        "numbers": base64.b64encode(b"".join(value.tobytes() for value in sent.values())).decode(),
    }


def answers(federation: Federation, folder: Path) -> dict[str, str]:
    """Run the hostile app, and return what it has got, by way."""
    app, out = folder / "app", folder / "out"
    (app / "hostile").mkdir(parents=True)
    (app / "hostile/__init__.py").touch()
    shutil.copy(ROOT / "tests/support/hostile_app.py", app / "hostile/both.py")
    (app / "pyproject.toml").write_text(
        '[project]\nname = "hostile"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = ["flwr"]\n'
        '[tool.flwr.app]\npublisher = "tests"\n[tool.flwr.app.components]\nserverapp = "hostile.both:server"\n'
        'clientapp = "hostile.both:client"\n[tool.flwr.app.config]\nout = ""\nasked = ""\n'
    )
    (folder / "asked.json").write_text(json.dumps(asked(federation)))
    home = CoordinatorFile.read(federation.coordinator / "coordinator.toml").flower_home
    command = [*federation.net.prefix("coordinator"), flower_command(), "run", str(app), "deployment", "--stream"]
    settings = f'out="{out}" asked="{folder / "asked.json"}"'
    environment = {**flower_environment(home), "FLWR_HOME": str(home)}
    done = subprocess.run(
        [*command, "--run-config", settings], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert out.is_file(), done.stdout[-3000:] + done.stderr[-3000:] + federation.said("supernode-a")[-3000:]
    found: dict[str, str] = json.loads(out.read_text())
    return found


FORBIDDEN = ("PermissionError", "ProcessLookupError")
REFUSED = {
    "labels": "there is no question of kind 'labels'",
    "code": "train.",
    "pickle": "not a fedlora site",
    "privacy off": "dp-required",
    "less noise": "privacy budget",
    "more budget": "max-epsilon",
    "another delta": "max-delta",
    "more steps": "max-steps",
    "another model": "model.name",
    "a model of a path": "model.name",
    "plug-ins": "run.plugins",
    "a client number": "privacy.client-size",
    "metrics": "a client under DP does not report how its model does",
    "other tensors": "and the method has",
    "another client": "which are not here",
    "another job": "it has not joined this run",
}


def test_a_hostile_bundle_gets_nothing(federation: Federation) -> None:
    """Of all these ways none gives a row, a label, a count, a key, or an update without noise; the honest one works."""
    folder = federation.folder.parent / "coordinators"
    folder.mkdir()
    supernode(federation, folder)
    found = answers(federation, folder)
    honest, file = found.pop("an honest round"), found.pop("another file")
    for way, said in found.items():
        assert not said.startswith("GOT"), f"{way}: {said}"
        if way in REFUSED:
            assert said.startswith("RuntimeError"), f"{way}: {said}"
            assert REFUSED[way] in said, f"{way}: {said}"
        else:
            assert said.startswith(FORBIDDEN), f"{way}: {said}"
    assert file.startswith("GOT"), "it is not read at all, and the site joins with its own"
    assert honest.startswith("GOT"), honest
    assert "'examples': [0]" in honest, "not how many rows it has"
    assert "'metrics': []" in honest, "and no loss"
    whole = json.dumps(found) + honest
    assert not any(text[:20] in whole for text in federation.rows["a"].texts)
    (left,) = [line for line in federation.released("a") if line["tensors"]]
    assert left["run"] == "hostile"
    state = federation.site("a") / "state"
    assert len(Ledger(state / "ledger.jsonl", "a").entries()) == 1, "one update was paid for, and one left"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert federation.processes["daemon-a"].poll() is None
