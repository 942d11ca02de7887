"""Plain ``flwr run``: one client a node, client code of another checkout, and somebody else's app."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from tests.support.runs import BIN, ROOT
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e


def flwr(environment: dict[str, str], cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.slow
def test_plain_flwr_run_with_one_client_a_node(flower: dict[str, str], tmp_path: Path) -> None:
    """Three SuperNodes, one client each, personal heads: personal accuracy only, and bytes that agree."""
    flat = tiny_flat(
        tmp_path,
        **{
            "run.dir": str(tmp_path / "runs"),
            "run.name": "run",
            "federation.num-clients": 0,
            "strategy.name": "s2-cyclic",
            "rounds": 3,
            "method.head": "personal",
            "engine.dtype": "float32",
            "engine.pack": 1,
        },
    )
    config = tmp_path / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    nodes = "num-supernodes=3 client-resources-num-cpus=1"
    output = flwr(flower, ROOT, "run", ".", "--stream", "--run-config", str(config), "--federation-config", nodes)
    folder = tmp_path / "runs" / "run"
    assert (folder / "result.json").is_file(), output
    assert "Installing application dependencies" not in output, "torch would be installed again"
    turns = [4 * 2 * 4, 2 * 16 * 4, 2 * 16 * 4]  # numbers of s, B and A, four bytes each: a round for each
    lines = read_lines(folder / "metrics.jsonl")
    assert len(lines) == 3
    for payload, line in zip(turns, lines, strict=True):
        assert line["clients_ok"] == 3
        assert line["test_accuracy"] is None
        assert 0.0 <= line["personal_accuracy"] <= 1.0
        assert line["bytes_up"] == 3 * payload
        assert line["bytes_down"] == 2 * 3 * sum(turns), "sent to train, and again to evaluate"
        assert line["bytes_down_cached"] == 3 * payload, "clients that keep it need what has changed, once"
        assert 0.0 <= line["sparsity"] < 1.0
        for way, messages in (("up", 6), ("down", 6)):
            assert line[f"bytes_{way}"] < line[f"message_bytes_{way}"] <= line[f"bytes_{way}"] * 1.02 + messages * 1024
    assert json.loads((folder / "result.json").read_text())["head"] == "personal"
    assert (folder / "sites" / "client-0" / "round-4.safetensors").is_file()


@pytest.mark.slow
def test_client_code_of_another_checkout_is_refused(flower: dict[str, str], tmp_path: Path) -> None:
    """A SuperLink started elsewhere lends its directory to Ray's workers: both sides compare their code."""
    other = tmp_path / "other"
    for name in ("fedlora", "clients", "strategies", "simulations"):
        shutil.copytree(ROOT / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = other / "fedlora" / "seeded.py"
    changed.write_text(changed.read_text() + "# another version\n")
    flwr(flower, other, "ls")
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run"})
    config = tmp_path / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    output = flwr(flower, ROOT, "run", ".", "--stream", "--run-config", str(config))
    assert "fedlora: error: the server runs the code in" in output
    assert str(other / "clients") in output
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


PLAIN_PYPROJECT = """
[project]
name = "plain"
version = "1.0.0"

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "plain.server:app"
clientapp = "plain.client:app"

[tool.flwr.app.config]
result = ""
"""

PLAIN_SERVER = """
import json

from flwr.serverapp import ServerApp

from fedlora.methods import Lora, initial_tensors
from fedlora.methods.base import Layer
from fedlora.seeded import Seeded
from fedlora.server import Federation, FlowerStrategy
from fedlora.strategy import Setting
from strategies import FFALora

SPECS = Lora([Layer("layer", 4, 6, True, False)], rank=2, alpha=2.0, rslora=False).specs()
app = ServerApp()


@app.main()
def main(grid, context):
    import time

    while len(list(grid.get_node_ids())) < 4:
        time.sleep(0.1)
    strategy = FFALora(Setting(SPECS))
    state = strategy.initial(initial_tensors(SPECS, Seeded(0), "float32"))
    server = FlowerStrategy(strategy, Federation(num_clients=4), state)
    result = server.start(grid, server.arrays, num_rounds=2)
    outcome = {
        "metrics": {number: dict(record) for number, record in result.train_metrics_clientapp.items()},
        "refused": server.replies.refused,
        "B": server.state.tensors["layer.lora_B"].tolist(),
    }
    with open(context.run_config["result"], "w") as file:
        json.dump(outcome, file)
"""

PLAIN_CLIENT = """
import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlora.exchange import ClientReport, Update
from fedlora.reduce import fold
from fedlora.wire import Reply, read_instruction

app = ClientApp()


@app.train()
def train(message, context):
    instruction = read_instruction(message.content)
    (client,) = instruction.clients
    tensors = {name: value + client for name, value in instruction.tensors.items()}
    if client == 3:
        tensors["layer.lora_B"][0, 0] = np.nan
    report = ClientReport(client, examples=client + 1, steps=1, metrics={"loss": 1.0})
    reply = Reply(*fold(instruction, [Update(report, tensors)]))
    return Message(reply.to_content(), reply_to=message)
"""


def test_a_plain_server_app_drives_a_strategy(flower: dict[str, str], tmp_path: Path) -> None:
    """Somebody else's ServerApp and ClientApp, no trainers: a Flower strategy like any other.

    Client k, of weight k + 1, adds k to the server's B; client 3's has a NaN and is left out of both rounds.
    """
    app = tmp_path / "app"
    (app / "plain").mkdir(parents=True)
    (app / "plain" / "__init__.py").write_text("")
    (app / "plain" / "server.py").write_text(PLAIN_SERVER)
    (app / "plain" / "client.py").write_text(PLAIN_CLIENT)
    (app / "pyproject.toml").write_text(PLAIN_PYPROJECT)
    path = tmp_path / "result.json"
    nodes = "num-supernodes=4 client-resources-num-cpus=1"
    flower["PYTHONPATH"] = str(ROOT)  # the library of this checkout, whichever one is installed
    output = flwr(flower, app, "run", ".", "--stream", "--run-config", f"result='{path}'", "--federation-config", nodes)
    assert path.is_file(), output
    outcome = json.loads(path.read_text())
    for record in outcome["metrics"].values():
        assert (record["clients_ok"], record["clients_refused"]) == (3, 1)
    assert outcome["refused"].keys() == {"3"}
    assert "layer.lora_B" in outcome["refused"]["3"]
    step = (0 * 1 + 1 * 2 + 2 * 3) / 6
    assert np.allclose(outcome["B"], 2 * step, rtol=1e-6)
