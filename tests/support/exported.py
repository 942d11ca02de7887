"""Finished run folders with a real exported adapter, made by the trainers' own worker in this process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.limits import SiteLimits
from clients.site import Job
from clients.worker import Worker
from fedlora.config import Config
from fedlora.data import load_federated
from fedlora.reports.card import model_card
from fedlora.roles import Role
from fedlora.runs.folder import RunFolder
from fedlora.tasks import TASKS
from simulations.setup import resolve
from tests.support.tiny import WORDS, save_tiny_language_model
from tests.support.trainers import tiny_flat


@dataclass
class Exported:
    """A run folder, and the worker that exported its adapter."""

    path: Path
    config: Config
    worker: Worker
    tensors: dict[str, Any]


def language_flat(folder: Path, **changes: Any) -> dict[str, Any]:
    """A tiny language model and a file of questions and answers."""
    generator = np.random.default_rng(1)
    lines = ["question,hint,answer"]
    for _ in range(60):
        words = [" ".join(generator.choice(WORDS, size=int(generator.integers(1, 5)))) for _ in range(3)]
        lines.append(",".join(words))
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return tiny_flat(
        folder,
        **{
            "task": "causal-lm",
            "model.name": save_tiny_language_model(folder / "lm"),
            "data.path": str(folder / "pairs.csv"),
            "data.text-column": "question",
            "data.partition": "iid",
            "strategy.name": "fedavg",
            "train.max-length": 16,
            **changes,
        },
    )


def exported_run(folder: Path, flat: dict[str, Any], clients: int = 0, scale: float = 1.0) -> Exported:
    """Write a finished run with an adapter of random tensors, or one for each of some clients."""
    config = resolve({"train.learning-rate": 0.01, **flat, "run.dir": str(folder / "runs"), "run.name": "run"})
    data = load_federated(config, 4)
    worker = Worker(lambda: Job(config.to_flat(), data, SiteLimits(str(folder / "sites"))), 1)
    worker.load()
    with RunFolder.opened(config) as written:
        pass  # nobody else writes it
    task, head = TASKS[config.task], {"head": Role.SHARED} if TASKS[config.task].has_head else {}
    measure = f"test_{task.measure.name}"
    classes = data.corpus.classes
    written.write_json("partition.json", {"classes": list(data.categories), "counts": [], "names": []})
    texts = data.corpus.text_names(config.data.text_column)
    plan: dict[str, Any] = {"measure": measure, "higher_is_better": True, "roles": {"A": "shared"}}
    plan |= {"texts": list(texts), "outputs": list(classes)}
    written.write_json("plan.json", plan)
    written.write_json("privacy.json", {"guarantee": "none", "released": []})
    written.append("metrics.jsonl", {"round": 1, measure: 0.5, "secret": 1})
    result = {measure: 0.5, "rounds": 1}
    tensors: dict[str, Any] = {}
    for client in range(clients) if clients else [None]:
        generator = np.random.default_rng(client or 0)
        tensors = {
            key: value + scale * generator.standard_normal(value.shape).astype(value.dtype)
            for key, value in worker.loaded.model.initial.items()
        }
        place = "adapter" if client is None else f"adapters/client-{client}"
        roles, privacy = {"A": Role.SHARED, **head}, {"guarantee": "none", "released": []}
        card = model_card(config, classes, result, roles, privacy, 1, texts=texts)
        for file, content in {**worker.export(tensors), "README.md": card.encode()}.items():
            written.write_bytes(f"{place}/{file}", content)
    for private in (
        "sites/client-0/ledger.jsonl",
        "sites/client-0/round-2.safetensors",
        "checkpoint/round-1.safetensors",
    ):
        written.write_bytes(private, b"private")
    written.write_json("result.json", result)
    return Exported(written.path, config, worker, tensors)
