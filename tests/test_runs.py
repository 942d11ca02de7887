"""Whole runs through real Flower processes, as a user starts them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from flwr.cli.build import build_fab_from_disk
from peft import PeftModel
from safetensors.numpy import load_file

from fedlora.config import from_toml, to_toml
from fedlora.data import load_federated
from fedlora.plugins import read_config
from fedlora.privacy import Ledger, Use, epsilon, merged
from fedlora.runs.folder import read_lines
from fedlora.runs.privacy import told_epsilon
from simulations.launch import end_processes, flower_environment, shipped
from tests.test_trainer import tiny_flat

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.e2e


@dataclass
class Finished:
    """A run that is over: its exit code, output, folder, and what it left running."""

    code: int
    output: str
    folder: Path
    left: list[str]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    def checkpoint(self) -> dict[str, Any]:
        state = json.loads((self.folder / "checkpoint" / "state.json").read_text())
        return load_file(self.folder / "checkpoint" / state["tensors"])


def marked(mark: str) -> list[psutil.Process]:
    """Processes that descend from a run, by a variable in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FEDLORA_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def workers() -> dict[int, str]:
    """Every process of Flower or Ray on this machine, by number (some of Ray's hide their environment)."""
    found = {}
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or [])
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(w in command for w in ("ray::", "raylet", "flower-")):
            found[process.pid] = command
    return found


def fedlora_run(folder: Path, options: list[str] | None = None, kill_trainer: bool = False, **changes: Any) -> Finished:
    """``fedlora run`` on the tiny model; with ``kill_trainer``, kill -9 one trainer after the first round."""
    flat = tiny_flat(folder, **{"run.dir": str(folder / "runs"), "run.name": "run", **changes})
    config = folder / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    mark, others = uuid.uuid4().hex, workers()
    lines = []
    with subprocess.Popen(
        [str(BIN / "fedlora"), "run", "-c", str(config), *(options or [])],
        cwd=ROOT,
        env={**os.environ, "FEDLORA_TEST": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if kill_trainer and line.startswith("round 1/"):
                trainers = [p for p in marked(mark) if "".join(p.cmdline()).startswith("ray::Trainer")]
                assert trainers, "no trainer found to kill"
                trainers[0].send_signal(signal.SIGKILL)
    code = process.returncode
    return Finished(code, "".join(lines), folder / "runs" / "run", [c for p, c in workers().items() if p not in others])


PACKED: dict[str, Any] = {
    "rounds": 4,
    "engine.pack": 2,
    "strategy.name": "fedavg",
    "train.local-steps": 8,
    "train.learning-rate": 0.05,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four clients on two SuperNodes, in packs of two, one trainer."""
    return fedlora_run(tmp_path_factory.mktemp("packed"), **PACKED)


def test_a_run_completes_and_leaves_nothing_running(packed: Finished) -> None:
    assert packed.code == 0, packed.output
    assert packed.left == []
    assert all(f"round {n}/4" in packed.output for n in range(1, 5))
    assert f"run folder: {packed.folder}" in packed.output
    assert "next: fedlora report" in packed.output


def test_the_run_folder_is_complete(packed: Finished) -> None:
    names = {path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.toml",
        "metrics.jsonl",
        "clients.jsonl",
        "privacy.json",
        "environment.json",
        "trainers.json",
        "partition.json",
        "partition.png",
        "accuracy.png",
        "result.json",
        "summary.md",
        "checkpoint/state.json",
        "checkpoint/round-4.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "adapter/tokenizer.json",
    }
    assert not [name for name in names if name.endswith(".partial")]
    keys = {"round", "test_accuracy", "test_loss", "clients_ok", "clients_refused", "bytes_up", "bytes_down"}
    keys |= {"message_bytes_up", "message_bytes_down", "seconds", "personal_accuracy", "head"}
    assert [line["round"] for line in packed.metrics] == [1, 2, 3, 4]
    assert all(
        keys <= set(line) and line["clients_ok"] == 4 and line["personal_accuracy"] is None for line in packed.metrics
    )
    clients = read_lines(packed.folder / "clients.jsonl")
    assert [(line["round"], line["client"]) for line in clients] == [(r, c) for r in range(1, 5) for c in range(4)]
    summary = (packed.folder / "summary.md").read_text()
    assert "accuracy.png" in summary
    assert "partition.png" in summary
    assert json.loads((packed.folder / "environment.json").read_text())["libraries"]["flwr"]


def test_the_base_model_is_loaded_once(packed: Finished) -> None:
    trainers = json.loads((packed.folder / "trainers.json").read_text())
    assert [trainer["base_loads"] for trainer in trainers] == [1]


def test_peft_reproduces_the_final_accuracy(packed: Finished) -> None:
    """The adapter folder, on the untouched base, in plain PEFT and transformers: the same number, exactly."""
    config = read_config(from_toml((packed.folder / "config.toml").read_text()))
    corpus = load_federated(config, config.federation.num_clients).corpus
    base = transformers.AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2).double()
    model = PeftModel.from_pretrained(base, str(packed.folder / "adapter")).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed.folder / "adapter")
    right, loss = 0, 0.0
    with torch.no_grad():
        for text, label in zip(corpus.test.texts, corpus.test.labels, strict=True):
            encoded = tokenizer(text, return_tensors="pt", truncation=True, max_length=config.train.max_length)
            logits = model(**encoded).logits
            right += int(logits.argmax() == label)
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor([label])))
    final = packed.metrics[-1]["test_accuracy"]
    assert right / len(corpus.test) == final
    assert json.loads((packed.folder / "result.json").read_text())["test_accuracy"] == final
    assert loss / len(corpus.test) == pytest.approx(packed.metrics[-1]["test_loss"], abs=1e-10)
    assert packed.metrics[-1]["train_loss"] < packed.metrics[0]["train_loss"] - 0.01, (
        "control: the run learned something"
    )


def test_report_of_a_run(packed: Finished) -> None:
    (packed.folder / "summary.md").unlink()
    done = subprocess.run(
        [str(BIN / "fedlora"), "report", str(packed.folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (packed.folder / "summary.md").is_file()
    wrong = subprocess.run([str(BIN / "fedlora"), "report", str(ROOT)], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "is not a run folder" in wrong.stdout


def test_a_killed_trainer_is_restarted_and_its_pack_repeated(packed: Finished, tmp_path: Path) -> None:
    """Two trainers instead of one, one of them killed: the same packs give the same tensors, no client is lost."""
    run = fedlora_run(tmp_path, kill_trainer=True, **{**PACKED, "engine.trainers": 2})
    assert run.code == 0, run.output
    assert run.left == []
    assert [line["clients_refused"] for line in run.metrics] == [0, 0, 0, 0]
    expected, tensors = packed.checkpoint(), run.checkpoint()
    assert tensors.keys() == expected.keys()
    assert max(float(np.abs(tensors[name] - expected[name]).max()) for name in expected) < 1e-10
    trainers = json.loads((run.folder / "trainers.json").read_text())
    assert [trainer["base_loads"] for trainer in trainers] == [1, 1], "once in each process, the new one included"


def test_a_run_that_fails_says_so(tmp_path: Path) -> None:
    """Every client diverges: the run stops with their names, and the exit code is not 0."""
    run = fedlora_run(tmp_path, **{"train.optimizer": "sgd", "train.learning-rate": 1e300})
    assert run.code == 1
    assert run.left == []
    assert "fedlora: the run failed (finished:failed)" in run.output
    assert "4 of 4 clients failed" in run.output
    assert "is not finite after 3 steps; lower train.learning-rate" in run.output


def test_an_interrupted_run_leaves_nothing_running(tmp_path: Path) -> None:
    """Ctrl-C in the first round: everything that Flower and Ray started is ended, the agents of Ray included."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path), "run.name": "run", "rounds": 1000})
    config = tmp_path / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    others = workers()
    with subprocess.Popen(
        [str(BIN / "fedlora"), "run", "-c", str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type, return-value]
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round 1/"):
                assert len(set(workers()) - set(others)) >= 5
                os.killpg(process.pid, signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    assert "fedlora: interrupted; nothing was left running" in rest
    assert set(workers()) <= set(others)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flower_ships_the_same_of_a_copy(tmp_path: Path) -> None:
    """And does not walk through this checkout's virtual environment for it."""
    copy = shipped(ROOT, tmp_path / "app")
    assert build_fab_from_disk(copy) == build_fab_from_disk(ROOT)
    assert len(list(copy.rglob("*"))) < 200
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pyproject.toml").write_text(PLAIN_PYPROJECT)
    assert shipped(tmp_path / "other", tmp_path / "never") == tmp_path / "other"


def test_bad_input_stops_before_anything_starts(tmp_path: Path) -> None:
    started = time.monotonic()
    for changes, message in (
        ({"strategy.name": "fedavgg"}, "strategy.name: unknown name 'fedavgg'. Did you mean 'fedavg'?"),
        ({"data.label-column": "lable"}, "data.label-column = 'lable': no such column"),
    ):
        run = fedlora_run(tmp_path, **changes)
        assert run.code == 2
        assert f"fedlora: error: {message}" in run.output
        assert "SuperLink" not in run.output
        assert not run.folder.exists()
    assert time.monotonic() - started < 40


def test_repeated_options_all_count(tmp_path: Path) -> None:
    """Flower itself would keep only the last option of a section; garbage must not be dropped silently."""
    from simulations.options import read_overrides

    flat = read_overrides(ROOT, ["train.batch-size=3", "train.learning-rate=0.5 seed=4"])
    assert (flat["train.batch-size"], flat["train.learning-rate"], flat["seed"]) == (3, 0.5, 4)
    for option, unread in (
        ("rounds 3", "rounds 3"),
        ("train.learning-rate = 0.1 rounds=2", "train.learning-rate ="),
        ("", ""),
    ):
        with pytest.raises(ValueError, match=f"cannot read '?{unread}"):
            read_overrides(ROOT, [option])


def test_plan_says_what_a_run_will_send(packed: Finished) -> None:
    """The plan's bytes are those that the run measured."""
    done = subprocess.run(
        [str(BIN / "fedlora"), "plan", "-c", str(packed.folder / "config.toml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = packed.metrics[0]
    assert line["bytes_up"] == line["bytes_down"] == 4 * 8 * (2 * 2 * 2 * 2 * 16 + 2 * 16 + 2)
    assert f"{line['bytes_up'] // 4 / 1000:.2f} kB up" in done.stdout
    assert "server mean of updates: not exact" in done.stdout


# -- plain Flower -------------------------------------------------------------------------------------


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a Flower of its own; whatever it starts is ended afterwards."""
    home = tmp_path / "flower"
    home.mkdir()
    yield flower_environment(home)
    end_processes(home)


def flwr(environment: dict[str, str], cwd: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


def test_plain_flwr_run_with_one_client_a_node(flower: dict[str, str], tmp_path: Path) -> None:
    """Three SuperNodes, one client each, private heads: personal accuracy only, and bytes that agree."""
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
from fedlora.wire import from_named_arrays, named_arrays
from strategies import FFALora, Setting

SPECS = Lora([Layer("layer", 4, 6, True, False)], rank=2, alpha=2.0, rslora=False).specs()
app = ServerApp()


@app.main()
def main(grid, context):
    import time

    while len(list(grid.get_node_ids())) < 4:
        time.sleep(0.1)
    strategy = FFALora(Setting(specs=SPECS, num_clients=4))
    initial = initial_tensors(SPECS, Seeded(0), "float32")
    arrays = named_arrays({name: initial[name] for name in strategy.exchanged(1)})
    result = strategy.start(grid, arrays, num_rounds=2)
    outcome = {
        "metrics": {number: dict(record) for number, record in result.train_metrics_clientapp.items()},
        "refused": strategy.tally.refused,
        "B": from_named_arrays(result.arrays)["layer.lora_B"].tolist(),
    }
    with open(context.run_config["result"], "w") as file:
        json.dump(outcome, file)
"""

PLAIN_CLIENT = """
import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedlora.wire import Instruction, Reply

app = ClientApp()


@app.train()
def train(message, context):
    instruction = Instruction.from_content(message.content)
    (client,) = instruction.clients
    update = {name: value + client for name, value in instruction.tensors.items()}
    if client == 3:
        update["layer.lora_B"][0, 0] = np.nan
    reply = Reply(update=update)
    reply.add(client, examples=client + 1, steps=1, metrics={"loss": 1.0})
    return Message(reply.to_content(), reply_to=message)
"""


def test_a_plain_server_app_drives_a_strategy(flower: dict[str, str], tmp_path: Path) -> None:
    """Somebody else's ServerApp and ClientApp, no trainers: a Flower strategy like any other.

    Client k, of weight k + 1, adds k to the server's B; client 3 sends NaN and is left out of both rounds.
    """
    app = tmp_path / "app"
    (app / "plain").mkdir(parents=True)
    (app / "plain" / "__init__.py").write_text("")
    (app / "plain" / "server.py").write_text(PLAIN_SERVER)
    (app / "plain" / "client.py").write_text(PLAIN_CLIENT)
    (app / "pyproject.toml").write_text(PLAIN_PYPROJECT)
    path = tmp_path / "result.json"
    nodes = "num-supernodes=4 client-resources-num-cpus=1"
    output = flwr(flower, app, "run", ".", "--stream", "--run-config", f"result='{path}'", "--federation-config", nodes)
    assert path.is_file(), output
    outcome = json.loads(path.read_text())
    for record in outcome["metrics"].values():
        assert (record["clients_ok"], record["clients_refused"]) == (3, 1)
    assert outcome["refused"] == {"3": "layer.lora_B holds NaN or infinity"}
    step = (0 * 1 + 1 * 2 + 2 * 3) / 6
    assert np.allclose(outcome["B"], 2 * step, rtol=1e-6)


# -- resume -------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {
    "rounds": 5,
    "strategy.name": "mos-private",
    "method.head": "personal",
    "train.local-steps": 6,
    "train.learning-rate": 0.05,
    "federation.clients-per-round": 3,
    "engine.dtype": "float32",
    "eval.baselines": True,
}


def kill_everything(process: subprocess.Popen[str], mark: str) -> None:
    """kill -9 of the run and of all that it started, at once."""
    for victim in [psutil.Process(process.pid), *marked(mark), *psutil.Process(process.pid).children(recursive=True)]:
        try:
            victim.kill()
        except psutil.Error:
            continue


def start(config: Path, options: str, mark: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(BIN / "fedlora"), "run", "-c", str(config), *(["-c", options] if options else [])],
        cwd=ROOT,
        env={**os.environ, "FEDLORA_TEST": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def comparable(folder: Path) -> dict[str, Any]:
    """Everything in a run folder that does not depend on the clock or on processes."""
    metrics = [
        {key: value for key, value in line.items() if key != "seconds"} for line in read_lines(folder / "metrics.jsonl")
    ]
    result = json.loads((folder / "result.json").read_text())
    files = [*folder.rglob("*.safetensors"), folder / "scores.jsonl", folder / "clients.jsonl"]
    return {
        "metrics": metrics,
        "result": {key: value for key, value in result.items() if key != "seconds"},
        **{path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return fedlora_run(tmp_path_factory.mktemp("undisturbed"), **LONG)


def test_personal_strategies_report_clients_and_export_their_adapters(undisturbed: Finished) -> None:
    """MoS with private shards and heads: personal accuracy by round, baselines beside it, an adapter a client."""
    assert undisturbed.code == 0, undisturbed.output
    assert all(line["test_accuracy"] is None for line in undisturbed.metrics)
    assert all(0 <= line["personal_accuracy"] <= 1 for line in undisturbed.metrics)
    result = json.loads((undisturbed.folder / "result.json").read_text())
    scores = read_lines(undisturbed.folder / "scores.jsonl")
    assert result["clients_accuracy"] == pytest.approx(np.mean([score["accuracy"] for score in scores]))
    assert result["clients_accuracy_worst_tenth"] == min(score["accuracy"] for score in scores), "one of four"
    assert {"alone_clients_accuracy", "alone_test_accuracy", "central_test_accuracy"} <= set(result)
    assert (undisturbed.folder / "clients.png").is_file()
    assert not (undisturbed.folder / "adapter").exists(), "without the clients' B it would do nothing"
    loaded = [load_file(undisturbed.folder / f"adapters/client-{k}/adapter_model.safetensors") for k in range(2)]
    for name in loaded[0]:
        assert not np.array_equal(loaded[0][name], loaded[1][name]), name
        if "lora_" in name:  # r = 2 of which one is the layer's own; the other comes from the pool that all share
            axis = 0 if "lora_A" in name else 1
            shared = [np.take(one[name], 0, axis) for one in loaded]
            assert np.array_equal(*shared), name
    assert {name.rpartition(".")[2] for name in undisturbed.checkpoint()} == {"mos_A", "mos_B"}, "nothing private"
    assert (undisturbed.folder / "ranks.png").is_file()
    assert result["effective_rank"] == 2.0


def test_killed_runs_go_on_to_the_same_bits(undisturbed: Finished, tmp_path: Path) -> None:
    """kill -9 of every process in mid-round; then it goes on, baselines included."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run", **LONG})
    config, folder = tmp_path / "config.toml", tmp_path / "runs" / "run"
    # The same texts and model as the undisturbed run's: only the place differs.
    config.write_text(to_toml(flat), encoding="utf-8")
    mark = uuid.uuid4().hex
    process = start(config, "", mark)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("round 3/"):
            break
    kill_everything(process, mark)
    process.stdout.close()
    process.wait()
    assert not (folder / "result.json").exists()
    with start(config, "run.resume=true", uuid.uuid4().hex) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert "resumed after round " in output
    one, two = comparable(undisturbed.folder), comparable(folder)
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] == []


PRIVATE: dict[str, Any] = {
    "rounds": 12,
    "engine.pack": 2,
    "strategy.name": "fedsa-lora",
    "data.partition": "iid",
    "privacy.mode": "dp",
    "privacy.epsilon": 40.0,
    "privacy.noise-multiplier": 0.8,  # what is charged twice must fit, too
    "privacy.delta": 1e-3,
}


def test_five_kills_of_a_private_run(tmp_path: Path) -> None:
    """kill -9 of trainers and of everything, at random moments: no ledger shows less than what was released."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run", **PRIVATE})
    config, folder = tmp_path / "config.toml", tmp_path / "runs" / "run"
    config.write_text(to_toml(flat), encoding="utf-8")
    generator = random.Random(5)
    kills = 0

    def kill_a_trainer(mark: str) -> None:
        nonlocal kills
        time.sleep(generator.uniform(0.0, 0.5))
        for _ in range(50):  # one that was killed just now may not be back yet
            trainers = [found for found in marked(mark) if "".join(found.cmdline()).startswith("ray::Trainer")]
            if trainers:
                trainers[0].send_signal(signal.SIGKILL)
                kills += 1
                return
            time.sleep(0.1)

    mark = uuid.uuid4().hex
    process = start(config, "", mark)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("round 1/", "round 2/", "round 3/")):
            kill_a_trainer(mark)
        if line.startswith("round 4/"):
            time.sleep(generator.uniform(0.0, 0.5))
            break
    kill_everything(process, mark)
    kills += 1
    process.stdout.close()
    process.wait()
    mark, output = uuid.uuid4().hex, ""
    with start(config, "run.resume=true", mark) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if line.startswith("round ") and kills == 4:
                kill_a_trainer(mark)
    assert process.returncode == 0, output
    assert kills == 5
    accepted = [(line["round"], line["client"]) for line in read_lines(folder / "clients.jsonl") if not line["refused"]]
    assert len(accepted) > 20
    record = json.loads((folder / "privacy.json").read_text())
    for client in range(4):
        entries = Ledger(folder / "sites" / f"client-{client}" / "ledger.jsonl", client).entries()
        rounds = [entry.round for entry in entries]
        assert {number for number, one in accepted if one == client} <= set(rounds)
        told = record["clients"][client]
        assert (told["client"], told["rounds"]) == (client, len(set(rounds)))
        assert [Use(**use) for use in told["ledger"]] == list(merged(entry.use for entry in entries))
        assert told["epsilon"] == epsilon([entry.use for entry in entries], target_delta=1e-3) <= 40.0
        assert told["epsilon"] < told["epsilon_rdp"]
        assert told["remaining"] == pytest.approx(told["budget"] - told["epsilon"])
    assert {"unit": "record", "trust": "local", "delta": 1e-3, "accountant": "pld"}.items() <= record.items()
    assert "AES-256-CTR" in record["rng"]
    assert record["released"][0]["guarantee"].startswith("differential privacy")
    lines = read_lines(folder / "metrics.jsonl")
    spent = [line["epsilon"] for line in lines]
    assert spent == sorted(spent)
    assert spent[0] > 0
    assert all(line["train_loss"] is None for line in lines)
    assert all(0 <= line["personal_accuracy"] <= 1 for line in lines), "the researcher's look, not the clients' telling"
    assert all(line["examples"] == 0 and "loss" not in line for line in read_lines(folder / "clients.jsonl"))
    told = f"epsilon {spent[-1]:.4g} at delta 0.001 of a budget of 40"
    for file in ("summary.md", "adapters/client-0/README.md"):
        text = (folder / file).read_text()
        assert told in text, file
        assert "neighbours: add or remove one record" in text
        assert "trained tensors of kind" in text
        assert f"| {told_epsilon(record['clients'][0]['epsilon'])} |" in text
    assert (folder / "epsilon.png").is_file()


def test_what_cannot_be_resumed_is_refused(packed: Finished, tmp_path: Path) -> None:
    """Another configuration, a finished run, no run at all, another version, a run that is being written."""
    from fedlora.runs.folder import RunFolder
    from simulations.setup import resolve

    copy = tmp_path / "run"
    shutil.copytree(packed.folder, copy)
    flat = {**from_toml((copy / "config.toml").read_text()), "run.dir": str(tmp_path), "run.resume": True}
    (copy / "config.toml").write_text(to_toml({**flat, "run.resume": False}))
    for changes, message in (
        ({}, r"is finished; raise rounds to go on with it"),
        ({"seed": 5}, r"another configuration: seed was 0 and is 5"),
        ({"train.batch-size": 2}, r"train.batch-size was 4 and is 2"),
        ({"run.name": "none"}, r"holds no run to continue; start it without run.resume"),
    ):
        with pytest.raises(ValueError, match=message):
            RunFolder.resume(resolve({**flat, **changes}))
    folder = RunFolder.resume(resolve({**flat, "rounds": 9}))
    with pytest.raises(ValueError, match=r"the checkpoint in .* has base = '[0-9a-f]+', and this is 'other'"):
        folder.read_checkpoint({"base": "other"})
    with folder.held(), pytest.raises(ValueError, match="is being written by another process"), folder.held():
        pass
    state = json.loads((copy / "checkpoint" / "state.json").read_text())
    (copy / "checkpoint" / "state.json").write_text(json.dumps({**state, "fedlora": "0.0.1"}))
    with pytest.raises(ValueError, match=r"has fedlora = '0.0.1', and this is"):
        folder.read_checkpoint({})
