"""``fedlora merge``: one PEFT adapter of several, and how well each does on a run's test rows.

The adapters are plain LoRAs of one base model: of runs, of clients, or of anybody else. What cannot be merged is
refused by what their files say, before any number is read.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from fedlora import plugins
from fedlora.config import ConfigError
from fedlora.data import Table, load_corpus
from fedlora.lora_files import same_base
from fedlora.merging import RULES, Rule
from fedlora.methods.products import product_norm, stack
from fedlora.reports.run import Run
from fedlora.storage import check_can_write, writing
from fedlora.tasks import TASKS
from simulations.merge_sources import Source, check_alike
from simulations.push import TOKENIZER

_DENSITY = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedlora merge``."""
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder of the merged adapter")
    parser.add_argument(
        "--adapters", type=Path, nargs="+", required=True, metavar="FOLDER", help="PEFT LoRA folders, or run folders"
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="how much each counts (default: all the same)"
    )
    parser.add_argument("--by", default="weighted", metavar="RULE", help=f"{', '.join(RULES)} (default: weighted)")
    parser.add_argument("--rank", type=int, metavar="K", help="with svd and lego (default: the largest of each layer)")
    parser.add_argument(
        "--density", type=float, metavar="D", help=f"what pruning keeps, with ties and dare (default: {_DENSITY})"
    )
    parser.add_argument("--run", type=Path, metavar="RUN", help="measure all of them on this run's test rows")


def run_merge(options: argparse.Namespace, console: Console) -> int:
    """Merge adapters, and print what became of them.

    Raises:
        ValueError: They cannot be merged so; nothing was written.
    """
    rule = RULES[options.by]
    sources = [Source.read(path.expanduser().resolve()) for path in options.adapters]
    shares = _shares(options.weights, len(sources))
    check_alike(sources)
    numbers = _numbers(rule, options, sources)
    out = options.out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already; name a new folder for the merged adapter.")
    check_can_write(out)
    measured = _measured(options.run, sources[0]) if options.run else None
    scores = _merge(out, rule, numbers, sources, shares, measured, console)
    if measured:
        console.print(_comparison(measured[0], [*options.adapters, options.out], scores))
    return 0


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Return the share of each adapter; they sum to 1."""
    given = list(weights or [1.0] * count)
    if len(given) != count:
        raise ConfigError(f"--weights: there are {len(given)} of them, and {count} adapters; give one an adapter.")
    if not all(0 < one < np.inf for one in given):
        raise ConfigError(f"--weights {' '.join(f'{one:g}' for one in given)}: each must be above 0.")
    return [one / sum(given) for one in given]


def _numbers(rule: Rule, options: argparse.Namespace, sources: Sequence[Source]) -> dict[str, float]:
    """Return what the rule takes for each layer, in the order of the layers' names."""
    for key in ("rank", "density"):
        if getattr(options, key) is not None and rule.takes != key:
            fitting = ", ".join(name for name in RULES if RULES[name].takes == key)
            raise ConfigError(f"--{key} goes with --by {fitting}, not with {options.by}.")
    layers = sorted({layer for one in sources for layer in one.layers})
    ranks = {layer: [one.layers[layer][0][0] if layer in one.layers else 0 for one in sources] for layer in layers}
    if rule.takes == "density":
        density = _DENSITY if options.density is None else options.density
        if not 0 < density < 1:
            raise ConfigError(f"--density {density:g}: must be above 0 and below 1.")
        for layer, found in ranks.items():
            if len(set(found)) > 1:
                raise ConfigError(
                    f"--by {options.by}: {layer} has the ranks {', '.join(map(str, found))}, and this rule needs the "
                    "same in all adapters; merge by svd or lego."
                )
        return dict.fromkeys(layers, density)
    most = max(map(sum, ranks.values()))
    if options.rank is not None and not 1 <= options.rank <= most:
        raise ConfigError(
            f"--rank {options.rank}: must be at least 1, and at most {most}, the ranks of a layer in all adapters."
        )
    return {layer: min(options.rank or max(found), sum(found)) for layer, found in ranks.items()}


def _measured(path: Path, first: Source) -> tuple[Run, Table]:
    """Return the run whose test rows adapters are measured on, with the rows."""
    run = Run.read(path.expanduser().resolve())
    plugins.load(run.config.run.plugins)
    rows = load_corpus(run.config).splits.get("test")
    if rows is None:
        raise ConfigError(f"--run {path}: it has no test rows; name a run that has, with eval.test = true.")
    from fedlora.models.names import model_path  # and with it torch: all else has been refused by now

    base = model_path(run.config.model.name)
    if not same_base(base, first.base):
        raise ConfigError(f"--run {path}: its base model is {base}, and the adapters' {first.base}.")
    return run, rows


def _merge(
    out: Path,
    rule: Rule,
    numbers: Mapping[str, float],
    sources: Sequence[Source],
    shares: Sequence[float],
    measured: tuple[Run, Table] | None,
    console: Console,
) -> list[dict[str, float]]:
    """Merge, write and check; return the metrics of each adapter, and of the merged one."""
    import torch

    from fedlora.runs.export_check import ExportError
    from fedlora.runs.merged import check_written, write_adapter

    loaded = [one.load() for one in sources]
    scores = [_score(measured, one.folder) for one in sources]  # first, since what does not fit is seen here
    merged, off, norm = {}, 0.0, 0.0
    torch.manual_seed(0)  # what DARE draws
    for layer, number in numbers.items():
        held = [(share, one[layer]) for share, (one, _) in zip(shares, loaded, strict=True) if layer in one]
        own, parts = [one for _, one in held], [share for share, _ in held]
        merged[layer] = rule.merge(own, parts, number)
        (a, b), (mean_a, mean_b) = merged[layer], stack(own, parts)
        off += product_norm(np.concatenate([a, mean_a]), np.concatenate([b, -mean_b], 1)) ** 2
        norm += product_norm(mean_a, mean_b) ** 2
    others = {
        name: np.sum([share * rest[name] for share, (_, rest) in zip(shares, loaded, strict=True)], axis=0)
        for name in sources[0].others
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        wide = any(one.wide for one in sources)
        write_adapter(out, merged, others, sources[0].about, torch.float64 if wide else torch.float32)
        for name in TOKENIZER:
            if (sources[0].folder / name).is_file():
                shutil.copyfile(sources[0].folder / name, out / name)
    try:
        check_written(out, merged)
    except ExportError:
        shutil.rmtree(out)  # it was not there before, and the next try would be refused
        raise
    ranks = sorted({len(a) for a, _ in merged.values()})
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    console.print(f"merged {len(sources)} adapters: {len(merged)} layers of rank {span} in {out}", markup=False)
    console.print(f"off from the mean of their products by {(off / norm) ** 0.5 if norm else 0.0:.2g}", markup=False)
    return [*scores, _score(measured, out)]


def _score(measured: tuple[Run, Table] | None, folder: Path) -> dict[str, float]:
    """Return the metrics of an adapter on the test rows; nothing where there are none."""
    if measured is None:
        return {}
    from simulations.try_adapter import Adapted

    run, rows = measured
    return Adapted.load(run, folder).metrics(rows)


def _comparison(run: Run, folders: Sequence[Path], scores: Sequence[Mapping[str, float]]) -> RichTable:
    """Return a table of the adapters' metrics, the merged one's last."""
    from rich.markup import escape

    table = RichTable(show_edge=False)
    table.add_column("on the test rows", overflow="fold")
    columns = list(dict.fromkeys([TASKS[run.config.task].measure.name, "loss"]))
    for column in columns:
        table.add_column(column, justify="right")
    for folder, score in zip(folders, scores, strict=True):
        table.add_row(escape(str(folder)), *(f"{score[column]:.4f}" for column in columns))
    return table
