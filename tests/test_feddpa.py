"""FedDPA and dual LoRA: who trains and sends what in which round, and planted bugs; FedDPA-T is in the matrix, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.worker import Worker
from fedlora.config import Config, ConfigError
from fedlora.exchange import Instruction
from fedlora.methods import DualLora, LowRank, initial_tensors
from fedlora.methods.factors import Factor
from fedlora.plugins import read_config
from fedlora.reports.card import model_card
from fedlora.roles import Role, Roles
from fedlora.runs.folder import RunFolder
from fedlora.runs.privacy import without_privacy
from fedlora.seeded import Seeded
from fedlora.server import Payloads
from fedlora.server.traffic import Traffic
from fedlora.strategy import Strategy
from fedlora.wire import read_instruction
from simulations.setup import resolve
from strategies import FedDPA, FedDPAOptions
from strategies.build import build_strategy
from strategies.fedprox import FedProx
from tests.support.federation import one_round, server_of
from tests.support.formulas import BYTES, LAYERS
from tests.support.loop import LoopGrid, node_of
from tests.support.matrix import MODELS, method_of, setting
from tests.support.trainers import dp_worker, tiny_worker
from tests.test_audit import findings
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential
from tests.test_matrix_server import test_bytes_are_theory as bytes_are_theory

ROUNDS, OWN_ROUNDS = 5, 2
SHARED, OWN = {"A", "B"}, {"A_own", "B_own"}
LAST = range(ROUNDS - OWN_ROUNDS + 1, ROUNDS + 1)


def feddpa_f(head: Role = Role.SHARED) -> Strategy:
    """FedDPA-F: three rounds of the shared one, two of clients' own."""
    config = Config(rounds=ROUNDS).with_options(FedDPAOptions(OWN_ROUNDS))
    return FedDPA(setting("dual-lora", config=config, head=head))


# -- the method ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [SHARED | {"head"}, OWN], ids=["shared", "own"])
@pytest.mark.parametrize("family", MODELS)
def test_one_of_the_two_trains_while_the_other_is_common_to_the_pack(kinds: set[str], family: str) -> None:
    packed_equals_sequential("dual-lora", frozenset(kinds), family)


def mixed_factors(self: DualLora, tensors: Any) -> dict[str, Factor]:
    """A planted bug, that of many re-implementations: A and B are interpolated apart, and then multiplied."""
    found: dict[str, Factor] = {}
    for layer in self.layers:
        a, b, a_own, b_own = (tensors[f"{layer.name}.dual_{kind}"] for kind in ("A", "B", "A_own", "B_own"))
        mix = self.mix
        found[layer.name] = LowRank((1 - mix) * a + mix * a_own, (1 - mix) * b + mix * b_own, self.scale)
    return found


def test_planted_factors_that_are_mixed_in_place_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DualLora, "factors", mixed_factors)
    with pytest.raises(AssertionError):
        packed_equals_sequential("dual-lora", frozenset(SHARED | OWN | {"head"}), "bert")


@pytest.mark.parametrize("mix", [0.2, 0.5])
def test_both_learn_from_the_first_step(mix: float) -> None:
    """With both B at zero the update is zero, each B has a gradient in its share, and no A has one yet."""
    method = DualLora(LAYERS, rank=3, alpha=6.0, mix=mix)
    start = initial_tensors(method.specs(), Seeded(0))
    assert not np.array_equal(start["m.0.q.dual_A"], start["m.0.q.dual_A_own"])
    tensors = {name: torch.tensor(value).requires_grad_() for name, value in start.items()}
    factor = method.factors(tensors)["m.0.q"]
    assert isinstance(factor, LowRank)
    update = factor.scaled_b() @ factor.A
    assert not update.any()
    update.sum().backward()  # type: ignore[no-untyped-call]
    grads = {kind: tensors[f"m.0.q.dual_{kind}"].grad for kind in ("A", "B", "A_own", "B_own")}
    assert all(not grads[kind].any() for kind in ("A", "A_own"))
    for kind, share in (("", 1 - mix), ("_own", mix)):
        expected = share * 2.0 * start[f"m.0.q.dual_A{kind}"].sum(1)  # of every row of B
        assert np.allclose(grads[f"B{kind}"].numpy(), expected)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"dual-lora.mix": 0.0}, r"dual-lora.mix = 0.0: must be above 0 and below 1: at either end"),
        ({"dual-lora.mix": 1.0}, r"dual-lora.mix = 1.0: must be above 0 and below 1"),
        ({"method.rslora": True}, r"method.rslora = true: is read by lora; dual-lora scales by alpha / rank"),
        ({"feddpa.own-rounds": -1}, r"feddpa.own-rounds = -1: must be at least 0"),
        ({"feddpa.own-rounds": 3}, r"feddpa.own-rounds = 3: must be below rounds = 3, or the shared LoRA is never"),
        ({"method.name": "lora"}, r"method.name = 'lora': strategy 'feddpa' works with dual-lora"),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "feddpa", **flat})


def test_an_own_factor_that_is_fixed_at_zero_is_seen_beside_a_shared_one_that_is_trained() -> None:
    class OnlyOwnA(FedDPA):  # type: ignore[misc]
        def roles(self, kinds: Sequence[str], server_round: int) -> Roles:
            return {**super().roles(kinds, server_round), "B_own": Role.FROZEN}

    with pytest.raises(ValueError, match=r"trains A_own of m\.0\.q\.own in round 1 while B_own"):
        OnlyOwnA(setting("dual-lora"))


# -- the server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [Role.SHARED, Role.PERSONAL, Role.FROZEN])
def test_roles_of_feddpa_f(head: Role) -> None:
    """And after the last round, where clients are measured and exported, they stay as in it."""
    strategy = feddpa_f(head)
    for number in range(1, ROUNDS + 3):
        last = number >= LAST.start
        roles = strategy.all_roles(number)
        assert {roles[kind] for kind in SHARED} == {Role.BROADCAST if last else Role.SHARED}
        assert {roles[kind] for kind in OWN} == {Role.PERSONAL if last else Role.FROZEN}
        assert roles["head"] is (Role.BROADCAST if last and head is Role.SHARED else head)


def test_a_run_that_is_laid_out_over_its_rounds_goes_on_for_no_more(tmp_path: Path) -> None:
    """Refused before anything is written: the folder is as it was, and goes on for the rounds that it began with."""
    flat = {"run.dir": str(tmp_path), "run.name": "f", "strategy.name": "feddpa", "rounds": ROUNDS}
    flat |= {"feddpa.own-rounds": OWN_ROUNDS}
    config, more = (read_config({**flat, "run.resume": resume}) for resume in (False, True))
    laid_out = FedDPA.laid_out(config)
    with RunFolder.opened(config, laid_out) as folder:
        folder.write_json("result.json", {})
    written = {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()}
    refused = replace(more, rounds=9)
    message = r"rounds was 5 and is 9, but feddpa.own-rounds = 2 was laid out for 5 rounds.* with rounds = 5"
    with pytest.raises(ValueError, match=message):
        RunFolder.check(refused, laid_out)
    with pytest.raises(ValueError, match=message), RunFolder.opened(refused, laid_out):
        pass
    assert {path.name: path.read_bytes() for path in folder.path.iterdir() if path.is_file()} == written
    (folder.path / "result.json").unlink()
    with RunFolder.opened(more, laid_out):
        pass  # the same rounds are no reason to refuse it
    strategy = feddpa_f()
    assert FedProx(strategy, 0.1).repeats is strategy.repeats is False
    assert FedDPA(setting("dual-lora")).repeats
    assert FedDPA.laid_out(Config()) == ""


def rounds_of(strategy: Strategy) -> list[Traffic]:
    """Run all rounds of FedDPA-F and check what crosses the wire; return what each took."""
    server, specs = server_of(strategy, "dual-lora"), method_of("dual-lora").specs()
    grid, traffic, state = LoopGrid({1: node_of(server), 2: node_of(server)}), [], server.state.tensors
    assert {specs[name].kind for name in state} == SHARED | {"head"}
    for number in range(1, ROUNDS + 1):
        one_round(server, grid, number)
        assert server.replies is not None
        assert not server.replies.refused
        traffic.append(server.replies.traffic)
        before, state = state, server.state.tensors
        moved = {specs[name].kind for name in state if not np.array_equal(state[name], before[name])}
        assert moved == (set() if number in LAST else SHARED | {"head"})
    for message in grid.sent:
        assert {specs[name].kind for name in read_instruction(message.content).tensors} == SHARED | {"head"}
    return traffic


def test_feddpa_f_sends_the_shared_one_and_ends_with_it_as_it_is() -> None:
    """Bytes are those of FedDPA-T while it is trained; in the last rounds nothing comes back, and all is there."""
    traffic = rounds_of(feddpa_f())
    clients, head = 5, 8 * 15
    numbers, _, _ = BYTES["feddpa", "dual-lora"]
    size = clients * (8 * numbers + head)
    assert [one.bytes_up for one in traffic] == [size, size, size, 0, 0]
    assert [one.bytes_down for one in traffic] == [size] * 5
    assert [one.bytes_down_cached for one in traffic] == [0, size, size, size, 0]
    up, down, cached = Payloads(feddpa_f(), "float64").cycle()
    columns = [[getattr(one, name) for one in traffic] for name in ("bytes_up", "bytes_down", "bytes_down_cached")]
    assert (up, down, cached) == pytest.approx([sum(column) / ROUNDS / clients for column in columns])


def roles_with(changed: dict[str, Role], rounds: Sequence[int]) -> Any:
    """Return the strategy's roles with a planted bug in some rounds."""
    right = FedDPA.roles

    def roles(self: FedDPA, kinds: Sequence[str], server_round: int) -> Roles:
        return {**right(self, kinds, server_round), **(changed if server_round in rounds else {})}

    return roles


@pytest.mark.parametrize("kind", ["A", "B", "head"])
def test_planted_a_shared_tensor_is_trained_in_the_last_rounds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedDPA, "roles", roles_with({kind: Role.SHARED}, LAST))
    with pytest.raises(AssertionError):
        rounds_of(feddpa_f())


@pytest.mark.parametrize("kind", ["A_own", "B_own"])
def test_planted_an_own_tensor_is_sent(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes show it in all rounds; in the last ones alone the server has no start to send."""
    with monkeypatch.context() as patch:
        patch.setattr(FedDPA, "roles", roles_with({kind: Role.SHARED}, range(1, 99)))
        with pytest.raises(AssertionError):
            bytes_are_theory("feddpa", "dual-lora")
    monkeypatch.setattr(FedDPA, "roles", roles_with({kind: Role.SHARED}, LAST))
    with pytest.raises(ValueError, match=f"the initial arrays lack m.0.q.dual_{kind}"):
        rounds_of(feddpa_f())


# -- clients ------------------------------------------------------------------------------------------

F = {"strategy.name": "feddpa", "feddpa.own-rounds": 2, "rounds": 4, "dual-lora.mix": 0.3}


def own_of(worker: Worker, client: int, number: int) -> dict[str, Any]:
    """Return what a client keeps for a round; empty: nothing."""
    return worker.loaded.store.load(client, number) or {}


def test_clients_of_feddpa_f(tmp_path: Path) -> None:
    """Own ones are the seed's until the last rounds, go on from round to round there, and use the shared one."""
    worker = tiny_worker(tmp_path, **F, **{"train.learning-rate": 0.1})
    model = worker.loaded.model
    strategy = build_strategy(model.config, model.specs)
    state = strategy.initial(model.initial)
    seeded = {name: value for name, value in model.initial.items() if model.specs[name].kind in OWN}
    starts = [seeded, seeded]
    for number in range(1, 5):
        told = Instruction(number, (0, 1), strategy.all_roles(number), state.tensors)
        updates = worker.train(told)
        assert [update.report.reason for update in updates] == ["", ""]
        assert all(update.tensors.keys() == strategy.expected(number).keys() for update in updates)
        if number <= 2:
            state = replace(state, tensors=updates[0].tensors)  # as a federation of client 0 alone
            assert own_of(worker, 0, number + 1) == {}
            continue
        kept = [own_of(worker, client, number + 1) for client in (0, 1)]
        for client in (0, 1):
            assert kept[client].keys() == seeded.keys()
            assert all(not np.array_equal(kept[client][name], starts[client][name]) for name in seeded)
        assert any(not np.array_equal(kept[0][name], kept[1][name]) for name in seeded)
        starts = kept
        for tensors, alike in (
            ({name: 1.5 * value for name, value in state.tensors.items()}, False),
            (told.tensors, True),
        ):
            worker.train(replace(told, tensors=tensors))  # the round once more
            again = own_of(worker, 0, number + 1)
            assert alike == all(np.array_equal(again[name], kept[0][name]) for name in seeded), "it uses what is sent"
    asked = Instruction(5, (0, 1), strategy.all_roles(5), state.tensors)
    losses = [report.metrics["loss"] for report in worker.evaluate_personal(asked, "test")]
    assert losses[0] != losses[1]
    alike = replace(asked, round=2, roles=strategy.all_roles(2))
    losses = [report.metrics["loss"] for report in worker.evaluate_personal(alike, "test")]
    assert losses[0] == losses[1], "before the last rounds all have one model"


def test_an_exported_client_has_twice_the_rank_once_its_own_one_is_trained(tmp_path: Path) -> None:
    """PEFT gives what the engine gives (tried at every export); a client that has not trained its own has the rank."""
    worker = tiny_worker(tmp_path, **F)
    strategy = build_strategy(worker.loaded.model.config, worker.loaded.model.specs)
    start = strategy.initial(worker.loaded.model.initial).tensors
    (update,) = worker.train(Instruction(1, (0,), strategy.all_roles(1), start))
    worker.train(Instruction(3, (0,), strategy.all_roles(3), update.tensors))
    exported = worker.export_personal(Instruction(5, (0, 1), strategy.all_roles(5), update.tensors))
    ranks = [json.loads(files["adapter_config.json"])["r"] for files in exported]
    assert ranks == [4, 2]


def test_the_card_of_an_adapter_says_what_became_of_the_head() -> None:
    config, roles = resolve({"strategy.name": "feddpa"}), feddpa_f().all_roles(ROUNDS + 1)
    card = model_card(config, ("bad", "good"), {}, roles, without_privacy(feddpa_f().roles_in_turn()), ROUNDS, (0,))
    assert "The head was trained and averaged with the adapter, and then stayed as it was." in card
    assert "- trained tensors of kind A, B, head: none" in card, "what has left"


@pytest.mark.parametrize("own_rounds", [0, 2])
def test_under_dp_what_clients_keep_is_noised_and_paid_for(own_rounds: int, tmp_path: Path) -> None:
    """In one step from the seed A_own has no gradient, as B_own is zero: what moves it is noise."""
    own = {"feddpa.own-rounds": own_rounds, "train.local-steps": 1, "train.optimizer": "sgd"}
    changes = {**F, **own, "privacy.noise-multiplier": 2.0}
    worker = dp_worker(tmp_path, **changes)
    model = worker.loaded.model
    strategy = build_strategy(model.config, model.specs)
    sent = strategy.initial(model.initial).tensors
    (update,) = worker.train(Instruction(3, (0,), strategy.all_roles(3), sent, ledger_heads=("",)))
    assert update.report.reason == ""
    assert update.report.ledger_head
    kept = own_of(worker, 0, 4)
    assert {model.specs[name].kind for name in kept} == OWN
    assert all((value != model.initial[name]).all() for name, value in kept.items()), "noise on every number"


def test_the_audit_checks_the_roles_of_both_parts(tmp_path: Path) -> None:
    found = findings(tmp_path, **F)
    assert [finding for finding in found if not finding.passed] == []
    assert len(found) == 20
    turns = {finding.name.rpartition("roles of round ")[2] for finding in found if "roles of round" in finding.name}
    assert turns == {"1", "3"}
