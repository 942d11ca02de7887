"""The benchmarks of the engine: every way but those of a GPU runs on a tiny model, and what is wrong is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.engine import resident, uneven
from benchmarks.engine.__main__ import main
from benchmarks.engine.checks import ALONE
from benchmarks.engine.families import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    LOW_RANK,
    MOVES,
    OPTIMIZER,
    PRODUCTS,
    busy_us,
    family,
)
from benchmarks.engine.jobs import Job
from benchmarks.engine.shapes import SHAPES, random_model, useful_flops
from benchmarks.engine.timing import Budget, Way, measure
from tools import performance_results, performance_tables
from tools.performance_goals import rows_of

TINY = ["--shape", "tiny", "--rank", "4", "--repeats", "1", "--device", "cpu"]
CPU = torch.device("cpu")


def written(table: str, path: Path, *arguments: str, shape: str = "tiny", device: str = "cpu") -> dict[str, Any]:
    small = ["--rank", "4", "--repeats", "1", "--device", device]
    assert main([table, "--shape", shape, *small, "--out", str(path), *arguments]) == 0
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return whole


@pytest.mark.filterwarnings("ignore")
def test_every_table_is_made_from_what_its_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(performance_results, "RESULTS", tmp_path)
    assert performance_tables.TABLES["engine"]() == performance_results.NONE_YET
    small = ("--rows", "2", "--tokens", "8", "--steps", "1")
    ways = "as-shipped,eager,graph,opacus-hooks,opacus-ghost"
    kinds = ("--methods", "lora,mos,s2-lora,ffa-lora", "--dp", "--ragged-ranks", "--baselines", ways)
    train = written("train", tmp_path / "train.json", *small, "--clients", "2", *kinds)
    written("regimes", tmp_path / "regimes.json", "--sizes", "8,16", "--pack-tokens", "64", "--baselines", "eager")
    written("uneven", tmp_path / "uneven.json", "--clients", "3", "--mean-rows", "4", "--longest", "32")
    written("memory", tmp_path / "memory.json", *small, "--clients", "2", "--rounds", "2", shape="tiny-lm")
    profile = written("profile", tmp_path / "profile.json", *small, "--clients", "2")

    tiny = ("--rows", "2", "--tokens", "8", "--clients", "2")
    curves = written("curves", tmp_path / "curves.json", *tiny, "--steps", "1,4")

    for line, bound in zip(curves["lines"], (1e-5, 1e-9, 1e-2, 1e-2), strict=True):
        assert max(line["off"]) < bound
    measured = [line for line in train["lines"] if "ms" in line]
    assert len(measured) == 4 + 4 * 2 + 1, "four baselines, four methods with and without DP, unlike ranks"
    errors = [line["error"] for line in train["lines"] if "ms" not in line]
    assert errors == ["ValueError: graph: CUDA graphs need a GPU"]
    compared = {check["against"] for check in train["checks"] if check.get("equal")}
    assert compared == {"eager", "opacus-hooks", "opacus-ghost", ALONE}
    assert min(check["fell"] for check in train["checks"] if "fell" in check) > 1e-3, "or it would say nothing"
    assert sum(line["share"] for line in profile["lines"]) > 0.999, "idle time fills up what kernels leave"
    for name, table in performance_tables.TABLES.items():
        if name not in ("goals", "kernels", "scaling"):  # of GPUs, and test_bench_scaling.py
            assert len(table()) > 2, name


def test_losses_that_differ_fail_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A baseline with half the learning rate."""
    adamw = resident.adamw

    def slow(*arguments: Any, **options: Any) -> torch.optim.AdamW:
        optimizer = adamw(*arguments, **options)
        optimizer.param_groups[0]["lr"] *= 0.5
        return optimizer

    monkeypatch.setattr(resident, "adamw", slow)
    small = ["--rows", "2", "--tokens", "8", "--clients", "2", "--steps", "1", "--baselines", "eager"]
    assert main(["train", *TINY, *small]) == 1


def test_a_language_model_in_bfloat16_is_within_its_tolerance(tmp_path: Path) -> None:
    small = ("--rows", "2", "--tokens", "8", "--clients", "2", "--steps", "1", "--baselines", "eager")
    whole = written("train", tmp_path / "a.json", *small, "--dtype", "bfloat16", shape="tiny-lm")
    assert [check["equal"] for check in whole["checks"]] == [True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["tiny", "tiny-lm"])
def test_graphs_and_profiles_on_a_gpu(tmp_path: Path, shape: str) -> None:
    small = ("--rows", "2", "--tokens", "8", "--clients", "2", "--steps", "1")
    train = written(
        "train", tmp_path / "a.json", *small, "--baselines", "eager,graph,compile", shape=shape, device="cuda"
    )
    assert [check["equal"] for check in train["checks"]] == [True, True, True]
    assert all(line["peak_gib"] > 0 for line in train["lines"])
    profile = written("profile", tmp_path / "b.json", *small, shape=shape, device="cuda")
    assert profile["covered"] > 0.9


@pytest.mark.filterwarnings("ignore")
def test_the_compiled_baseline_is_one_graph_with_the_same_gradients() -> None:
    """What a GPU's compiler is given; a part that it does not take would be timed uncompiled."""
    shape = SHAPES["tiny-lm"]
    adapted = resident.peft_model(random_model(shape, CPU, torch.float32), shape, 4)
    trained = [one for one in adapted.parameters() if one.requires_grad]
    ids, labels = (one[0] for one in Job(shape, 1, 1, 2, 8, 300).tensors(0))
    compiled = torch.compile(resident.loss_of, dynamic=False, fullgraph=True, backend="aot_eager")
    both = [torch.autograd.grad(loss(adapted, ids, labels), trained) for loss in (resident.loss_of, compiled)]
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))


def test_ways_take_turns_forwards_and_backwards_and_one_that_fails_stops_no_other() -> None:
    order: list[str] = []

    def way(name: str) -> Way:
        def run() -> None:
            order.append(name)
            if name == "b" and order.count("b") == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")

        return Way(name, lambda: run, 1)

    def broken() -> Any:
        raise ImportError("no opacus")

    first, second, third, fourth = measure([way("a"), way("b"), Way("c", broken, 1), way("d")], 3, Budget(0), CPU)
    assert "".join(order) == "aabbdd" + "dba" + "ad", "each warm and timed, then backwards, b without its third round"
    assert [len(one.seconds) for one in (first, second, third, fourth)] == [3, 1, 0, 3]
    assert [one.error for one in (first, second, third, fourth)] == ["", "out of memory", "ImportError: no opacus", ""]


def test_nothing_is_started_when_the_time_is_over() -> None:
    budget = Budget(1e-9)
    (one,) = measure([Way("a", lambda: lambda: None, 1)], 3, budget, CPU)
    assert one.error == "not started: no time left"


@pytest.mark.parametrize(
    ("shape", "tokens", "giga"),
    [("roberta-large", 128, 1.25), ("llama-3.2-1b", 512, 5.05), ("llama-3.2-3b", 512, 13.1), ("llama-2-7b", 512, 26.9)],
)
def test_useful_operations_of_a_token(shape: str, tokens: int, giga: float) -> None:
    """Four a weight: 0.302, 1.236, 3.213 and 6.607 billion of them, output layer included."""
    model = random_model(SHAPES[shape], torch.device("meta"), torch.bfloat16)
    assert useful_flops(SHAPES[shape], model, tokens) == pytest.approx(1e9 * giga, rel=0.01)


KERNELS = [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "aten::addmm", [[4096], [8192, 1024], [1024, 4096]], PRODUCTS),
    ("nvjet_tst_128x64_64x8_2x1_v_bz_TNN", "", [], PRODUCTS),
    ("cutlass_80_tensorop_bf16_s16816gemm_bf16_64x64", "aten::bmm", [[64, 1024, 1024], [64, 1024, 8]], LOW_RANK),
    ("_two_products", "", [], LOW_RANK),
    ("_sums_3", "", [], LOW_RANK),
    ("_backward_0", "", [], ATTENTION),
    ("_add", "", [], OPTIMIZER),
    ("_peaks", "", [], OPTIMIZER),
    ("triton_red_fused__to_copy_add_native_layer_norm_clip_3", "", [], ELEMENTWISE),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "aten::_flash_attention_forward", [], ATTENTION),
    ("void at::native::elementwise_kernel<GeluBackward>", "aten::gelu_backward", [[8192, 4096]], ELEMENTWISE),
    ("void at::native::vectorized_elementwise_kernel<CUDAFunctor_add>", "aten::add", [[64, 1838082]], OPTIMIZER),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdam>", "", [], OPTIMIZER),
    ("void at::native::vectorized_layer_norm_kernel<float>", "aten::native_layer_norm", [[8192, 1024]], ELEMENTWISE),
    ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "aten::copy_", [[8192, 1024]], MOVES),
    ("Memcpy HtoD (Pageable -> Device)", "aten::copy_", [[64, 1838082]], COPIES),
]


@pytest.mark.parametrize(("kernel", "operation", "shapes", "expected"), KERNELS)
def test_kernels_are_told_apart(kernel: str, operation: str, shapes: list[list[int]], expected: str) -> None:
    assert family(kernel, operation, shapes, 1838082) == expected


def test_time_in_which_two_kernels_run_counts_once() -> None:
    assert busy_us([(0, 4), (2, 6), (10, 11), (3, 5)]) == 7


def test_uneven_clients_differ_tenfold_and_lengths_like_texts() -> None:
    sizes = uneven.sizes_of(64, 32, 1.0)
    assert sizes.max() == pytest.approx(10 * sizes.min(), rel=0.1)
    lengths = uneven.lengths_of(5000, 0, 5, 128)
    assert (lengths.min(), np.median(lengths), lengths.max()) == (5, pytest.approx(24, abs=2), 128)


def test_tokens_are_counted_where_they_go_in(tmp_path: Path) -> None:
    whole = written("uneven", tmp_path / "u.json", "--clients", "3", "--mean-rows", "4", "--longest", "32")
    uneven_line, equal = whole["lines"]
    assert equal["useful"] == 1
    assert 0.3 < uneven_line["useful"] < 1
    assert uneven_line["tokens_real"] < uneven_line["tokens_computed"]


def test_goals_take_the_best_pack_and_say_what_is_not_met() -> None:
    def line(clients: int, ms: float, graph: float, share: float) -> dict[str, Any]:
        common = {
            "device": "H100",
            "run": "a",
            "shape": "roberta-large",
            "rows": 8,
            "tokens": 128,
            "steps": 4,
            "clients": clients,
        }
        own = {"way": "fedlora", "method": "lora", "dp": False, "ragged": False, "ms": ms, "share": share}
        return {**common, **own, "times": {"graph": graph / ms, "compile": 2 * graph / ms}}

    small, large = line(16, 4.0, 12.0, 0.45), line(64, 2.0, 12.0, 0.55)
    private = {**line(64, 2.1, 12.0, 0.5), "dp": True}
    rows = {(row[0], row[1], row[2]): row[4:] for row in rows_of([small, large, private], (4, 20))}
    times = next(
        cells for key, cells in rows.items() if key[:2] == ("roberta-large", "1024") and "graph" in key[2].lower()
    )
    assert times == ["6 (H100)", ""]
    assert rows["roberta-large", "1024", "of the ceiling"] == ["0.55 (H100, not met)", ""]
    assert rows["roberta-large", "1024", "DP-SGD's step by that without privacy"] == ["1.05 (H100)", ""]
    assert rows["llama-2-7b", "2048", "times as fast as any sequential training"] == ["", ""]
