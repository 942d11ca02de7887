"""The head alone on SST-2: what ``simulations/sweeps/sst2-s2.toml`` comes to without any adapter.

    python -m benchmarks.head_alone train.tsv

The frozen model sees each row once; a classification head is then trained on its pooled output by the same clients,
batches and optimizer as in the sweep, from the same start. Writes ``benchmarks/results/sst2-head.csv``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from clients.limits import SiteLimits
from clients.site import Job
from clients.worker import Worker
from fedlora.config import Config, from_toml
from fedlora.data import FederatedData, load_federated
from fedlora.engine import plan_batches
from fedlora.seeded import Seeded
from simulations.setup import resolve

SWEEP = Path(__file__).parents[1] / "simulations" / "sweeps" / "sst2-s2.toml"
RATES = (0.003, 0.01, 0.03, 0.1)
SEEDS = (0, 1, 2)


def pooled(worker: Worker, split: str) -> tuple[Tensor, Tensor]:
    """Return the frozen model's pooled output of each row [n, d], and the rows' classes [n]."""
    engine, examples = worker.loaded.model.engine, worker.loaded.model.examples[split]
    model: Any = engine.base.model
    parts = []
    with torch.inference_mode():
        for at in track(range(0, len(examples), 64), f"{split} rows", console=Console(stderr=True)):
            batch = engine.task.collate(examples, range(at, min(at + 64, len(examples))), engine.device)
            parts.append(model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output)
    return torch.cat(parts).clone(), torch.from_numpy(examples.targets)


def accuracy(config: Config, data: FederatedData, start: dict[str, Tensor], rows: dict[str, Any]) -> float:
    """Return the dev accuracy of the head after the run's rounds."""
    train = config.train
    inputs, targets = rows["train"]
    weights = np.array([len(data.training_rows(client)) for client in range(len(data.clients))])
    server = start
    for number in range(1, config.rounds + 1):
        mean = {name: torch.zeros_like(value) for name, value in server.items()}
        for client, weight in enumerate(weights):
            head = nn.Linear(inputs.shape[1], len(data.corpus.classes))
            head.load_state_dict(server)
            optimizer = torch.optim.AdamW(head.parameters(), lr=train.learning_rate, weight_decay=train.weight_decay)
            batches = plan_batches(Seeded(config.seed), number, client, data.training_rows(client), train)
            for batch in batches:
                optimizer.zero_grad()
                functional.cross_entropy(head(inputs[batch]), targets[batch]).backward()
                optimizer.step()
            for name, value in head.state_dict().items():
                mean[name] += value * float(weight / weights.sum())
        server = mean
    dev, classes = rows["dev"]
    logits = dev @ server["weight"].T + server["bias"]
    return float((logits.argmax(1) == classes).float().mean())


def main(path: str) -> None:
    """Run every learning rate and seed, and write what it came to."""
    flat = {key: value for key, value in from_toml(SWEEP.read_text(encoding="utf-8")).items() if "grid" not in key}
    flat = {key: value for key, value in flat.items() if "tune" not in key} | {
        "data.path": str(Path(path).resolve()),
        "data.test-path": "",
        "eval.test": False,
        "engine.dtype": "float32",
        "strategy.name": "s2-frozen",
    }
    lines = []
    for seed in SEEDS:
        config = resolve({**flat, "seed": seed})
        data = load_federated(config, config.federation.num_clients)
        with tempfile.TemporaryDirectory() as folder:
            job = Job(config.to_flat(), data, SiteLimits(folder))
            worker = Worker(lambda job=job: job, 2)  # type: ignore[misc]
            rows = {split: pooled(worker, split) for split in ("train", "dev")}
            start = {
                name.rpartition(".")[2]: torch.from_numpy(value.copy())
                for name, value in worker.loaded.model.initial.items()
                if worker.loaded.model.specs[name].kind == "head"
            }
        for rate in RATES:
            one = resolve({**flat, "seed": seed, "train.learning-rate": rate})
            lines.append({"train.learning-rate": rate, "dev_accuracy": accuracy(one, data, start, rows)})
            print(seed, rate, lines[-1]["dev_accuracy"])
    numbers = sum(value.numel() for value in start.values())
    groups = pd.DataFrame(lines).groupby("train.learning-rate", as_index=False)["dev_accuracy"]
    table = groups.agg(n="count", dev_accuracy_mean="mean", dev_accuracy_std="std")
    table["trained_parameters_mean"] = numbers
    table["bytes_up_mean"] = numbers * 4 * len(data.clients) * config.rounds
    table.to_csv(Path(__file__).parent / "results" / "sst2-head.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main(sys.argv[1])
