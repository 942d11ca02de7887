"""Tries the engine on tiny models of every family, and writes what it found into docs/models.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, find_batching, train_pack
from fedlora.engine.apart import random_tensors
from fedlora.methods import build_method, initial_tensors
from fedlora.models import Structure, prepare_base
from fedlora.privacy import PrivateRandom
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.step import PrivateStep
from fedlora.runs.export import adapter_files
from fedlora.runs.export_check import check_adapter
from fedlora.seeded import Seeded
from tools.families import FAMILIES, FLOAT32, PAD, task_of, tiny_model, tiny_rows
from tools.markdown import rewrite

Arrays = dict[str, NDArray[np.floating]]
_BATCHES = ([[0, 3, 5], [2]], [[4, 1]], [[5, 4], [1, 0]])
_STEPS = TrainConfig(learning_rate=0.05, optimizer="sgd", momentum=0.0)
_MECHANISM = Mechanism(0.7, 1.0, sample_rate=0.5, expected_batch_size=2, steps=2)


@dataclass(frozen=True)
class Findings:
    """What the engine makes of a family.

    Attributes:
        structure: The model's layers.
        batching: Which rows may go through the model together; empty: any.
        alone: Largest difference between clients trained in one pack and each alone.
        by_row: The same between the pack and one row at a time.
        dp: The same under DP-SGD, one pack of clients and each alone, row by row.
        moved: Largest change of a trained number, beside which the differences are small.
        peft: Largest difference of a row's loss between the engine and the exported adapter in plain PEFT.
    """

    structure: Structure
    batching: str
    alone: float
    by_row: float
    dp: float
    moved: float
    peft: float


def engine_of(family: str, target_modules: str = "auto", quantization: str = "none") -> tuple[Engine, Config]:
    """Return an engine on a family's tiny model, with LoRA of rank 2, batched as the family asks for."""
    task = task_of(family)
    model = tiny_model(family) if quantization == "none" else tiny_model(family).float()
    base = prepare_base(
        model,
        None,
        target_modules,
        has_head=task.has_head,
        device=torch.device("cpu"),
        name=family,
        quantization=quantization,
    )
    config = Config(
        task="classification" if task.has_head else "causal-lm",
        method=MethodConfig("lora", rank=2, target_modules=target_modules),
    )
    method = build_method(config, base.structure.adapted, base.structure.head)
    own = task(PAD)
    own.made_up = tiny_rows(family, 6, seed=9).tokens
    engine = Engine.build(base, method, own)
    return replace(engine, batching=find_batching(engine, initial_tensors(method.specs(), Seeded(0)))), config


def find(family: str, target_modules: str = "auto", quantization: str = "none") -> Findings:
    """Return what the engine makes of a family."""
    engine, config = engine_of(family, target_modules, quantization)
    start = random_tensors(initial_tensors(engine.method.specs(), Seeded(0)), "start")
    by_row = replace(engine, max_cost=1)
    together = _trained(engine, start, (0, 1, 2))
    moved = max(float(np.abs(tensors[name] - start[name]).max()) for tensors in together for name in start)
    return Findings(
        structure=engine.base.structure,
        batching=engine.batching.words,
        alone=_off(together, _alone(engine, start)),
        by_row=_off(together, _alone(by_row, start)),
        dp=_off(_trained(engine, start, (0, 1, 2), dp=True), _alone(by_row, start, dp=True)),
        moved=moved,
        peft=check_adapter(engine, start, adapter_files(engine, start, config)),
    )


def _trained(engine: Engine, start: Arrays, clients: Sequence[int], *, dp: bool = False) -> list[Arrays]:
    rows = tiny_rows(_family(engine), 6, seed=3)
    works = [ClientWork(k, rows, 6, [np.array(batch) for batch in _BATCHES[k]], start) for k in clients]
    private = PrivateStep(_MECHANISM, [PrivateRandom.reproducible(1, k, 1) for k in clients]) if dp else None
    return [result.tensors for result in train_pack(engine, works, {}, _STEPS, private)]


def _alone(engine: Engine, start: Arrays, *, dp: bool = False) -> list[Arrays]:
    return [_trained(engine, start, (client,), dp=dp)[0] for client in range(len(_BATCHES))]


def _off(one: list[Arrays], other: list[Arrays]) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for a, b in zip(one, other, strict=True) for name in a)


def _family(engine: Engine) -> str:
    return "Llama" if not engine.task.has_head else "BERT"  # which decides what a row's target is


def families_table() -> list[str]:
    """Return the table of families as Markdown lines."""
    lines = [
        "| family | `auto` adapts | head | batches | pack - alone | pack - row by row | DP pack - row by row | PEFT |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for family in FAMILIES:
        found = find(family)
        head = ", ".join(layer.name for layer in found.structure.head) or "-"
        batches = re.sub(r" \([^)]*\)", "", found.batching) or "any rows"
        numbers = " | ".join(f"{number:.0e}" for number in (found.alone, found.by_row, found.dp, found.peft))
        name = f"{family}{' (float32)' if family in FLOAT32 else ''}"
        lines.append(f"| {name} | {', '.join(found.structure.targets)} | {head} | {batches} | {numbers} |")
    return lines


TABLES = {"families": families_table}


def main(root: str) -> None:
    """Rewrite the table of the project in the folder ``root``."""
    rewrite(Path(root) / "docs" / "models.md", TABLES)


if __name__ == "__main__":
    main(sys.argv[1])
