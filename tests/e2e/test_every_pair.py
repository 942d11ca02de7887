"""Every strategy on every method that it goes with, in one real sweep under Flower, with and without DP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedlora.config import Config, to_toml
from fedlora.methods import METHODS
from fedlora.plugins import methods_of
from strategies import STRATEGIES
from tests.support.matrix import CONFIGS
from tests.support.runs import fedlora
from tests.support.trainers import tiny_flat

pytestmark = pytest.mark.e2e

_DEFAULTS = Config().to_flat()
_PRIVACY = {
    "none": {"privacy.mode": "none"},
    "dp": {"privacy.mode": "dp", "privacy.epsilon": 8.0, "privacy.client-size": 8, "strategy.weights": "equal"},
}


def cases() -> dict[str, dict[str, Any]]:
    """Keys of each case, by its name: pairs, ranks by client, where LoRA starts, how its gradient is taken."""
    found: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        for method in methods_of(strategy):
            small = {key: value for key, value in CONFIGS[method].to_flat().items() if value != _DEFAULTS.get(key)}
            found[f"{strategy} on {method}"] = {**small, "strategy.name": strategy, "method.name": method}
        if STRATEGIES[strategy].ragged:
            found[f"{strategy}, ranks by client"] = {"strategy.name": strategy, "method.ranks": "1,2,1,2"}
    for init in ("orthonormal", "pissa", "lora-ga"):
        found[init] = {"strategy.name": "fedavg", "method.init": init}
    for gradient in ("lora-pro", "allora"):
        found[gradient] = {"strategy.name": "fedavg", "train.gradient": gradient}
    found["lora+"] = {"strategy.name": "fedavg", "train.b-rate-ratio": 16.0}
    return found


@pytest.mark.slow
def test_all_of_them_run(tmp_path: Path) -> None:
    flat = tiny_flat(tmp_path, **{"run.dir": str(tmp_path / "runs"), "engine.dtype": "float32", "lisa.blocks": 1})
    chosen = cases()
    chosen["lora-ga"]["data.public-path"] = flat["data.path"]
    file = tmp_path / "pairs.toml"
    tables = "".join("[[cases.what]]\n" + to_toml({"name": name, **keys}) for name, keys in chosen.items())
    tables += "".join("[[cases.privacy]]\n" + to_toml({"name": name, **keys}) for name, keys in _PRIVACY.items())
    file.write_text(to_toml(flat) + tables)
    done = fedlora("sweep", file, timeout=600)
    results = pd.read_parquet(tmp_path / "runs/pairs/results.parquet")
    assert len(results) == 2 * len(chosen), done.stdout[-2000:] + done.stderr[-2000:]
    failed = results[results["status"] != "ok"]
    assert failed.empty, failed[["data.what", "privacy", "error"]].to_string()
    for name, folder in zip(results["data.what"], map(Path, results["folder"]), strict=True):
        keys = chosen[name]
        method = keys.get("method.name", STRATEGIES[keys["strategy.name"]].methods[0])
        exported = any(folder.rglob("adapter_model.safetensors"))
        assert exported != bool(METHODS[method].no_adapter), name
