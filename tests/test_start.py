"""What clients start a round with: by role, by round and at their own rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.start import VARIATE, StartTensors, variates
from fedlora.engine import train_pack
from fedlora.exchange import Instruction, Outcome
from fedlora.local_terms import LocalTerms
from fedlora.methods import initial_tensors
from fedlora.roles import Role
from fedlora.seeded import Seeded
from tests.support.trainers import dp_worker, instruction, tiny_worker

UPLOAD = {"A": Role.UPLOAD, "B": Role.UPLOAD, "head": Role.SHARED}
SHARED = {"A": Role.SHARED, "B": Role.SHARED, "head": Role.SHARED}
PERSONAL = {"A": Role.SHARED, "B": Role.PERSONAL, "head": Role.SHARED}


def start_of(folder: Path, **changes: Any) -> StartTensors:
    return tiny_worker(folder, **{"strategy.name": "fedavg", **changes}).loaded.trainer.start


def test_uploaded_tensors_start_anew_in_each_round_and_are_never_sent(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg"})
    start = worker.loaded.trainer.start
    heads = {name: value for name, value in start.model.initial.items() if "classifier" in name}
    updates = {number: worker.train(Instruction(number, (0, 1), UPLOAD, heads)) for number in (1, 2)}
    for number, both in updates.items():
        instruction = Instruction(number, (0, 1), UPLOAD, heads)
        common = start.common(instruction)
        drawn = initial_tensors(start.model.specs, Seeded(0), "float64", number)
        for name, spec in start.model.specs.items():
            if spec.kind != "head":
                assert np.array_equal(common[name], drawn[name])
                assert spec.kind == "B" or not np.array_equal(common[name], start.model.initial[name])
        assert np.array_equal(start.of(instruction, 0, common)["classifier.bias"], heads["classifier.bias"])
        assert all(update.report.outcome is Outcome.OK for update in both)
        assert all(update.tensors.keys() == start.model.specs.keys() for update in both)
    again = worker.train(Instruction(1, (0, 1), UPLOAD, heads))
    assert all(np.array_equal(again[0].tensors[name], updates[1][0].tensors[name]) for name in again[0].tensors)


def test_tensors_of_no_spec_are_common_to_all(tmp_path: Path) -> None:
    """FLoRA's residual grows by round, and is not the method's: it reaches the engine as it came."""
    residual = {"layer.residual_A": np.ones((5, 16)), "layer.residual_B": np.ones((16, 5))}
    seen: list[Any] = []

    def observed(engine: Any, works: Any, common: Any, *rest: Any, **local: Any) -> Any:
        seen.append(common)
        return train_pack(engine, works, common, *rest, **local)

    worker = dp_worker(tmp_path, observed, **{"strategy.name": "fedavg"})
    update = worker.train(Instruction(1, (0,), UPLOAD, residual, ledger_heads=("",)))[0]
    assert update.report.outcome is Outcome.OK
    assert not update.tensors.keys() & residual.keys()
    assert len(seen) == 2, "on rows of nobody, too"
    assert all(common[name] is value for common in seen for name, value in residual.items())


@pytest.mark.parametrize("roles", [SHARED, UPLOAD, PERSONAL])
def test_a_client_of_a_smaller_rank_holds_and_sends_so_many(roles: dict[str, Role], tmp_path: Path) -> None:
    start = start_of(tmp_path, **{"method.rank": 4})
    specs = start.model.specs
    sent = {name: np.full(spec.shape, 0.5) for name, spec in specs.items()}
    instruction = Instruction(1, (0, 2), roles, sent, ranks=(1, 3))
    common = start.common(instruction)
    for client, rank in ((0, 1), (2, 3)):
        for name, value in start.of(instruction, client, common).items():
            axis = specs[name].rank_axis
            shape = [rank if at == axis else n for at, n in enumerate(specs[name].shape)]
            assert list(value.shape) == shape
            if roles is UPLOAD and axis == 0:
                assert np.array_equal(value, common[name][:rank]), "drawn whole, so that ranks agree on what they share"
    part = instruction.part((2,))
    assert start.of(part, 2, common).keys() == start.of(instruction, 2, common).keys()
    assert part.rank(2) == 3


def test_a_smaller_rank_trains_and_keeps_its_own(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.rank": 4})
    model = worker.loaded.model
    sent = dict(model.initial)
    update = worker.train(Instruction(1, (1,), PERSONAL, sent, ranks=(2,)))[0]
    assert update.report.outcome is Outcome.OK
    assert {value.shape[0] for name, value in update.tensors.items() if name.endswith("lora_A")} == {2}
    kept = worker.loaded.store.load(1, 2)
    assert kept is not None
    assert {value.shape[1] for value in kept.values()} == {2}
    later = Instruction(2, (1, 3), PERSONAL, sent, ranks=(2, 4))
    own = worker.loaded.trainer.start.personal_of(later, 1, worker.loaded.trainer.start.common(later))
    assert all(np.array_equal(own[name], value) for name, value in kept.items())
    assert {value.shape[0] for name, value in own.items() if name.endswith("lora_A")} == {2}, "what is shared, too"
    ours, new = worker.evaluate_personal(later, "test")
    assert ours.metrics["loss"] != new.metrics["loss"]
    assert worker.export_personal(later.part((1,)))[0]["adapter_model.safetensors"]


def test_control_variates_are_kept_with_personal_tensors(tmp_path: Path) -> None:
    """They are of one round, and go back with it; without SCAFFOLD nobody reads them."""
    start = start_of(tmp_path)
    store = start.store
    for number in (1, 2):
        store.save(0, number, {"b": np.full(2, number), f"{VARIATE}a": np.full(2, -number)})
    scaffold = LocalTerms(scaffold=2)
    kept = start.kept(Instruction(3, (0,), SHARED, {}, local=scaffold), 0)
    assert variates(kept)["a"].tolist() == [-2, -2]
    assert start.kept(Instruction(3, (0,), SHARED, {}), 0) == {}
    kept = start.kept(Instruction(2, (0,), SHARED, {}, local=scaffold), 0)
    assert variates(kept)["a"].tolist() == [-1, -1]


def test_scaffold_under_dp_takes_no_gradient_of_all_rows(tmp_path: Path) -> None:
    """Option 1 asks for one without noise: a site refuses, whatever the server claims, before anything is paid."""
    worker = dp_worker(tmp_path)
    (update,) = worker.train(replace(instruction(worker, (0,)), local=LocalTerms(scaffold=1)))
    assert "takes no gradient of all its rows" in update.report.reason
    assert not (tmp_path / "sites").exists()


def test_control_variates_go_up_as_changes_and_stay_as_they_are(tmp_path: Path) -> None:
    """Option 2 by hand: c_k+ = c_k - c + (x - y) / (sum of the learning rates); what is sent is c_k+ - c_k."""
    keys = {"train.optimizer": "sgd", "train.learning-rate": 0.1, "train.schedule": "constant"}
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", **keys})
    sent = dict(worker.loaded.model.initial)
    c = {f"{VARIATE}{name}": np.full_like(value, 0.01) for name, value in sent.items()}
    own = {name: np.zeros_like(value) for name, value in sent.items()}
    for number in (1, 2):
        instruction = Instruction(number, (0, 1), SHARED, sent, local=LocalTerms(scaffold=2), extra=c)
        update = worker.train(instruction)[0]
        assert update.report.outcome is Outcome.OK
        kept = variates(worker.loaded.store.load(0, number + 1) or {})
        for name, value in sent.items():
            moved = (value - update.tensors[name]) / (0.1 * update.report.steps)
            new = own[name] - c[VARIATE + name] + moved
            np.testing.assert_allclose(kept[name], new, atol=1e-12)
            np.testing.assert_allclose(update.extra[VARIATE + name], new - own[name], atol=1e-12)
        own = kept


def test_control_variates_of_alternating_roles_are_all_kept(tmp_path: Path) -> None:
    """RoLoRA shares B, A, B: what a client kept of B is there in round three, and of A as round two left it."""
    sgd = {"train.optimizer": "sgd", "local.term": "scaffold", "strategy.name": "rolora"}
    worker = tiny_worker(tmp_path, **sgd)
    start, after = worker.loaded.trainer.start, {}
    for number in (1, 2, 3):
        turn = "B" if number % 2 else "A"
        roles = {kind: Role.SHARED if kind in (turn, "head") else Role.BROADCAST for kind in ("A", "B", "head")}
        names = [name for name, spec in start.model.specs.items() if roles[spec.kind] is Role.SHARED]
        extra = {VARIATE + name: np.zeros_like(start.model.initial[name]) for name in names}
        moved = {name: value + 0.1 for name, value in start.model.initial.items()}
        local = LocalTerms(scaffold=2)
        instruction = Instruction(number, (0,), roles, moved, extra=extra, local=local, weights="equal")
        before = start.own_variate(instruction, 0)
        for name in names:
            assert np.array_equal(before[name], after.get(name, np.zeros_like(before[name])))
        update = worker.train(instruction)[0]
        assert update.report.outcome is Outcome.OK, update.report.reason
        after |= {name: before[name] + update.extra[VARIATE + name] for name in names}
    assert any(np.any(after[name]) for name in after if "lora_B" in name)


def test_a_clients_own_model_is_at_its_own_rank_whoever_shares_its_node(tmp_path: Path) -> None:
    """A personal head over A and B of rank one: what a node was sent for a wider client is not this client's."""
    worker = tiny_worker(tmp_path, **{"strategy.name": "zero-padding"})
    roles = {"A": Role.SHARED, "B": Role.SHARED, "head": Role.PERSONAL}
    tensors = {name: value + 0.1 for name, value in worker.loaded.model.initial.items() if "lora" in name}
    together = worker.evaluate_personal(Instruction(1, (0, 1), roles, tensors, ranks=(1, 2)), "test")
    narrow = {name: value[:1] if "lora_A" in name else value[:, :1] for name, value in tensors.items()}
    alone = worker.evaluate_personal(Instruction(1, (0,), roles, narrow, ranks=(1,)), "test")
    assert together[0].metrics["loss"] == pytest.approx(alone[0].metrics["loss"], abs=1e-10)
    wide = worker.evaluate_personal(Instruction(1, (0,), roles, tensors, ranks=(2,)), "test")
    assert abs(wide[0].metrics["loss"] - alone[0].metrics["loss"]) > 1e-4
