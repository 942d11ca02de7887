"""The console command ``fedlora``: what ``flwr`` lacks, and never a second way to configure things.

What takes seconds to import (torch, transformers, pandas) is imported by the subcommands that need it, so that the
others answer at once.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from fedlora.config import Config, ConfigError
from fedlora.runs.folder import RunFolder, run_path
from fedlora.runs.lock import held, refuse_held
from fedlora.storage import StorageError, check_can_write, write_whole, writing
from simulations import merge, plan_words, push, try_adapter
from simulations.advice import check_can_suggest, suggest
from simulations.cluster import check_options
from simulations.exits import exit_with
from simulations.launch import SUPERNODES, end_abandoned, launch, own_cores, run_side_by_side
from simulations.options import absolute_paths, for_tuning, read_options, read_overrides
from simulations.preflight import Preflight, preflight
from simulations.setup import resolve, settle
from strategies import STRATEGIES

if TYPE_CHECKING:
    from simulations.sweeps.cells import Share
    from simulations.sweeps.file import Sweep

_TRIED = 5000  # rows of a split that are tokenized before a run; a plan tokenizes all


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 when all went well, 1 when a run failed, 2 when the input cannot work."""
    exit_with(lambda console: run(arguments, console))


def run(arguments: Sequence[str] | None, console: Console, others: Mapping[str, str] | None = None) -> int:
    """Run a subcommand and return its exit code.

    Args:
        arguments: The command line.
        console: Where its words go.
        others: Subcommands that stand elsewhere, with what they are for.
    """
    parser = argparse.ArgumentParser(prog="fedlora", description="Federated fine-tuning of low-rank adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("run", help="like `flwr run --stream`, with a truthful exit code and no process left")
    plan = commands.add_parser("plan", help="what a run would do and send, without training")
    audit = commands.add_parser("audit", help="whether training does what its epsilon assumes, on the run's own model")
    audit.add_argument("--statistical", action="store_true", help="attacks, too: epsilon as it is seen, from below")
    tune = commands.add_parser("tune", help="looks for the learning rate, on dev rows, within a stated time")
    tune.add_argument("--minutes", type=float, default=10.0, metavar="N", help="the most that it takes (default: 10)")
    for command in (start, plan, audit, tune):
        command.add_argument("app", nargs="?", default=".", help="folder of the app (default: this one)")
        command.add_argument("-c", "--run-config", action="append", default=[], help='"key=value ..." or a .toml file')
    plan.add_argument("--suggest", action="store_true", help="under DP: rounds, batch, steps and rate that would learn")
    plan.add_argument("--compare", action="store_true", help="the same run under every strategy and method")
    plan.add_argument(
        "--sweep", type=Path, metavar="FILE", help="of a sweep: its cells, and seeds that a difference needs"
    )
    start.add_argument("--federation-config", action="append", default=[], help="as for `flwr run`")
    start.add_argument("superlink", nargs="?", help=argparse.SUPPRESS)
    start.add_argument("--federation", help=argparse.SUPPRESS)
    start.add_argument("--stream", action="store_true", help="accepted as for `flwr run`; always on")
    sweep = commands.add_parser("sweep", help="a grid of runs in one process, with one table at the end")
    sweep.add_argument("file", type=Path, help="a run configuration with the tables [grid] and [tune]")
    sweep.add_argument("app", nargs="?", default=".", help="folder of the app (default: this one)")
    sweep.add_argument("-c", "--run-config", action="append", default=[], help='"key=value ...", over the file')
    sweep.add_argument("--federation-config", action="append", default=[], help="as for `flwr run`")
    sweep.add_argument("--workers", type=int, default=1, metavar="N", help="processes side by side, on all GPUs")
    sweep.add_argument(
        "--in-process", action="store_true", help="each process trains by itself, without Flower: faster for short runs"
    )
    sweep.add_argument(
        "--together", type=int, default=1, metavar="N", help="seeds whose clients train in one pack, with --in-process"
    )
    sweep.add_argument("--share", default="", help=argparse.SUPPRESS)
    sweep.add_argument("--gpu-share", type=float, default=1.0, help=argparse.SUPPRESS)
    report = commands.add_parser("report", help="tables and plots of a run, or of several side by side")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    report.add_argument("--html", type=Path, metavar="FILE", help="write one page that needs no other file")
    try_adapter.add_arguments(commands.add_parser("try", help="what a run's adapter answers to a text"))
    merge.add_arguments(commands.add_parser("merge", help="one adapter of several, and how well each does"))
    push.add_arguments(commands.add_parser("push", help="a run's adapter and its card to the Hugging Face hub"))
    for name, text in (others or {}).items():
        commands.add_parser(name, help=text)
    options = parser.parse_args(arguments)
    match options.command:
        case "report":
            return _report(options.runs, options.html, console)
        case "sweep":
            return _sweep(options, console)
        case "try":
            return try_adapter.run_try(options, console)
        case "merge":
            return merge.run_merge(options, console)
        case "push":
            return push.run_push(options, console)
        case _:
            return _configured(options, console)


def _configured(options: argparse.Namespace, console: Console) -> int:
    if options.command == "run" and (options.superlink or options.federation):
        raise ConfigError(
            "fedlora run starts a simulation on this machine, with a SuperLink of its own; for another one use "
            f"`{shlex.join(filter(None, ['flwr', 'run', options.app, options.superlink, '--stream']))}`."
        )
    app = Path(options.app).expanduser().resolve()
    if options.command == "plan" and options.sweep:
        if options.suggest or options.compare:
            raise ConfigError("fedlora plan --sweep does not go with --suggest and --compare, which are of one run.")
        from simulations.sweeps.plan import show_sweep

        show_sweep(_read_sweep(options.sweep, app, options.run_config), console)
        return 0
    overrides = absolute_paths(read_overrides(app, options.run_config))
    if options.command == "audit" and overrides["privacy.mode"] == "none":
        overrides |= {"privacy.mode": "dp", "privacy.noise-multiplier": 1.0}
    config = resolve(for_tuning(overrides) if options.command == "tune" else overrides)
    if config.federation.sites:
        raise ConfigError(
            f"federation.sites = {config.federation.sites!r}: the sites of a deployment are asked by its coordinator; "
            "use `fedlora deploy run coordinator.toml`."
        )
    if options.command == "plan":
        return _plan(config, options, console)
    if options.command == "audit":
        return _audit(config, console, attacks=options.statistical)
    if options.command == "tune":
        return _tune(config, options, console)
    check_options(options.federation_config)
    end_abandoned(run_path(config))
    RunFolder.check(config, STRATEGIES[config.strategy.name].laid_out(config))
    tried = Preflight(SUPERNODES, rows=_TRIED)
    tried.quick(config)
    return launch(app, overrides, options.federation_config, console, lambda: tried.plan(config))


def _sweep(options: argparse.Namespace, console: Console) -> int:
    """Check every cell, then run them under Flower; start again where the process died, with the next cell."""
    from simulations.sweeps.cells import Share
    from simulations.sweeps.check import check_cells
    from simulations.sweeps.tables import finish

    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be at least 1.")
    if options.in_process and options.federation_config:
        raise ConfigError("--federation-config is for Flower, and --in-process runs without it; leave one of them out.")
    if options.together < 1 or (options.together > 1 and not options.in_process):
        raise ConfigError(f"--together {options.together}: must be 1 or more, and goes with --in-process.")
    check_options(options.federation_config, options.workers)
    app = Path(options.app).expanduser().resolve()
    sweep = _read_sweep(options.file, app, options.run_config, check=not options.share)
    file = sweep.folder / "sweep.toml"
    if options.share:  # one of several processes, see below
        return _run_share(sweep, Share.read(options.share), app, file, options, console)
    refuse_held(sweep.folder)
    check_can_write(sweep.folder)
    check_cells(sweep, Preflight(SUPERNODES, rows=_TRIED), console)
    console.print(f"{sweep.size()} cells in {sweep.folder}", markup=False)
    with writing(sweep.folder):
        sweep.folder.mkdir(parents=True, exist_ok=True)
    with held(sweep.folder):
        sweep.begin()
        for cell in sweep.folder.glob("cells/*"):
            end_abandoned(cell)
        write_whole(file, sweep.to_toml().encode())
        workers = min(options.workers, len(sweep.groups()))
        try:
            if workers == 1:
                _run_share(sweep, Share(), app, file, options, console)
            elif options.in_process:
                run_side_by_side(app, file, workers, [], sweep.again(workers), options.together)
            else:
                run_side_by_side(app, file, workers, options.federation_config)
        finally:
            shutil.rmtree(sweep.rows, ignore_errors=True)
        finish(sweep, console)
    return 1 if sweep.unfinished() else 0


def _read_sweep(file: Path, app: Path, run_config: Sequence[str], *, check: bool = True) -> Sweep:
    """Return a sweep with the paths in it absolute."""
    from simulations.sweeps.file import Sweep

    asked = Sweep.read(str(file), read_overrides(app, []), read_options(run_config), check=check)
    grid = {key: [absolute_paths({**asked.base, key: value})[key] for value in asked.grid[key]] for key in asked.grid}
    cases = {
        column: [replace(case, values=_absolute(case.values, asked.base)) for case in listed]
        for column, listed in asked.cases.items()
    }
    return replace(asked, base=absolute_paths(asked.base), grid=grid, cases=cases)


def _absolute(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a case with paths from this folder."""
    whole = absolute_paths({**base, **values})
    return {key: whole[key] for key in values}


def _run_share(sweep: Sweep, share: Share, app: Path, file: Path, options: argparse.Namespace, console: Console) -> int:
    """Run a share of a sweep under Flower, or in this process; again where Flower's died elsewhere than last time."""
    if options.in_process:
        from simulations.side_by_side import cells_in_process
        from simulations.sweeps.progress import run_share

        threads = max(1, own_cores() // share.of)
        run_share(sweep, cells_in_process(threads, options.together, sweep.rows, options.gpu_share), console, share)
        return 0
    flat = {**sweep.base, "run.sweep": str(file), "run.share": str(share)}
    before = None
    while (now := sweep.state(share)) != before:
        before = now
        if launch(app, flat, options.federation_config, console) == 0:
            return 0
    return 1


def _audit(config: Config, console: Console, *, attacks: bool) -> int:
    """Check the training path under DP, on request by attacks on what it releases, too."""
    from simulations.audit import audit, show

    config, data = settle(config, SUPERNODES)
    if len(data.clients) < 2:
        raise ConfigError("fedlora audit compares clients with each other: federation.num-clients must be at least 2.")
    findings = audit(config, data, attacks=attacks)
    show(findings, console)
    failed = [finding for finding in findings if not finding.passed]
    console.print(f"{len(findings) - len(failed)} of {len(findings)} checks hold")
    if config.local.term != "none" or config.method.ranks:
        console.print("note: local.term and method.ranks were left out: clients of method.rank without local terms")
    return 1 if failed else 0


def _plan(config: Config, options: argparse.Namespace, console: Console) -> int:
    """Print what a run would do and send; on request schedules under DP that would learn."""
    if options.suggest:
        check_can_suggest(config)
    plan, structure = preflight(config, SUPERNODES)
    plan_words.show(plan, console)
    from simulations.compare import show_alternatives, trained_by_strategy  # and with it torch: nothing is refused here

    if plan.privacy is not None:
        trained = trained_by_strategy(plan, structure)
        plan.privacy.show(console, trained)
        if options.suggest:
            suggest(plan.privacy, trained, _asked(options), console)
    if options.compare:
        show_alternatives(plan, structure, console)
    return 0


def _tune(config: Config, options: argparse.Namespace, console: Console) -> int:
    """Look for the learning rate of a run."""
    from simulations.tune import tune

    RunFolder.check(config)
    plan, _ = preflight(config, SUPERNODES, rows=_TRIED)
    return tune(plan, options.minutes, shlex.join(_asked(options)), console)


def _asked(options: argparse.Namespace) -> list[str]:
    """Return the command that runs what was planned, word by word."""
    app = [] if options.app == "." else [options.app]
    return ["fedlora", "run", *app, *(word for one in options.run_config for word in ("-c", one))]


def _report(paths: Sequence[Path], page: Path | None, console: Console) -> int:
    """Print a run's tables, or a comparison of several, and write plots, summaries and the page."""
    from fedlora.reports.comparison import comparison_table, paired_comparison
    from fedlora.reports.html import html_page
    from fedlora.reports.run import Run
    from fedlora.reports.summary import write_report
    from fedlora.reports.tables import metrics_table, outcome_table

    runs = [Run.read(path.resolve()) for path in paths]
    if len(runs) > 1:
        console.print(comparison_table(runs))
        for line in paired_comparison(runs):
            console.print(line, markup=False)
    for run in runs:
        if len(runs) == 1:
            console.print(metrics_table(run))
            console.print(outcome_table(run) if run.result else "the run did not finish")
            console.print(f"privacy: {run.privacy['guarantee']}", markup=False)
        try:
            write_report(run)
        except StorageError as error:  # another user's run, or a full disk
            console.print(f"note: no plots and summary: {error}", markup=False)
        else:
            console.print(f"plots and summary: {run.path}", markup=False)
    if page is not None:
        write_whole(page.resolve(), html_page(runs).encode())
        console.print(f"page: {page.resolve()}", markup=False)
    return 0 if all(run.result for run in runs) else 1


if __name__ == "__main__":
    main()
