"""LISA: which blocks a round trains, that all others stay as they were, and what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.errors import RefusedError
from fedlora.config import Config
from fedlora.data import load_federated
from fedlora.engine import train_pack
from fedlora.exchange import Outcome
from fedlora.methods import TensorSpec
from fedlora.plugins import methods_of
from fedlora.reduce import Reduced
from fedlora.state import ServerState
from fedlora.strategy import Strategy
from fedlora.wire import read_instruction
from simulations.audit.site import Audited
from strategies.lisa import Lisa, LisaOptions
from strategies.scaffold import Scaffold
from tests.support.federation import run, saved, seeded_of, server_of, strategy_of
from tests.support.loop import Arrays, LoopGrid, examples_of, node_of, update_of
from tests.support.matrix import alone, engine_of, method_of, random_start, setting, works
from tests.support.plans import plan, shown
from tests.support.trainers import ask, dp_config, dp_worker, instruction, tiny_worker
from tests.test_in_process import settled, under_flower
from tests.test_matrix import TRAIN

BLOCKS = ["m.0", "m.1", "m.2"]  # of the matrix's layers; the last has one layer, the others two


def lisa(blocks: int, seed: int = 0) -> Strategy:
    return strategy_of("lisa", "lora", config=Config(seed=seed).with_options(LisaOptions(blocks)))


def of_blocks(blocks: Any) -> set[str]:
    """Return the names of these blocks' tensors, and the head's."""
    begins = ("head.", *(f"{one}." for one in blocks))
    return {name for name in seeded_of("lora") if name.startswith(begins)}


# -- the draw -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("products", "kind", "block"),
    [
        (["bert.encoder.layer.11.attention.self.query"], "A", "bert.encoder.layer.11"),
        (["transformer.h.3.attn.c_attn"], "B", "transformer.h.3"),
        (["encoder.block.2.layer.0.SelfAttention.q"], "A", "encoder.block.2"),
        (["model.layers.7.mlp.experts.5.up_proj"], "A", "model.layers.7"),
        (["layers.7.q", "layers.7.v"], "A", "layers.7"),
        (["layers.7.q", "layers.8.q"], "A", ""),
        (["layers.7.q", "embedding"], "A", ""),
        (["lm_head"], "A", ""),
        (["nola.384x384"], "A_alpha", ""),
        (["classifier.0.dense"], "head", ""),
        ([], "own", ""),
    ],
)
def test_the_block_of_a_tensor(products: list[str], kind: str, block: str) -> None:
    assert TensorSpec((1,), kind, tuple(products), 0.0).block == block


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_every_block_is_trained_equally_often(blocks: int) -> None:
    """In a cycle of rounds, from whatever round it begins, and in no round twice."""
    strategy = lisa(blocks)
    drawn = [strategy.blocks(number) for number in range(1, 5 * strategy.period)]
    for first in range(len(drawn) - strategy.period):
        cycle = drawn[first : first + strategy.period]
        assert Counter(one for turn in cycle for one in turn) == dict.fromkeys(BLOCKS, blocks * strategy.period // 3)
    assert {len(set(turn)) for turn in drawn} == {blocks}


def test_the_order_comes_from_the_seed() -> None:
    orders = [tuple(lisa(1, seed).blocks(number)[0] for number in (1, 2, 3)) for seed in range(20)]
    assert orders[0] == tuple(lisa(1, 0).blocks(number)[0] for number in (1, 2, 3))
    assert len(set(orders)) == 6, "all orders of three"


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lisa.blocks = 0: must be from 1 to 64"):
        LisaOptions(0)
    with pytest.raises(ValueError, match=r"lisa.blocks = 4: the model has 3 blocks .* this is 'fedavg'"):
        lisa(4)


@pytest.mark.parametrize("method", ["mos", "s2-lora", "nola", "uni-lora"])
def test_methods_whose_tensors_blocks_have_in_common_are_refused(method: str) -> None:
    assert method not in methods_of("lisa")
    with pytest.raises(ValueError, match=r"strategy 'lisa': no tensor of method .* so there is nothing to draw"):
        Lisa(setting(method))


def test_what_belongs_to_no_one_block_is_trained_in_every_round() -> None:
    """An adapted layer outside of blocks, and a tensor that two blocks have in common."""
    common = TensorSpec((2, 2), "A", ("m.0.q", "m.1.q"), 0.5)
    pooler = {
        "pooler.A": TensorSpec((2, 2), "A", ("pooler",), 0.5),
        "pooler.B": TensorSpec((2, 2), "B", ("pooler",), 0),
    }
    strategy = Lisa(replace(lisa(1).setting, specs={**method_of("lora").specs(), **pooler, "common": common}))
    for number in (1, 2, 3):
        (drawn,) = strategy.blocks(number)
        assert strategy.expected(number).keys() == {*of_blocks([drawn]), *pooler, "common"}


# -- the server ---------------------------------------------------------------------------------------


def slow(order: list[str], rounds: int) -> Arrays:
    """Return the server's tensors after some rounds of five clients, one block a round, from the formula."""
    held = {name: value.copy() for name, value in seeded_of("lora").items()}
    total = sum(map(examples_of, range(5)))
    for number in range(1, rounds + 1):
        drawn = of_blocks([order[(number - 1) % 3]])
        specs = {name: spec for name, spec in method_of("lora").specs().items() if name in drawn}
        own = [update_of(client, number, specs) for client in range(5)]
        held |= {n: sum(examples_of(k) / total * one[n] for k, one in enumerate(own)) for n in drawn}
    return held


def served(rounds: int, strategy: Strategy | None = None, spoil: Any = None) -> tuple[Any, LoopGrid, Arrays]:
    """Return a server with one block a round, the grid with what it has sent, and its tensors after some rounds."""
    server = server_of(strategy or lisa(1), "lora")
    grid = LoopGrid({1: node_of(server, spoil), 2: node_of(server)} if spoil is None else one_each(server, spoil))
    return server, grid, run(server, grid, rounds)


def one_each(server: Any, spoil: Any) -> dict[int, Any]:
    return {client + 1: node_of(server, spoil) for client in range(5)}


def off(one: Arrays, other: Arrays) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def test_the_mean_of_the_drawn_blocks_and_all_else_as_it_was() -> None:
    order = [lisa(1).blocks(number)[0] for number in (1, 2, 3)]
    for rounds in (1, 2, 5):
        _, _, after = served(rounds)
        expected = slow(order, rounds)
        assert off(after, expected) < 1e-12
        if rounds < 3:
            waiting = seeded_of("lora").keys() - of_blocks(order[:rounds])
            assert waiting
            assert all(np.array_equal(after[name], seeded_of("lora")[name]) for name in waiting)


def test_planted_zeros_in_place_of_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a server that makes its next state of what came alone."""
    right = Lisa.apply

    def only_what_came(self: Lisa, state: ServerState, reduced: Reduced, server_round: int) -> ServerState:
        empty = {name: np.zeros_like(value) for name, value in state.tensors.items()}
        return right(self, replace(state, tensors=empty), reduced, server_round)

    monkeypatch.setattr(Lisa, "apply", only_what_came)
    assert off(served(2)[2], slow([lisa(1).blocks(number)[0] for number in (1, 2, 3)], 2)) > 0.1


def test_clients_are_told_the_blocks_and_sent_all_that_they_compute_with() -> None:
    """The server's newest values, also of what waits: a client that was away has them at once."""
    server = server_of(lisa(1), "lora")
    grid, before = LoopGrid({1: node_of(server)}), [dict(server.state.tensors)]
    server.start(grid, server.arrays, num_rounds=4, on_round=lambda n, _: before.append(dict(server.state.tensors)))
    train = [read_instruction(m.content) for m in grid.sent if m.metadata.message_type == "train"]
    assert [one.blocks for one in train] == [server.strategy.blocks(number) for number in (1, 2, 3, 4)]
    for number, one in enumerate(train, 1):
        assert one.part((one.clients[0],)).blocks == one.blocks
        assert one.tensors.keys() == seeded_of("lora").keys()
        assert all(np.array_equal(value, before[number][name]) for name, value in one.tensors.items())
    # One that kept what it was sent in round 1 lacks, in round 4, what rounds 1 to 3 have changed: all.
    sent, lacked = server.payloads.down(4, 0)
    assert sent == lacked
    for received in (1, 2):
        since = of_blocks(one for number in range(received + 1, 4) for one in server.strategy.blocks(number))
        assert server.payloads.down(4, received)[1] == 8 * sum(seeded_of("lora")[name].size for name in since)
        assert 0 < server.payloads.down(4, received)[1] < sent


def test_bytes_of_each_round_are_those_of_its_blocks() -> None:
    ups = []
    server = server_of(lisa(1), "lora")
    server.start(
        LoopGrid({1: node_of(server)}),
        server.arrays,
        num_rounds=3,
        on_round=lambda number, _: ups.append(server.replies.traffic.bytes_up) if number and server.replies else None,
    )
    drawn = [of_blocks(server.strategy.blocks(number)) for number in (1, 2, 3)]
    assert ups == [5 * 8 * sum(seeded_of("lora")[name].size for name in names) for names in drawn]
    assert len(set(ups)) == 2, "control: one block has one layer, the others have two"


def test_planted_draw_by_client_is_refused() -> None:
    """A client that trains a block of its own, as if it drew for itself: the others' mean stands."""
    strategy = lisa(1)

    def own(client: int, update: Arrays) -> Arrays:
        return update_of(client, 1, strategy.expected(2)) if client == 3 else update

    server, _, _ = served(1, strategy, own)
    assert list(server.replies.refused) == [3]
    assert server.replies.total.count == 4


@pytest.mark.parametrize("planted", [False, True])
def test_a_resumed_run_goes_on_in_the_same_order(planted: bool) -> None:
    """Planted: the order begins anew where the run goes on, as of a generator whose state no checkpoint holds."""
    first, grid, _ = served(2)
    strategy = lisa(1)
    if planted:
        strategy.blocks = lambda number: Lisa.blocks(strategy, number - 2)  # type: ignore[method-assign, arg-type]
    second = server_of(strategy, "lora", saved(first.state))
    rest = LoopGrid({1: node_of(second)})
    after = run(second, rest, 4, completed=2)
    told = [read_instruction(m.content) for m in (*grid.sent, *rest.sent) if m.metadata.message_type == "train"]
    order = [one.blocks[0] for one in told if 0 in one.clients]
    whole = [lisa(1).blocks(number)[0] for number in (1, 2, 3, 4)]
    assert (order != whole) == planted
    assert (off(after, slow(whole, 4)) > 0.1) == planted


def test_control_variates_are_those_of_the_drawn_blocks() -> None:
    strategy = Scaffold(lisa(1), 5, 2)
    server, grid, _ = served(3, strategy)
    for message in grid.sent:
        told = read_instruction(message.content)
        if message.metadata.message_type == "train":
            assert set(told.extra) == {f"variate/{name}" for name in of_blocks(told.blocks)}
    assert server.state.extra.keys() == {f"variate/{name}" for name in seeded_of("lora")}


# -- clients ------------------------------------------------------------------------------------------

KEYS = {"strategy.name": "lisa", "lisa.blocks": 1}


def test_a_pack_in_which_whole_blocks_are_fixed_equals_the_slow_reference() -> None:
    """In float64: clients of one pack against one client, one row at a time, from the formula."""
    engine = engine_of("lora", "llama-lm")
    start = random_start(engine)
    block = next(spec.block for spec in engine.method.specs().values() if spec.block)
    trained = {name: value for name, value in start.items() if name.startswith(f"{block}.")}
    common = {name: value for name, value in start.items() if name not in trained}
    assert common
    pack = works(trained, "llama-lm")
    for result, work in zip(train_pack(engine, pack, common, TRAIN), pack, strict=True):
        assert off(dict(result.tensors), alone("lora", "llama-lm", engine, work, common, TRAIN)) < 1e-10


@pytest.mark.parametrize("dp", [False, True])
def test_clients_train_and_send_the_drawn_block_and_the_head(tmp_path: Path, dp: bool) -> None:
    """Under DP clip and noise are for these alone: what waits does not leave, and no noise is drawn for it."""
    worker = (dp_worker if dp else tiny_worker)(tmp_path, **KEYS)
    initial = worker.loaded.model.initial
    for number in (1, 2):
        (block,) = instruction(worker, number=number).blocks
        expected = {name for name in initial if name.startswith((f"{block}.", "classifier."))}
        for update in ask(worker, (2,), number):
            assert update.report.outcome is Outcome.OK
            assert update.tensors.keys() == expected
            assert all(np.abs(v - initial[n]).max() > 0 for n, v in update.tensors.items() if not n.endswith("lora_A"))


def test_an_audit_looks_at_each_turn(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **KEYS, **{"rounds": 9})
    assert Audited(config, load_federated(config, 4), tmp_path, train_pack).turns() == [1, 2]


def test_what_a_site_refuses(tmp_path: Path) -> None:
    """Blocks that the model does not have; by its limit on bytes a round of both blocks, and not one of one."""
    worker = tiny_worker(tmp_path, **KEYS)
    told, model = instruction(worker, clients=(0,)), worker.loaded.model
    (update,) = worker.train(replace(told, blocks=("bert.encoder.layer.7",)))
    assert update.report.outcome is Outcome.FAILED
    assert "names blocks that the model does not have: 'bert.encoder.layer.7'" in update.report.reason
    leaving = sum(value.nbytes for value in worker.train(told)[0].tensors.values())
    limits = replace(worker.loaded.job.limits, max_bytes=leaving)
    limits.check_instruction(told, model.specs, model.config)
    with pytest.raises(RefusedError, match=r"bytes of the tensors that leave, by max-bytes"):
        limits.check_instruction(replace(told, blocks=()), model.specs, model.config)


def test_all_blocks_in_every_round_are_fedavg_to_the_bit(tmp_path: Path) -> None:
    states = []
    for name, own in (("lisa", {"lisa.blocks": 2}), ("fedavg", {})):
        config, data = settled(tmp_path / name, **{"strategy.name": name, **own})
        states.append(under_flower(config, data, tmp_path / name).state.tensors)
    assert states[0].keys() == states[1].keys()
    assert all(np.array_equal(states[0][name], value) for name, value in states[1].items())


def test_it_learns(tmp_path: Path) -> None:
    """The loss on training rows falls well below that of a coin."""
    keys = {**KEYS, "rounds": 8, "train.local-steps": 20, "train.batch-size": 8, "train.learning-rate": 0.03}
    config, data = settled(tmp_path, **keys)
    server, worker = under_flower(config, data, tmp_path), tiny_worker(tmp_path, **keys)
    rows = np.concatenate(data.clients).tolist()
    before, after = (
        float(worker.evaluate(one, "train", rows)["loss"].mean())
        for one in (worker.loaded.model.initial, server.state.tensors)
    )
    assert 0.6 < before < 0.8
    assert after < 0.5


# -- the plan -----------------------------------------------------------------------------------------


def test_a_plan_says_which_blocks_train_and_what_each_round_sends(tmp_path: Path) -> None:
    one = plan(tmp_path, **KEYS, **{"rounds": 3})
    assert "blocks: 1 of 2 are trained in a round, each in 1 to 2 of the 3 rounds" in shown(one)
    whole = plan(tmp_path, **{"strategy.name": "fedavg"})
    lora, head = (
        sum(8 * np.prod(s.shape) for s in whole.specs.values() if (s.kind == "head") == is_head)
        for is_head in (False, True)
    )
    assert one.traffic[0] == [4 * (lora // 2 + head)] * 3
    assert one.traffic[1] == [4 * (lora + head)] * 3
    assert "blocks:" not in shown(whole)
    short = plan(tmp_path, **KEYS, **{"rounds": 1})
    (waits,) = {"bert.encoder.layer.0", "bert.encoder.layer.1"} - set(short.strategy.blocks(1))
    assert f"note: with so few rounds 1 blocks are never trained: {waits}" in shown(short)
