"""The tables of docs/ are what their command makes, and hold what the strategies promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from strategies import STRATEGIES
from tools import comparison_tables, learning_rates, method_tables, performance_tables, strategy_tables
from tools.markdown import with_tables
from tools.strategy_tables import METHODS, MODELS, bytes_up, layers_of

ROOT = Path(__file__).parents[1]


def test_tables_are_made_by_their_command() -> None:
    pages = {
        "strategies": strategy_tables.TABLES,
        "methods": method_tables.TABLES,
        "comparison": comparison_tables.OVERVIEW,
        "comparison_details": comparison_tables.DETAILS,
        "learning_rates": learning_rates.TABLES,
        "performance": performance_tables.TABLES,
    }
    for page, tables in pages.items():
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert with_tables(text, tables) == text, "run `make tables`"


def test_every_strategy_and_method_is_in_them() -> None:
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    for name in STRATEGIES:
        assert all(f"| `{name}` | `{method}` |" in text for method in STRATEGIES[name].methods)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}`" in text for name in METHODS)


@pytest.mark.parametrize("model", MODELS)
def test_promised_shares(model: str) -> None:
    """Of LoRA of rank 8: FFA half for square layers, MoS with e = 1 an eighth, s alone a hundredth."""
    lora, mos, s2 = METHODS["lora"][0][1], METHODS["mos"][1][1], METHODS["s2-lora"][0][1]
    whole = bytes_up("fedavg", lora, model)
    square = all(layer.d_in == layer.d_out for layer in layers_of(model))
    share = bytes_up("ffa-lora", lora, model) / whole
    assert share == 0.5 if square else abs(share - 0.5) < 0.05
    assert bytes_up("mos", mos, model) / whole == 1 / 8
    assert bytes_up("s2-frozen", s2, model) / whole < 1 / 100


def test_known_sizes() -> None:
    """Numbers of the papers: LoRA of rank 8 on RoBERTa-large and LLaMA-2-7B."""
    lora = METHODS["lora"][0][1]
    assert bytes_up("fedavg", lora, "RoBERTa-large q,v") == 4 * 786_432
    assert bytes_up("fedavg", lora, "Llama-2-7B q,v") == 4 * 4_194_304
    assert bytes_up("fedavg", lora, "Llama-2-7B all") == 4 * 19_988_480
    assert bytes_up("ffa-lora", lora, "Llama-2-7B all") == 4 * 10_878_976
