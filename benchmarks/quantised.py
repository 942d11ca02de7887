"""Memory and time of packs on a quantised base, beside the same base in bfloat16: a Llama-2-7B shape, random weights.

    python -m benchmarks.quantised --clients 32 --rows 4 --tokens 512 --rounds 10

Nothing is downloaded: the model is drawn on the device, and quantised as a run quantises it. Each kind of base has a
process of its own, so that none finds what another has left. LoRA of rank 8 on query and value projections, AdamW.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, train_pack
from fedlora.engine.fast import settle
from fedlora.methods import build_method, initial_tensors
from fedlora.models import Base, prepare_base
from fedlora.models.quiet import quiet
from fedlora.quantisation import base_bytes
from fedlora.seeded import Seeded
from fedlora.tasks import CausalLM, Examples

KINDS = ("nf4", "int8", "none")
SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_GB = 1e9


def load(shape: str, kind: str, tokens: int, device: torch.device) -> Base:
    """Return a base of random weights in bfloat16, quantised or not, made on the device in seconds."""
    config = transformers.LlamaConfig(
        **SHAPES[shape], vocab_size=32000, max_position_embeddings=max(4096, tokens), pad_token_id=0
    )
    torch.manual_seed(0)
    with device, quiet():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return prepare_base(model, None, "q_proj,v_proj", has_head=False, device=device, quantization=kind)


def make_works(engine: Engine, clients: int, rows: int, tokens: int, steps: int) -> list[ClientWork]:
    """Return clients that take ``steps`` steps of ``rows`` rows, of which the second half is the answer."""
    generator, start = np.random.default_rng(0), initial_tensors(engine.method.specs(), Seeded(0), "float32")
    works = []
    for client in range(clients):
        texts = tuple(generator.integers(3, 32000, size=(rows, tokens)))
        answers = tuple(np.arange(tokens) >= tokens // 2 for _ in range(rows))
        works.append(ClientWork(client, Examples(texts, answers), rows, [np.arange(rows)] * steps, start))
    return works


def allocated(device: torch.device) -> float:
    """Return the memory in use, in GB: of a GPU what tensors hold, else this process's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() / _GB
    return psutil.Process().memory_info().rss / _GB


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what one kind of base takes: memory when loaded, after each round and at most, and seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    base = load(options.shape, options.kind, options.tokens, device)
    method = build_method(Config(method=MethodConfig("lora", rank=8)), base.structure.adapted, ())
    start = initial_tensors(method.specs(), Seeded(0), "float32")
    engine = settle(Engine.build(base, method, CausalLM(0)), start)
    if options.max_cost:
        engine = replace(engine, max_cost=options.max_cost)
    structure, cuda = base.structure, device.type == "cuda"
    found: dict[str, Any] = {
        "kind": options.kind,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "load_s": time.perf_counter() - began,
        "base_gb_said": base_bytes(structure.num_parameters, structure.num_quantisable, options.kind, "bfloat16") / _GB,
        "base_gb": allocated(device),
    }
    works = make_works(engine, options.clients, options.rows, options.tokens, options.steps)
    train = TrainConfig(learning_rate=1e-4, batch_size=options.rows, local_steps=options.steps)
    after, seconds, losses = [], [], []
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(1, options.rounds + 1):
        began = time.perf_counter()
        results = train_pack(engine, works, {}, train)
        after.append(allocated(device))
        seconds.append((time.perf_counter() - began) / (options.clients * options.steps))
        losses.append(float(np.mean([result.loss for result in results])))
        assert not any(result.error for result in results), results[0].error
        print(f"  round {number}: {after[-1]:.3f} GB after it, {seconds[-1]:.4f} s a client-step", flush=True)
        del results
    warm = seconds[1:] or seconds  # the first round compiles kernels and fills caches
    return found | {
        "peak_gb": torch.cuda.max_memory_allocated() / _GB if cuda else None,
        "after_round_gb": after,
        "growth_gb": max(after[1:] or after) - min(after[1:] or after),
        "client_step_s": {"min": min(warm), "median": float(np.median(warm)), "max": max(warm)},
        "tokens_per_s": options.rows * options.tokens / float(np.median(warm)),
        "loss": losses[-1],
    }


def main() -> None:
    """Measure one kind of base, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default=None, help="one kind only, in this process")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rows", type=int, default=1, help="rows of a step")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-cost", type=int, default=0, help="tokens of a forward pass (0: as the engine decides)")
    parser.add_argument("--json", type=Path, default=None, help="where the results go")
    options = parser.parse_args()
    if options.kind is None:
        for kind in KINDS:
            into = [] if options.json is None else ["--json", str(options.json.with_suffix(f".{kind}.json"))]
            given = [one for one in sys.argv[1:] if one != "--json" and one != str(options.json)]
            subprocess.run([sys.executable, "-m", "benchmarks.quantised", *given, "--kind", kind, *into], check=False)
        return
    print(f"{options.kind}: {options.clients} clients x {options.rows} x {options.tokens} tokens", flush=True)
    found = measure(options)
    names = [name for name in ("torch", "transformers", "bitsandbytes") if importlib.util.find_spec(name)]
    found |= {"command": sys.argv[1:], "versions": {name: version(name) for name in names}}
    print(json.dumps(found), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
