"""``fedlora push``: real huggingface_hub in a process of its own, against a stand-in hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from simulations.push import SIGNED, is_hub_name, public_files
from tests.support.exported import Exported, exported_run
from tests.support.hub import READ_ONLY, TOKEN, Hub, hub
from tests.support.runs import ROOT, environment
from tests.support.trainers import tiny_flat


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with hub() as held:
        yield held


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A finished run, in whose adapter's folder somebody left files of their own."""
    folder = tmp_path_factory.mktemp("run")
    made = exported_run(folder, tiny_flat(folder))
    adapter = made.path / "adapter"
    (adapter / "rows.csv").write_text("a private row")
    (adapter / "checkpoint-3").mkdir()
    (adapter / "checkpoint-3" / "optimizer.pt").write_text("private")
    (adapter / "vocab.txt").symlink_to(made.path / "sites" / "client-0" / "ledger.jsonl")
    return made


def pushed(served: Hub, *arguments: str | Path, token: str = TOKEN, **more: str) -> tuple[int, str]:
    """Return exit code and output of ``fedlora push``."""
    own = {"HF_ENDPOINT": served.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent", "HF_TOKEN": token}
    done = subprocess.run(
        [sys.executable, "-m", "simulations.cli", "push", *map(str, arguments)],
        cwd=ROOT,
        env={**{key: value for key, value in environment().items() if not key.startswith("HF_")}, **own, **more},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_adapter_is_pushed_and_nothing_else(served: Hub, run: Exported) -> None:
    code, output = pushed(served, run.path, "me/adapter", "--private")
    assert code == 0, output
    assert f"{served.address}/me/adapter" in output
    files = served.files["me/adapter"]
    assert set(files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "ranks.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert served.private["me/adapter"]
    assert "not uploaded: checkpoint-3, rows.csv, vocab.txt" in output
    assert not any(b"private" in content or str(run.path.parent).encode() in content for content in files.values())
    assert files["adapter_model.safetensors"] == (run.path / "adapter" / "adapter_model.safetensors").read_bytes()
    settings = json.loads(files["adapter_config.json"])
    before = json.loads((run.path / "adapter" / "adapter_config.json").read_text())
    assert settings == {**before, "base_model_name_or_path": "model"}
    assert Path(before["base_model_name_or_path"]).is_absolute(), "control: PEFT wrote this machine's path"
    header = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert header == {"library_name": "peft", "tags": ["lora", "federated-learning", "fedlora"]}


def test_again_into_the_same_repository(served: Hub, run: Exported) -> None:
    for _ in range(2):
        code, output = pushed(served, run.path, "me/twice")
        assert code == 0, output
    assert served.private["me/twice"] is False
    code, output = pushed(served, run.path, "me/twice", "--private")
    assert code == 2
    assert "me/twice is there already, and public; choose another name" in output


def test_a_clients_own_adapter_only_when_it_is_asked_for(served: Hub, tmp_path: Path) -> None:
    own = exported_run(tmp_path, tiny_flat(tmp_path, **{"strategy.name": "local"}), clients=2)
    code, output = pushed(served, own.path, "me/own")
    assert code == 2
    assert "choose one with --client, of 0, 1" in output
    assert "me/own" not in served.private
    code, output = pushed(served, own.path, "me/own", "--client", "1")
    assert code == 0, output
    assert "client 1's own adapter, with the tensors that it never sent" in output
    weights = (own.path / "adapters" / "client-1" / "adapter_model.safetensors").read_bytes()
    assert served.files["me/own"]["adapter_model.safetensors"] == weights


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/none", "", "no token for the Hugging Face hub: log in with `hf auth login`, or set HF_TOKEN."),
        ("me/none", "hf_wrong", "the token is not valid"),
        ("me/none", READ_ONLY, "the token may not write to 'me/none'"),
        ("none", TOKEN, "'none' cannot be a repository of the hub: it is not owner/name"),
        ("a/b/none", TOKEN, "'a/b/none' cannot be a repository of the hub: it is not owner/name"),
        ("me/no ne", TOKEN, "'me/no ne' cannot be a repository of the hub"),
        ("me/none..x", TOKEN, "'me/none..x' cannot be a repository of the hub"),
    ],
)
def test_what_is_refused_is_one_line(served: Hub, run: Exported, name: str, token: str, message: str) -> None:
    code, output = pushed(served, run.path, name, token=token)
    assert (code, output.count("\n")) == (2, 1), output
    assert message in output
    assert "none" not in str(served.private)


def test_no_network_is_one_line(served: Hub, run: Exported) -> None:
    for more in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        code, output = pushed(served, run.path, "me/none", **more)
        assert (code, output.count("\n")) == (2, 1), output
        assert "cannot be reached" in output


def test_an_unfinished_run_is_refused(served: Hub, tmp_path: Path) -> None:
    unfinished = exported_run(tmp_path, tiny_flat(tmp_path))
    (unfinished.path / "result.json").unlink()
    code, output = pushed(served, unfinished.path, "me/none")
    assert (code, output.count("\n")) == (2, 1), output
    assert "the run did not finish" in output


def test_a_base_of_the_hub_keeps_its_name_and_its_signature(run: Exported, tmp_path: Path) -> None:
    """What was signed is uploaded as it was; the signature of what had to be changed would be wrong."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((run.path / "adapter" / name).read_bytes())
    for name in SIGNED:
        (folder / name).write_text("signed")
    assert not set(SIGNED) & set(public_files(folder, run.config.model.name))
    base = "meta-llama/Llama-3.2-1B"
    for name in ("README.md", "adapter_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(run.config.model.name, base))
    files = public_files(folder, base)
    assert set(SIGNED) < set(files)
    assert yaml.safe_load(files["README.md"].decode().split("---\n")[1])["base_model"] == base
    assert all(files[name] == (folder / name).read_bytes() for name in files)
    assert is_hub_name("gpt2")
    assert not any(map(is_hub_name, ("minilm", "small-llama", "/models/x", "a/b/c", str(tmp_path), os.curdir)))
