"""Writes the table of ``docs/methods.md`` (``make tables``): what each method trains, sends and costs, and how it did.

Sizes and exactness are computed from methods and strategies on models' shapes. A step's cost is from
``benchmarks/results/engine/methods/``, in each file of which is LoRA's, too; accuracies are the final cells of
``simulations/sweeps/methods.toml`` and ``methods-public.toml`` on SST-2, in
``benchmarks/results/comparison/methods-sst2.csv``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from benchmarks.engine.packed import OWN_RANKS
from fedlora.config import Config
from fedlora.methods import METHODS, Method, build_method, count_parameters, zero_kinds
from fedlora.plugins import methods_of, usual_strategy
from fedlora.reports.format import human_bytes
from fedlora.reports.paired import paired_differences
from fedlora.strategy import Strategy
from strategies import STRATEGIES
from tools.comparison_tables import RESULTS, ranked
from tools.markdown import Table, rewrite
from tools.performance_results import RESULTS as ENGINE
from tools.performance_results import lines_of
from tools.strategy_tables import METHODS as CONFIGS
from tools.strategy_tables import bytes_up, layers_of, strategy_on

STEPS = ENGINE / "methods"
MODELS = ("MiniLM q,v", "RoBERTa-large q,v", "Llama-2-7B q,v")
_ORDERS = {1: "linear", 2: "a product", 3: "of three"}


def methods_table() -> list[str]:
    """Return a line for each method, at the rank that it is meant for, as Markdown lines."""
    steps = _steps()
    columns = ["method", "strategy", "trained", "fixed", *MODELS]
    columns += ["in what is trained", "exact under", "step", "DP step"]
    lines = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |" + " ---: |" * 3 + " --- | --- | ---: | ---: |"]
    for name in sorted(METHODS, key=lambda name: (name != "lora", name)):
        own = usual_strategy(name)
        for label, config in CONFIGS[name]:
            method = build_method(config, layers_of(MODELS[0]), [])
            strategy = strategy_on(own, method)
            trained = sorted(strategy.trained_kinds)
            fixed = sorted({spec.kind for spec in method.specs().values()} - set(trained))
            cells = [label, f"`{own}`", ", ".join(trained), ", ".join([*fixed, *_drawn(method)]) or "-"]
            cells += [_size(own, config, model) for model in MODELS]
            cells += [_order(strategy), ", ".join(f"`{one}`" for one in _exact_under(name, method)) or "-"]
            measured = config.method.rank == OWN_RANKS.get(name, 8)
            lines.append(f"| {' | '.join([*cells, *(steps.get(name, ('', '')) if measured else ('', ''))])} |")
    return lines


def accuracy_table() -> list[str]:
    """Return what was measured on SST-2, seed by seed beside the best and beside LoRA, as Markdown lines."""
    cells = pd.read_csv(RESULTS / "comparison" / "methods-sst2.csv")
    columns = ["method", "learning rate", "test accuracy", "less the best", "95 % interval", "verdict", "less `lora`"]
    lines = [
        f"| {' | '.join([*columns, 'sent by clients'])} |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |",
    ]
    lora = cells[cells["method"] == "lora"].set_index("seed")["test_accuracy"]
    differences = paired_differences(cells, ["method"], "test_accuracy")
    for name, rows, beside in ranked(cells, differences, "method", "test_accuracy"):
        less = (rows.set_index("seed")["test_accuracy"] - lora).mean()
        line = [f"`{name}`", f"`{rows['rate'].iloc[0]:g}`", *beside, "" if name == "lora" else f"{less:+.4f}"]
        lines.append(f"| {' | '.join([*line, human_bytes(rows['bytes_up'].mean())])} |")
    return lines


def _size(strategy: str, config: Config, model: str) -> str:
    """Return the numbers that a client trains, and the bytes that it sends in a round."""
    method = build_method(config, layers_of(model), [])
    trained = strategy_on(strategy, method).trained_kinds
    count = count_parameters({name: spec for name, spec in method.specs().items() if spec.kind in trained})
    return f"{count:,} ({human_bytes(bytes_up(strategy, config, model))})"


def _drawn(method: Method) -> list[str]:
    """Return what a method draws from the seed beside its tensors, in words."""
    return ["bases or indices from the seed"] if method.constants() else []


def _order(strategy: Strategy) -> str:
    """Return in how many trained factors an update is: noise on them enters it as often."""
    trained = {name: spec for name, spec in strategy.setting.specs.items() if spec.kind in strategy.trained_kinds}
    if not all(spec.linear for spec in trained.values()):
        return "not linear"
    return _ORDERS[max(len({kind[0] for kind in kinds}) for kinds in zero_kinds(trained).values())]


def _exact_under(name: str, method: Method) -> list[str]:
    """Return the strategies whose mean is that of the updates."""
    return [one for one in STRATEGIES if name in methods_of(one) and strategy_on(one, method).exact]


def _steps() -> dict[str, tuple[str, ...]]:
    """Return each method's client-step on a GPU by LoRA's in the same run, without privacy and with it."""
    lines = [
        line for line in lines_of("train", folder=STEPS) if line["way"] == "fedlora" and line["gpu"] and "ms" in line
    ]
    times = {(line["run"], line["method"], line["dp"]): line["ms"] for line in lines}
    found: dict[str, dict[bool, str]] = {"lora": {False: "1", True: "1"}}
    for (run, name, dp), ms in times.items():
        if name != "lora":
            found.setdefault(name, {})[dp] = f"{ms / times[run, 'lora', dp]:.2f}"
    return {name: tuple(by_dp.get(dp, "") for dp in (False, True)) for name, by_dp in found.items()}


TABLES: dict[str, Table] = {"methods": methods_table, "accuracy": accuracy_table}


def main(root: str) -> None:
    """Rewrite the tables of the project in the folder ``root``."""
    rewrite(Path(root) / "docs" / "methods.md", TABLES)


if __name__ == "__main__":
    main(sys.argv[1])
