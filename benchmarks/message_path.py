"""What the way of a client's update costs: trainer, Ray, ClientApp, Flower's message, server; beside Flower's own way.

    python -m benchmarks.message_path

Whole federations with an adapter of RoBERTa-large's size and rank 8 (3 MB), in which nothing is trained: the time of a
round is that of the messages and of the reduction. Flower's way is a message a client and its ``FedAvg``, with clients
that send back what came. Server memory is the ServerApp process's largest, in the rounds after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from benchmarks.message_path_apps import NUMBERS, TENSORS
from simulations.launch import CONFIG_TABLE, launch, shipped
from simulations.options import read_overrides
from tests.support.families import SIZES
from tests.support.tiny import save_texts, save_tiny_model

ROOT = Path(__file__).parents[1]
WIDTH = 128  # of the model that carries the adapter; no update has a higher rank
RESULTS = Path(__file__).parent / "results" / "message-path.json"


def main() -> None:
    """Measure, print, and write ``benchmarks/results/message-path.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1_000], help="clients a round")
    parser.add_argument("--flower-clients", type=int, nargs="*", default=[10, 100], help="the same for Flower's way")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # every process of the run imports this checkout
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for way, counts in (("fedlora", options.clients), ("flower", options.flower_clients)):
            for count in counts:
                lines.append(measure(Path(folder) / f"{way}-{count}", way, count, options.rounds))
                print(json.dumps(lines[-1]), flush=True)
    growth = {
        way: {name: (own[-1][name] - own[0][name]) / (4 * NUMBERS) for name in ("server_bytes", "server_bytes_in_use")}
        for way in ("fedlora", "flower")
        if (own := [line for line in lines if line["way"] == way])
    }
    found = {
        "command": "python -m benchmarks.message_path",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}",
        "versions": {name: version(name) for name in ("flwr", "ray", "numpy", "torch")},
        "adapter_bytes": 4 * NUMBERS,
        "server_growth_adapters": growth,
        "lines": lines,
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(growth))


def measure(folder: Path, way: str, clients: int, rounds: int) -> dict[str, Any]:
    """Run one federation, and return what a client costs."""
    folder.mkdir()
    app, out, ours = folder / "app", folder / "out.json", way == "fedlora"
    shipped(ROOT, app)
    project = (app / "pyproject.toml").read_text()
    server, client = ("our_server", "") if ours else ("flower_server", "flower_client")
    project = project.replace('"deploy.server_app:app"', f'"benchmarks.message_path_apps:{server}"')
    if client:
        project = project.replace('"clients.app:app"', f'"benchmarks.message_path_apps:{client}"')
    project = project.replace(CONFIG_TABLE, CONFIG_TABLE + 'bench.out = ""\n')
    (app / "pyproject.toml").write_text(project)
    config = {**read_overrides(ROOT, []), "rounds": rounds + 1, "bench.out": str(out)}
    if ours:
        config |= federation(folder, max(100, clients), clients)
    nodes = [] if ours else [f"num-supernodes={clients} client-resources-num-cpus=1"]
    assert launch(app, config, nodes, Console()) == 0, "the run failed; Flower says why above"
    seen = json.loads(out.read_text())
    assert all(count == clients for count in seen["clients_ok"]), seen
    each = [1e3 * seconds / clients for seconds in seen["seconds"]]
    return {
        "way": way,
        "clients": clients,
        "ms_a_client": statistics.median(each),
        "ms_min": min(each),
        "ms_max": max(each),
        "cpu_ms_a_client": {name: 1e3 * seconds / clients for name, seconds in seen["cpu_seconds"].items()},
        "rounds": len(each),
        "server_bytes": seen["server_bytes"],
        "server_bytes_in_use": seen["server_bytes_in_use"],
        "nodes": seen["nodes"],
        "trainers": seen["trainers"],
    }


def federation(folder: Path, clients: int, sampled: int) -> dict[str, Any]:
    """Return the keys of a federation whose adapter has the numbers and tensors of the measurement."""
    model = folder / "model"
    save_tiny_model(model)
    sizes = {**SIZES, "hidden_size": WIDTH, "num_hidden_layers": TENSORS // 4}
    deep = transformers.BertConfig(vocab_size=44, **sizes, max_position_embeddings=64, pad_token_id=0)
    transformers.BertModel(deep).save_pretrained(model)
    return {
        "model.name": str(model),
        "data.name": "file",
        "data.path": save_texts(folder / "texts.csv", rows=4 * clients),
        "data.test-path": save_texts(folder / "few.csv", rows=20),
        "data.partition": "iid",
        "federation.num-clients": clients,
        "federation.clients-per-round": sampled,
        "strategy.name": "fedavg",
        "method.rank": NUMBERS // (TENSORS * WIDTH),
        "method.head": "frozen",
        "train.batch-size": 4,
        "train.local-steps": 1,
    }


if __name__ == "__main__":
    main()
