"""Runs that are killed go on to the bits of an undisturbed one; trainers that are killed are restarted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.config import from_toml, to_toml
from fedlora.plugins import read_config
from fedlora.runs.folder import read_lines
from simulations.in_process import Resident
from simulations.setup import settle
from tests.e2e.conftest import LONG, PACKED
from tests.support.runs import Family, Finished, comparable, fedlora, fedlora_run, kill_a_trainer, started
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e


def test_personal_strategies_report_clients_and_export_their_adapters(undisturbed: Finished) -> None:
    """MoS with personal shards and heads: personal accuracy by round, baselines beside it, an adapter a client."""
    assert undisturbed.code == 0, undisturbed.output
    assert undisturbed.left == []
    assert all(line["test_accuracy"] is None for line in undisturbed.metrics)
    assert all(0 <= line["personal_accuracy"] <= 1 for line in undisturbed.metrics)
    result = undisturbed.json("result.json")
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
    kinds = {name.rpartition(".")[2] for name in undisturbed.checkpoint()}
    assert kinds == {"mos_A", "mos_B"}, "nothing that clients keep"
    assert (undisturbed.folder / "ranks.png").is_file()
    assert result["effective_rank"] == 2.0


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_bits(undisturbed: Finished, tmp_path: Path) -> None:
    """kill -9 of a trainer, whose pack is repeated; then of every process in mid-round; baselines included."""

    def kill(number: int, family: Family) -> bool:
        if number == 1:
            kill_a_trainer(family)
        return number < 3

    killed = fedlora_run(tmp_path, on_round=kill, **LONG)
    assert killed.left == []
    assert not (killed.folder / "result.json").exists()
    # The same texts and model as the undisturbed run's: only the place differs.
    run = fedlora_run(tmp_path, ["-c", "run.resume=true"], **LONG)
    assert run.code == 0, run.output
    assert "resumed after round " in run.output
    one, two = comparable(undisturbed.folder), comparable(run.folder)
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] == []


@pytest.mark.slow
def test_a_killed_command_is_resumed_at_once(tmp_path: Path) -> None:
    """kill -9 of ``fedlora run`` alone: nothing else to do, and no other command takes the run meanwhile."""
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "run.name": "run", "rounds": 500})
    config = tmp_path / "config.toml"
    config.write_text(to_toml(flat), encoding="utf-8")
    family, again = Family(), Family()
    with started(family, "run", "-c", str(config)) as process:
        assert process.stdout is not None
        assert any(line.startswith("round 2/") for line in process.stdout)
        second = fedlora("run", "-c", config, "-c", "run.resume=true")
        assert second.returncode == 2
        assert f"is being written by process {process.pid}, since" in second.stdout
        family.meet()
        process.kill()
        with started(again, "run", "-c", str(config), "-c", "run.resume=true") as resumed:
            assert resumed.stdout is not None
            output = ""
            for line in resumed.stdout:
                output += line
                if line.startswith("round "):
                    break
            else:
                pytest.fail(output)
            assert family.left(within_s=30) == []
            assert "resumed after round " in output
            resumed.kill()
            assert again.left(within_s=30) == []


@pytest.mark.slow
def test_a_killed_trainer_is_restarted_and_its_pack_repeated(tmp_path: Path) -> None:
    """Two trainers instead of one, one of them killed: the same packs give the same tensors, no client is lost."""
    # Rounds of a second: Flower shows a round's line a second or two after its end.
    longer = {**PACKED, "train.local-steps": 200, "train.learning-rate": 0.002}

    def kill(number: int, family: Family) -> bool:
        if number == 1:
            kill_a_trainer(family)
        return True

    run = fedlora_run(tmp_path, on_round=kill, **longer, **{"engine.trainers": 2})
    assert run.code == 0, run.output
    assert run.left == []
    assert [line["clients_refused"] for line in run.metrics] == [0, 0, 0, 0]
    config, data = settle(read_config(from_toml((run.folder / "config.toml").read_text())), 4)
    federation = Resident(1).federation(config, data, str(tmp_path / "undisturbed"))
    for number in range(1, config.rounds + 1):
        federation.train(number)
    expected, tensors = federation.core.state.arrays(), run.checkpoint()
    assert tensors.keys() == expected.keys()
    # Trainers of one thread beside one of two: their matrix products round differently.
    assert max(float(np.abs(tensors[name] - expected[name]).max()) for name in expected) < 1e-10
    loads = [trainer["base_loads"] for trainer in run.json("trainers.json")]
    assert set(loads) == {1}, "once in each process, the new one included, where the run was not over before"
    (loss,) = read_lines(run.folder / "losses.jsonl")
    assert f"trainer {loss['trainer']} on {loss['host']} was lost in round {loss['round']} (" in run.output
