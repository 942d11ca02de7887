"""FlyLoRA: tokens that choose their ranks, an A that nobody sends, means that are exact, planted bugs.

The rest is in the matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlora.config import ConfigError
from fedlora.engine import fast
from fedlora.engine.layers import Layout, for_kernel
from fedlora.exchange import Outcome
from fedlora.methods import FlyLora, TopRanks, as_low_rank, build_method, count_parameters, tensors_digest
from fedlora.methods.base import Layer
from fedlora.runs.export import adapter_files
from fedlora.seeded import Seeded
from simulations.setup import resolve
from strategies import FedAvg, Local
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, engine_of, random_start, setting
from tests.support.plans import plan, shown
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_gradients_of_each_row as gradients_of_each_row
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential

TRAINED = frozenset({"B", "head"})


def fly(layers: list[Layer] = LAYERS, rank: int = 4, active: int = 2, seed: int = 0) -> FlyLora:
    return FlyLora(layers, rank=rank, alpha=6.0, active=active, seeded=Seeded(seed))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng((seed, *shape)).standard_normal(shape))


def ranks(active: int, groups: int = 2) -> TopRanks:
    """Return an update of rank 4 from 6 to 5 features in float64: B by group, A common to them."""
    return TopRanks(drawn(4, 6), drawn(groups, 5, 4), 2.0, active)


TOKENS = drawn(2, 30, 6)


# -- the update ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("active", [1, 3])
def test_a_token_uses_the_ranks_of_its_largest_numbers_whatever_the_others_use(active: int) -> None:
    one = ranks(active)
    y = one.of(TOKENS)
    for group, place in ((0, 0), (1, 7), (1, 29)):
        low = [float(row @ TOKENS[group, place]) for row in one.A]
        largest = sorted(range(4), key=lambda rank: -abs(low[rank]))[:active]
        expected = sum(2.0 * low[rank] * one.B[group, :, rank] for rank in largest)
        assert torch.allclose(y[group, place], torch.as_tensor(expected), atol=1e-13)
    other = TOKENS.clone()
    other[:, 1:] *= -3.0
    assert torch.allclose(one.of(other)[:, 0], y[:, 0], atol=1e-13)


def test_all_ranks_are_lora_with_a_fixed_a() -> None:
    one = ranks(4)
    assert torch.allclose(one.of(TOKENS), TOKENS @ one.A.mT @ (2.0 * one.B).mT, atol=1e-13)
    assert not torch.allclose(ranks(3).of(TOKENS), one.of(TOKENS), atol=0.1)


def test_gradcheck_of_inputs_and_b() -> None:
    """By finite differences: no number is so near another that a step would exchange them."""
    one, x = ranks(2), TOKENS[:, :4].clone()
    sizes = (x @ one.A.mT).abs().sort(-1).values
    assert float((sizes[..., 2] - sizes[..., 1]).min()) > 1e-3
    assert torch.autograd.gradcheck(
        lambda x, b: one._replace(B=b).of(x), [x.requires_grad_(), one.B.clone().requires_grad_()]
    )


@pytest.mark.parametrize("larger", [0, 1])
def test_numbers_of_sixteen_bits_are_told_apart(larger: int) -> None:
    """Of two that are one number in bfloat16 the larger one counts, and its rank's outputs are of 16 bits again."""
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    a[larger, 1] = 2.0**-12
    assert len(set((x @ a.bfloat16().mT).flatten().tolist())) == 1, "control"
    y = TopRanks(a, torch.eye(2), 1.0, 1).of(x)
    assert y.dtype == torch.bfloat16
    assert y.flatten().tolist() == [float(larger == 0), float(larger == 1)]


def test_a_mean_of_b_is_the_mean_of_the_updates_of_every_token() -> None:
    """Planted: clients that drew an A each."""
    clients = [ranks(2)._replace(B=drawn(1, 5, 4, seed=seed)) for seed in range(3)]
    mean = clients[0]._replace(B=torch.stack([one.B for one in clients]).mean(0))
    expected = torch.stack([one.of(TOKENS) for one in clients]).mean(0)
    assert torch.allclose(mean.of(TOKENS), expected, atol=1e-13)
    apart = [one._replace(A=drawn(4, 6, seed=seed)) for seed, one in enumerate(clients)]
    expected = torch.stack([one.of(TOKENS) for one in apart]).mean(0)
    assert not torch.allclose(apart[0]._replace(B=mean.B).of(TOKENS), expected, atol=0.1)


def test_strategies_say_so() -> None:
    assert FedAvg(setting("flylora")).exact
    assert Local(setting("flylora")).exact is None


# -- A ------------------------------------------------------------------------------------------------


def test_a_is_sparse_and_of_the_size_that_the_authors_have() -> None:
    """8 of 32 ranks: a quarter of each row, with a standard deviation of 1/32; other places and numbers by layer."""
    wide = [Layer(f"l.{n}", 1000, 8, False, False) for n in range(2)]
    one, two = fly(wide, rank=32, active=8).constants().values()
    for a in (one, two):
        assert (np.count_nonzero(a, axis=1) == 250).all()
        assert a[a != 0].std() == pytest.approx(1 / 32, rel=0.02)
        assert torch.equal(torch.from_numpy(a).bfloat16().float(), torch.from_numpy(a))
        assert np.count_nonzero(a, axis=0).min() > 0, "no feature is left out by all ranks"
        assert len({tuple(np.flatnonzero(row)) for row in a}) == 32
    assert not np.array_equal(one != 0, two != 0)
    (least,) = fly([Layer("l", 3, 8, False, False)], rank=8, active=1).constants().values()
    assert (np.count_nonzero(least, axis=1) == 1).all(), "no row of A is empty"


def test_a_is_of_the_run_and_of_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines compare it; plans do not draw it, and a device has it once for all clients."""
    one, same, other = (tensors_digest(fly(seed=seed).constants()) for seed in (0, 0, 1))
    assert one == same != other
    count, whole = [0], Seeded.uniform

    def noted(self: Seeded, *key: Any, **named: Any) -> Any:
        count[0] += 1
        return whole(self, *key, **named)

    monkeypatch.setattr(Seeded, "uniform", noted)
    method = fly()
    assert count_parameters(method.specs()) == 4 * (3 * 10 + 2 * 4)
    assert {spec.kind for spec in method.specs().values()} == {"B"}
    assert count == [0]
    for groups in (1, 7):
        tensors = {n: torch.zeros(groups, *s.shape, dtype=torch.float64) for n, s in method.specs().items()}
        factors = list(method.factors(tensors).values())
        assert all(isinstance(one, TopRanks) and one.A.shape == (4, one.A.shape[-1]) for one in factors)
    assert count == [2 * len(LAYERS)]


# -- the engine, exports, refusals --------------------------------------------------------------------


def test_no_kernel_takes_it_for_a_low_rank_update() -> None:
    engine = engine_of("flylora", "bert")
    assert fast._low_rank_shapes(engine) == []
    tensors = {name: engine.tensor(value)[None] for name, value in random_start(engine).items()}
    factors = engine.method.factors(tensors)
    adapted = [factors[layer.name] for layer in engine.base.structure.adapted]
    assert [(for_kernel(one), as_low_rank(one)) for one in adapted] == [(None, None)] * len(adapted)
    ids = torch.arange(12).reshape(2, 6) % 7 + 5
    logits = []
    for kernel in (False, True):
        layout = Layout.of(np.zeros(2, np.int64), 1, torch.device("cpu"), kernel=kernel)
        with torch.no_grad(), engine.grouped.placed(factors, layout) as model:
            logits.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits)
    assert torch.equal(*logits)


def test_there_is_no_export_and_a_plan_says_so(tmp_path: Path) -> None:
    engine = engine_of("flylora", "bert")
    with pytest.raises(ValueError, match=r"cannot be exported to PEFT: each token chooses which ranks count for it"):
        adapter_files(engine, random_start(engine), CONFIGS["flylora"])
    one = plan(tmp_path, **{"strategy.name": "fedavg", "method.name": "flylora", "flylora.active": 1})
    assert "no adapter will be written: each token chooses which ranks count for it" in shown(one)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"flylora.active": 0}, r"flylora.active = 0: must be at least 1"),
        ({"method.rslora": True}, r"method.rslora = true: is read by lora; flylora scales by alpha / rank"),
        (
            {"method.ranks": "uniform:2-4", "strategy.name": "local"},
            r"method.ranks = .*read by lora and sora only",
        ),
        *(
            ({"strategy.name": name}, rf"method.name = 'flylora': strategy '{name}' works with")
            for name in ("ffa-lora", "fedsa-lora", "fedsvd")
        ),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "flylora", **flat})


def test_more_active_ranks_than_there_are_are_refused() -> None:
    assert fly(active=4).active == 4
    config = CONFIGS["flylora"].to_flat() | {"flylora.active": 5, "strategy.name": "fedavg"}
    with pytest.raises(ConfigError, match=r"flylora.active = 5: is above method.rank = 4, of which .*; lower it"):
        build_method(resolve(config), LAYERS, [])


def test_a_worker_trains_it_and_sends_b_alone(tmp_path: Path) -> None:
    worker = tiny_worker(tmp_path, **{"strategy.name": "fedavg", "method.name": "flylora", "flylora.active": 1})
    updates = ask(worker)
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert {name.rsplit(".", 1)[-1] for name in updates[0].tensors} == {"fly_B", "weight", "bias"}


# -- planted bugs -------------------------------------------------------------------------------------


def kept(one: TopRanks, low: Tensor, by: Tensor) -> Tensor:
    """Return the update by the ranks of the largest numbers in ``by``."""
    mask = torch.zeros_like(low).scatter(-1, by.topk(one.active, -1).indices.expand(*low.shape[:-1], -1), 1.0)
    return (low * mask) @ (one.scale * one.B).mT


def signed(one: TopRanks, x: Tensor) -> Tensor:
    """As the authors' version for PEFT has it."""
    low = x @ one.A.mT
    return kept(one, low, low)


def without_gradient(one: TopRanks, x: Tensor) -> Tensor:
    """As that has it, too: what is below learns nothing through the adapter."""
    low = (x @ one.A.mT).detach()
    return kept(one, low, low.abs())


def by_row(one: TopRanks, x: Tensor) -> Tensor:
    """One choice for all tokens of a group."""
    low = x @ one.A.mT
    return kept(one, low, low.abs().mean(-2, keepdim=True))


def by_pack(one: TopRanks, x: Tensor) -> Tensor:
    """A bias that balances ranks over all rows, as the authors have it."""
    low = x @ one.A.mT
    return kept(one, low, low.abs() - low.abs().mean((0, 1)))


@pytest.mark.parametrize("planted", [signed, without_gradient, by_row, by_pack])
def test_planted_bugs_are_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopRanks, "of", planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("flylora", TRAINED, "bert")
    with pytest.raises(AssertionError):
        gradients_of_each_row("flylora", "llama-lm")
