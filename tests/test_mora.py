"""MoRA: a square matrix between sums and copies, its size, its export, and planted bugs.

The rest is in the matrix.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedlora.config import ConfigError
from fedlora.engine import fast
from fedlora.exchange import Outcome
from fedlora.methods import Mora, Square, count_parameters
from fedlora.methods.base import Layer
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import ExportError, check_adapter
from simulations.setup import resolve
from strategies import FedAvg, Local
from tests.support.formulas import LAYERS
from tests.support.matrix import CONFIGS, engine_of, random_start, setting
from tests.support.trainers import ask, tiny_worker
from tests.test_matrix import test_packed_equals_sequential as packed_equals_sequential
from tests.test_random_bases import held_for_the_backward_pass

TRAINED = frozenset({"R", "head"})
WEIGHTS = "adapter_model.safetensors"


def square(size: int, d_in: int, d_out: int, groups: int = 2) -> Square:
    draw = torch.Generator().manual_seed(0)
    core = torch.randn(groups, size, size, generator=draw, dtype=torch.float64, requires_grad=True)
    return Square(core, d_in, d_out)


def layer(d_in: int, d_out: int) -> list[Layer]:
    return [Layer("l", d_in, d_out, True, False)]


# -- the update ---------------------------------------------------------------------------------------


def test_by_hand() -> None:
    """Five inputs in threes: the first one comes again; the second copy of the outputs has room for one of them."""
    core = torch.tensor([[1.0, 10.0, 100.0], [0.0, 1.0, 0.0], [2.0, 0.0, 0.0]])
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])  # sums 1 + 4, 2 + 5, 3 + 1
    assert Square(core, 5, 4).of(x).tolist() == [[[475.0, 7.0, 10.0, 475.0]]]


@pytest.mark.parametrize(("size", "d_in", "d_out"), [(4, 8, 12), (4, 6, 10), (3, 8, 4), (5, 5, 5), (4, 4, 7)])
def test_its_factors_give_the_same(size: int, d_in: int, d_out: int) -> None:
    """For two clients at once; sizes that divide the features and sizes that do not."""
    one = square(size, d_in, d_out)
    a, b = one.product()
    assert a.shape == (size, d_in)
    assert b.shape == (2, d_out, size)
    x = torch.randn(2, 7, d_in, dtype=torch.float64)
    assert torch.allclose(one.of(x), x @ a.mT @ b.mT, atol=1e-12)


def test_a_mean_of_r_is_the_mean_of_the_updates() -> None:
    one, x = square(3, 8, 4, groups=5), torch.randn(1, 7, 8, dtype=torch.float64)
    mean = one._replace(R=one.R.mean(0, keepdim=True))
    assert torch.allclose(mean.of(x), one.of(x).mean(0, keepdim=True), atol=1e-12)
    assert FedAvg(setting("mora")).exact
    assert Local(setting("mora")).exact is None
    assert not FedAvg(setting("lora")).exact, "two factors"
    assert not FedAvg(setting("uni-lora")).exact, "one tensor, but both factors"


def test_a_pass_keeps_no_copies_of_r() -> None:
    """Under DP a row is a group; planted: its factors, d_out q = 2,048 numbers for each, in place of 4 tokens' 64."""
    one, x = square(16, 64, 128, groups=6), torch.randn(6, 4, 64, dtype=torch.float64, requires_grad=True)
    assert held_for_the_backward_pass(one, x, one.of) == 6 * 4 * 16, "the sums"

    def whole(x: Tensor) -> Tensor:
        a, b = one.product()
        return x @ a.mT @ b.mT

    assert held_for_the_backward_pass(one, x, whole) > 6 * 128 * 16


# -- its size -----------------------------------------------------------------------------------------


def test_the_size_is_the_codes_and_its_numbers_are_those_of_lora() -> None:
    for d_in, d_out, rank in ((6, 10, 1), (8, 4, 1), (384, 384, 8), (1024, 4096, 8), (4096, 11008, 8), (4096, 1024, 3)):
        (spec,) = Mora(layer(d_in, d_out), rank=rank).specs().values()
        assert spec.shape == (int(((d_in + d_out) * rank) ** 0.5 + 0.5),) * 2
    assert count_parameters(Mora(layer(1024, 1024), rank=8).specs()) == 8 * 2048, "RoBERTa-large's queries"


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 10), (8, 4), (16, 16), (384, 1536), (4096, 1024)])
def test_the_largest_rank_is_named_that_a_layer_has_room_for(d_in: int, d_out: int) -> None:
    with pytest.raises(ConfigError, match=r"method.rank = 5000: makes a square matrix of \d+ rows for l, .*features; "):
        Mora(layer(d_in, d_out), rank=5000)
    most = min(d_in, d_out) * (min(d_in, d_out) + 1) // (d_in + d_out)
    assert Mora(layer(d_in, d_out), rank=most).sizes["l"] <= min(d_in, d_out)
    with pytest.raises(ConfigError, match=rf"has {min(d_in, d_out)} features; lower it to {most}\.$"):
        Mora(layer(d_in, d_out), rank=most + 1)


def test_a_layer_with_room_for_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"which has 3 features; leave that layer out of method.target-modules"):
        Mora(layer(100, 3), rank=1)


@pytest.mark.parametrize(
    ("flat", "message"),
    [
        ({"method.alpha": 8.0}, r"method.alpha = 8.0: mora has no scale alpha / r: leave it at its default"),
        ({"method.rslora": True}, r"method.rslora = True: mora has no scale alpha / r"),
        (
            {"method.ranks": "uniform:2-4", "strategy.name": "local"},
            r"method.ranks = .*read by lora and sora only",
        ),
        *(
            ({"strategy.name": name}, rf"method.name = 'mora': strategy '{name}' works with")
            for name in ("ffa-lora", "fed-sb", "fedsvd")
        ),
    ],
)
def test_what_cannot_work_is_refused(flat: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve({"strategy.name": "fedavg", "method.name": "mora", **flat})


# -- workers and exports ------------------------------------------------------------------------------


def test_a_worker_trains_it_and_refuses_what_has_no_room(tmp_path: Path) -> None:
    keys = {"strategy.name": "fedavg", "method.name": "mora"}
    updates = ask(tiny_worker(tmp_path / "a", **keys))
    assert [update.report.outcome for update in updates] == [Outcome.OK] * 4
    assert {name.rsplit(".", 1)[-1] for name in updates[0].tensors} == {"mora_R", "weight", "bias"}
    with pytest.raises(Exception, match=r"method.rank = 16: makes a square matrix of \d+ rows for .*; lower it to"):
        tiny_worker(tmp_path / "b", **keys, **{"method.rank": 16}).describe()


def test_exported_as_a_lora_of_the_squares_rank() -> None:
    engine = engine_of("mora", "gpt2", "all-linear")
    tensors = random_start(engine)
    files = adapter_files(engine, tensors, CONFIGS["mora"])
    assert b'"peft_type": "LORA"' in files["adapter_config.json"]
    assert check_adapter(engine, tensors, files) < 1e-12
    weights = load(files[WEIGHTS])
    first = next(name for name in weights if "lora_A" in name)
    layer = first.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert weights[first].shape[0] == len(tensors[f"{layer}.mora_R"])
    once = weights[first].clone()
    once[-1] = 0.0  # sums that lack one
    with pytest.raises(ExportError, match="does not give in PEFT what it gives here"):
        check_adapter(engine, tensors, {**files, WEIGHTS: save({**weights, first: once})})


def test_the_low_rank_kernel_leaves_it_alone() -> None:
    assert fast._low_rank_shapes(engine_of("mora", "bert")) == []


# -- planted bugs -------------------------------------------------------------------------------------


def zeros_behind(one: Square, x: Tensor) -> Tensor:
    """Inputs padded by zeros, in place of the first ones."""
    size = one.R.shape[-1]
    padded = torch.cat([x, torch.zeros_like(x[..., : -one.d_in % size])], -1)
    return right(one._replace(d_in=padded.shape[-1]), padded)


def neighbours(one: Square, x: Tensor) -> Tensor:
    """Outputs that are repeated one by one, as in the code's type 4."""
    size = one.R.shape[-1]
    return right(one._replace(d_out=size), x).repeat_interleave(-(-one.d_out // size), -1)[..., : one.d_out]


def means(one: Square, x: Tensor) -> Tensor:
    return right(one, x) / -(-one.d_in // one.R.shape[-1])


def transposed(one: Square, x: Tensor) -> Tensor:
    return right(one._replace(R=one.R.mT), x)


right = Square.of


@pytest.mark.parametrize("planted", [zeros_behind, neighbours, means, transposed])
def test_planted_bugs_are_seen(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Square, "of", planted)
    with pytest.raises(AssertionError):
        packed_equals_sequential("mora", TRAINED, "bert")


def test_layers_of_the_matrix_have_sums_and_copies_with_a_rest() -> None:
    sizes = Mora(LAYERS, rank=1).sizes
    rests = [np.remainder((one.d_in, one.d_out), sizes[one.name]).tolist() for one in LAYERS]
    assert all(any(rest) for rest in rests)
