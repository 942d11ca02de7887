"""Small federations whose numbers are stored, so that a change of mathematics is seen.

    python -m tests.support.recordings    # writes recordings.json anew: after a change that is meant

Everything that decides a number is drawn by NumPy and computed in float64, and what is stored of an adapter
is the norm and the sum of its updates: other kernels and other CPUs give the same to about ten digits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedlora.config import to_toml
from fedlora.runs.folder import read_lines
from tests.support.runs import fedlora
from tests.support.tiny import WORDS, save_texts, save_tiny_language_model, save_tiny_model

FILE = Path(__file__).with_suffix(".json")
CLIENTS, ROUNDS = 5, 3
_COMMON: dict[str, Any] = {
    "data.name": "file",
    "federation.num-clients": CLIENTS,
    "federation.clients-per-round": 4,
    "engine.dtype": "float64",
    "engine.pack": 2,
    "train.batch-size": 4,
    "train.local-steps": 3,
    "train.learning-rate": 0.01,
    "rounds": ROUNDS,
    "method.rank": 3,
    "mos.budget": 2,
    "mos.shards": 2,
    "s2.sparsity": 0.001,
    "s2.orthogonality": 0.01,
}
_CLASSIFICATION: dict[str, Any] = {
    "train.schedule": "linear",
    "grid.strategy.name": [
        *("fedavg", "ffa-lora", "rolora", "fedsvd", "fedsa-lora", "local", "mos", "mos-personal"),
        *("s2-lora", "s2-frozen", "s2-cyclic", "s2-personal"),
    ],
}
_LANGUAGE: dict[str, Any] = {  # under DP, with seeded noise
    "task": "causal-lm",
    "data.partition": "iid",
    "privacy.mode": "dp",
    "privacy.noise-multiplier": 1.0,
    "privacy.seed": 5,
    "privacy.client-size": 20,
    "grid.strategy.name": ["fedavg", "ffa-lora", "fedsvd", "fedsa-lora", "mos", "s2-lora"],
}
_EXACT = ("round", "clients_ok", "clients_refused", "bytes_up", "bytes_down", "bytes_down_cached")
_RATIOS = ("accuracy", "exact_match", "sparsity")  # of counts, which rounding may move by one


def record() -> dict[str, Any]:
    """Run the federations, all of a task in one start; return their numbers by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        texts, pairs = save_texts(root / "texts.csv"), _save_pairs(root / "pairs.csv")
        for name, keys, model, data in (
            ("classification", _CLASSIFICATION, _classifier(root / "bert"), texts),
            ("language", _LANGUAGE, _language_model(root / "gpt2"), pairs),
        ):
            file = root / f"{name}.toml"
            flat = {**_COMMON, **keys, "model.name": model, "data.path": data, "run.dir": str(root), "run.name": name}
            file.write_text(to_toml(flat))
            done = fedlora("sweep", file)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            for row in pd.read_parquet(root / name / "results.parquet").to_dict("records"):
                found[f"{name} {row['strategy.name']}"] = _numbers(Path(row["folder"]))
    return found


def differences(stored: Mapping[str, Any], found: Mapping[str, Any], tolerance: float = 1e-7) -> list[str]:
    """Return the numbers that differ by more than rounding, with both values."""
    one, two = _flat(stored), _flat(found)
    different = [f"{key} is in one only" for key in sorted(one.keys() ^ two.keys())]
    for key in sorted(one.keys() & two.keys()):
        a, b, column = one[key], two[key], key.rpartition("/")[2]
        if a is None or b is None or column in _EXACT:
            same = a == b
        elif column.endswith(_RATIOS):
            same = abs(a - b) < 0.06
        else:
            same = bool(np.isclose(a, b, rtol=tolerance, atol=1e-3 * tolerance))
        if not same:
            different.append(f"{key} was {a} and is {b}")
    return different


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {key: one for name, part in value.items() for key, one in _flat(part, f"{path}/{name}").items()}
    return {path: value}


def _numbers(folder: Path) -> dict[str, Any]:
    """Return what a run came to: each round's metrics, and each adapter's size."""
    measured = ("accuracy", "loss", "perplexity", "exact_match", "sparsity", "epsilon")
    rounds = {
        str(line["round"]): {key: value for key, value in line.items() if key in _EXACT or key.endswith(measured)}
        for line in read_lines(folder / "metrics.jsonl")
    }
    files = sorted(folder.glob("adapter*/**/adapter_model.safetensors"))
    return {"rounds": rounds, "adapters": {file.parent.name: _size(load_file(file)) for file in files}}


def _size(weights: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Return norm and sum of an adapter's updates B A, which do not depend on the basis of A, and of its head."""
    updates = [b @ weights[name.replace("lora_B", "lora_A")] for name, b in weights.items() if "lora_B" in name]
    head = [value for name, value in weights.items() if "lora_" not in name]
    return {
        f"{what} {name}": float(function(np.concatenate([part.ravel() for part in parts])))
        for what, parts in (("update", updates), ("head", head))
        if parts
        for name, function in (("norm", np.linalg.norm), ("sum", np.sum))
    }


def _classifier(folder: Path) -> str:
    save_tiny_model(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    _drawn(model, folder)
    model.bert.save_pretrained(folder)  # without a head, which runs would start from
    return str(folder)


def _language_model(folder: Path) -> str:
    """Save a GPT-2: unlike Llama's, its norms compute in float64 where the model does."""
    save_tiny_language_model(folder)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 2, "eos_token_id": 2}
    config = transformers.GPT2Config(vocab_size=6 + len(WORDS), n_positions=64, n_embd=16, n_layer=2, n_head=2, **none)
    return _drawn(transformers.GPT2LMHeadModel(config), folder)


def _drawn(model: Any, folder: Path) -> str:
    """Save a model with weights that NumPy draws: torch's normal numbers depend on the CPU's vector unit."""
    generator = np.random.default_rng(0)
    with torch.no_grad():
        for _, value in sorted(model.named_parameters()):
            centre = 1.0 if value.dim() == 1 and float(value.mean()) == 1.0 else 0.0  # of a layer norm
            value.copy_(torch.from_numpy(centre + 0.15 * generator.standard_normal(tuple(value.shape))))
    model.save_pretrained(folder)
    return str(folder)


def _save_pairs(path: Path) -> str:
    generator = np.random.default_rng(1)
    lines = ["text,answer"]
    for _ in range(120):
        lines.append(f"{' '.join(generator.choice(WORDS, 5))},{' '.join(generator.choice(WORDS[:8], 3))}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
