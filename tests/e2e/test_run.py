"""A whole run through real Flower processes, as a user starts it: what it prints, writes, exports and leaves behind."""

from __future__ import annotations

import os
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from fedlora.config import ConfigError, from_toml, to_toml
from fedlora.data import load_federated
from fedlora.plugins import read_config
from fedlora.reports.frames import rounds_frame
from fedlora.runs.folder import read_lines
from simulations import api
from tests.support.runs import Family, Finished, fedlora, fedlora_run, started
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e


def test_a_run_completes_and_leaves_nothing_running(packed: Finished) -> None:
    assert packed.code == 0, packed.output
    assert packed.left == []
    assert all(f"round {n}/4" in packed.output for n in range(1, 5))
    assert f"run folder: {packed.folder}" in packed.output
    assert "next: fedlora report" in packed.output


def test_python_reads_a_run_that_has_finished_and_refuses_it_for_another(packed: Finished) -> None:
    name, folder = packed.folder.name, packed.folder.parent
    whole = from_toml((packed.folder / "config.toml").read_text())
    settings = {key: value for key, value in whole.items() if not key.startswith("run.")}
    done = api.run(name, settings, folder=folder)
    assert done.result is not None
    assert list(rounds_frame([done])["test_accuracy"]) == [line["test_accuracy"] for line in packed.metrics]
    assert list(api.report([done])["run"]) == [name]
    without = {key: value for key, value in settings.items() if key != "strategy.name"}  # another one by default
    for key, other in (("rounds", {**settings, "rounds": 5}), ("seed", {**settings, "seed": 7}), ("strategy", without)):
        with pytest.raises(ConfigError, match=rf"a finished run with another {key}.*give this one another name"):
            api.run(name, other, folder=folder)
    (folder / "begun").mkdir()
    (folder / "begun" / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="again=True"):
        api.run("begun", settings, folder=folder)


def test_the_run_folder_is_complete(packed: Finished) -> None:
    names = {path.relative_to(packed.folder).as_posix() for path in packed.folder.rglob("*") if path.is_file()}
    assert names >= {
        *("config.toml", "environment.json", "partition.json", "plan.json", "privacy.json", "trainers.json"),
        *("metrics.jsonl", "clients.jsonl", "result.json", "summary.md", "partition.png", "accuracy.png"),
        *("checkpoint/state.json", "checkpoint/round-4.safetensors"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        *("adapter/README.md", "adapter/tokenizer.json"),
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
    packs = read_lines(packed.folder / "packs.jsonl")
    assert [(line["round"], line["clients"]) for line in packs] == [(r, 2) for r in range(1, 5) for _ in range(2)]
    for r, line in enumerate(packed.metrics, 1):
        assert 0 < sum(pack["seconds"] for pack in packs if pack["round"] == r) < line["seconds"], "one trainer"
    summary = (packed.folder / "summary.md").read_text()
    assert "accuracy.png" in summary
    assert "partition.png" in summary
    assert packed.json("environment.json")["libraries"]["flwr"]


def test_every_column_of_a_run_is_declared(packed: Finished, undisturbed: Finished) -> None:
    """A column that is not would be called outside the guarantee for want of a better answer."""
    from fedlora.metrics import Metric

    by_the_clock = {"seconds"}
    for run in (packed, undisturbed):
        for key in {*run.metrics[0], *run.json("result.json")} - by_the_clock:
            assert Metric.parse(key).key == key


def test_the_base_model_is_loaded_once(packed: Finished) -> None:
    assert [trainer["base_loads"] for trainer in packed.json("trainers.json")] == [1]


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
    assert packed.json("result.json")["test_accuracy"] == final
    assert loss / len(corpus.test) == pytest.approx(packed.metrics[-1]["test_loss"], abs=1e-10)
    assert packed.metrics[-1]["train_loss"] < packed.metrics[0]["train_loss"] - 0.01, (
        "control: the run learned something"
    )


def test_report_of_a_run(packed: Finished) -> None:
    (packed.folder / "summary.md").unlink()
    done = fedlora("report", packed.folder)
    assert done.returncode == 0, done.stderr
    assert "test accuracy" in done.stdout
    assert (packed.folder / "summary.md").is_file()


def test_plan_says_what_a_run_will_send(packed: Finished) -> None:
    """The plan's bytes are those that the run measured."""
    done = fedlora("plan", "-c", packed.folder / "config.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    line = packed.metrics[0]
    assert line["bytes_up"] == line["bytes_down"] == 4 * 8 * (2 * 2 * 2 * 2 * 16 + 2 * 16 + 2)
    assert f"{line['bytes_up'] // 4 / 1000:.2f} kB up" in done.stdout
    assert "server mean of updates: not exact" in done.stdout


def test_a_run_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client diverges: the run stops with their names, and the exit code is not 0.

    Also where programs are told to print colours, as Jupyter tells them: what Flower answers is read all the same.
    """
    monkeypatch.setenv("FORCE_COLOR", "1")
    run = fedlora_run(tmp_path, **{"train.optimizer": "sgd", "train.learning-rate": 1e300})
    output = re.sub(r"\x1b\[[0-9;]*m", "", run.output)
    assert run.code == 1
    assert run.left == []
    assert "fedlora: the run failed (finished:failed)" in output
    assert "4 of 4 clients failed" in output
    assert "is not finite after 3 steps; lower train.learning-rate" in output


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing_running(tmp_path: Path) -> None:
    """Ctrl-C in the first round: everything that Flower and Ray started is ended, the agents of Ray included."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path), "run.name": "run", "rounds": 1000})
    config = tmp_path / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    family = Family()
    ctrl_c = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with started(family, "run", "-c", str(config), before=ctrl_c) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round 1/"):
                assert len(family.meet()) >= 5
                os.killpg(process.pid, signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130
    *rounds, last = rest.splitlines()
    assert last == "fedlora: interrupted; nothing was left running"
    assert all(line.startswith("round ") for line in rounds), "nor a word of Flower's"
    assert family.left() == []
