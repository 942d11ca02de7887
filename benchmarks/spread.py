"""Packs on a base model that one GPU does not hold, spread over several: a Llama shape, random weights, bfloat16.

    python -m benchmarks.spread --layers 52 --width 8192 --gpus 2 --clients 1,4,16 --tokens 512

Nothing is downloaded, and nothing passes through the host's memory: each block is drawn on the GPU that accelerate's
balanced map gives it. LoRA of rank 8 on query and value projections, AdamW. ``--gpus 1`` with fewer layers is what it
is compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
import transformers
from accelerate.utils import get_balanced_memory

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, evaluate, train_pack
from fedlora.engine.fast import settle
from fedlora.methods import build_method, initial_tensors
from fedlora.models import Base, inspect
from fedlora.models.quiet import quiet
from fedlora.seeded import Seeded
from fedlora.tasks import CausalLM, Examples

_GB = 1e9
_WORDS = 32000


def draw(options: argparse.Namespace) -> Base:
    """Return a base of random weights on the GPUs; without a GPU on the CPU, to try the command."""
    config = transformers.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=7 * options.width // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 128,
        num_key_value_heads=max(1, options.width // 1024),
        vocab_size=_WORDS,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    with torch.device("meta"), quiet():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    places: dict[str, Any] = {"": "cpu"}
    if torch.cuda.is_available():
        whole = model._no_split_modules
        room = {card: torch.cuda.get_device_properties(card).total_memory for card in range(options.gpus)}
        room = get_balanced_memory(model, room, whole)
        places = accelerate.infer_auto_device_map(model, room, whole)
    assert "disk" not in places.values(), "it does not fit onto these GPUs"
    for name, place in places.items():
        model.get_submodule(name).to_empty(device=place)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its numbers are computed, not drawn
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    accelerate.dispatch_model(model, places)
    structure = inspect(model, "q_proj,v_proj", has_head=False)
    return Base(model.requires_grad_(False).eval(), None, structure, "")


def make_works(engine: Engine, options: argparse.Namespace, clients: int) -> list[ClientWork]:
    """Return clients whose rows are answers in their second half."""
    generator, start = np.random.default_rng(0), initial_tensors(engine.method.specs(), Seeded(0), "float32")
    works = []
    for client in range(clients):
        texts = tuple(generator.integers(3, _WORDS, size=(options.rows, options.tokens)))
        answers = tuple(np.arange(options.tokens) >= options.tokens // 2 for _ in texts)
        batches = [np.arange(options.rows)] * options.steps
        works.append(ClientWork(client, Examples(texts, answers), options.rows, batches, start))
    return works


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return memory of each GPU, seconds a client-step by clients, and seconds of an evaluated token."""
    base = draw(options)
    method = build_method(Config(method=MethodConfig("lora", rank=8)), base.structure.adapted, ())
    start = initial_tensors(method.specs(), Seeded(0), "float32")
    engine = settle(Engine.build(base, method, CausalLM(0)), start)
    cards = [card for card in engine.cards if card.type == "cuda"]
    found: dict[str, Any] = {
        "device": [torch.cuda.get_device_name(card) for card in cards] or ["cpu"],
        "weights_gb": sum(parameter.nbytes for parameter in base.model.parameters()) / _GB,
        "on_each_gb": [torch.cuda.memory_allocated(card) / _GB for card in cards],
        "pass_tokens": engine.max_cost,
        "client_step_s": {},
    }
    train = TrainConfig(learning_rate=1e-3, batch_size=options.rows, local_steps=options.steps)
    for clients in map(int, options.clients.split(",")):
        works = make_works(engine, options, clients)
        seconds, losses = [], []
        for _ in range(options.rounds):
            began = time.perf_counter()
            results = train_pack(engine, works, {}, train)
            seconds.append((time.perf_counter() - began) / (clients * options.steps))
            losses = [result.loss for result in results]
            assert not any(result.error for result in results), results[0].error
        warm = seconds[1:] or seconds
        ends = {name: value for name, value in results[0].tensors.items() if name.endswith("lora_B")}
        assert all(np.any(value) for value in ends.values()), "each B has moved, on whatever GPU"
        found["client_step_s"][clients] = {"min": min(warm), "median": float(np.median(warm)), "max": max(warm)}
        print(f"  {clients} clients: {np.median(warm):.4f} s a client-step, loss {np.mean(losses):.4f}", flush=True)
    rows, numbers = works[0].examples, list(range(options.rows)) * max(1, 4 // options.rows)
    for _ in range(2):
        began = time.perf_counter()
        evaluate(engine, results[0].tensors, rows, numbers)
        found["evaluated_token_s"] = (time.perf_counter() - began) / (len(numbers) * options.tokens)
    return found | {"peak_gb": [torch.cuda.max_memory_allocated(card) / _GB for card in cards]}


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=52)
    parser.add_argument("--width", type=int, default=8192, help="features of a layer, a multiple of 128")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--clients", default="1,4,16", help="clients of a pack, with commas between")
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="where the results go")
    options = parser.parse_args()
    found = measure(options)
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    found |= {"command": sys.argv[1:], "versions": versions}
    print(json.dumps(found), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
