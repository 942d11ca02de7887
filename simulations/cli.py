"""The console command ``fedlora``: what ``flwr`` lacks, and never a second way to configure things."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from fedlora.config import Config, ConfigError, Scalar
from fedlora.data import CORPORA
from simulations.setup import build_strategy, resolve

_PAIR = re.compile(r"""\S+?=('[^']*'|"[^"]*"|\S+)""")  # what Flower finds in an option; the rest it drops


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 when all went well, 1 when a run failed, 2 when the input cannot work."""
    parser = argparse.ArgumentParser(prog="fedlora", description="Federated fine-tuning of low-rank adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="like `flwr run --stream`, with a truthful exit code and no process left")
    plan = commands.add_parser("plan", help="what a run would do and send, without training")
    for command in (run, plan):
        command.add_argument("app", nargs="?", default=".", help="folder of the app (default: this one)")
        command.add_argument("-c", "--run-config", action="append", default=[], help='"key=value ..." or a .toml file')
    run.add_argument("--federation-config", action="append", default=[], help="as for `flwr run`")
    run.add_argument("superlink", nargs="?", help=argparse.SUPPRESS)
    run.add_argument("--federation", help=argparse.SUPPRESS)
    run.add_argument("--stream", action="store_true", help="accepted as for `flwr run`; always on")
    report = commands.add_parser("report", help="table and plots of a finished run")
    report.add_argument("run", type=Path, help="a run folder")
    options = parser.parse_args(arguments)
    console = Console(width=100, highlight=False, soft_wrap=True)
    try:
        code = _report(options.run, console) if options.command == "report" else _configured(options, console)
    except ValueError as error:
        console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        code = 2
    except KeyboardInterrupt:
        console.print("fedlora: interrupted; nothing was left running", markup=False)
        code = 130
    sys.exit(code)


def _configured(options: argparse.Namespace, console: Console) -> int:
    if options.command == "run" and (options.superlink or options.federation):
        raise ConfigError(
            "fedlora run starts a simulation on this machine, with a SuperLink of its own; for another one use "
            f"`flwr run {options.app} {options.superlink or ''} --stream`."
        )
    app = Path(options.app).expanduser().resolve()
    overrides = absolute_paths(read_overrides(app, options.run_config))
    config = resolve(overrides)
    if options.command == "plan":
        return _plan(config, console)
    from simulations.launch import launch

    CORPORA[config.data.name](config.data, config.seed)  # what is wrong with the data, before Flower starts
    return launch(app, overrides, options.federation_config, console)


def read_overrides(app: Path, run_config: Sequence[str]) -> dict[str, Scalar]:
    """Return the app's own configuration with the ``--run-config`` options over it, by dotted key.

    Flower merges repeated options by section, so that of ``-c train.a=1 -c train.b=2`` only the second
    survives, and drops what it cannot read; here each option counts and must be readable.

    Raises:
        ConfigError: There is no app in the folder, or an option cannot be read.
    """
    import click
    from flwr.common.config import get_fused_config_from_dir, parse_config_args

    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{app} holds no pyproject.toml; run from the checkout of fedlora, or name its folder.")
    overrides: dict[str, Any] = {}
    for option in run_config:
        try:
            found = parse_config_args([option])
        except (click.ClickException, OSError, ValueError) as error:
            reason = error.message if isinstance(error, click.ClickException) else str(error)
            raise ConfigError(f"--run-config {option!r} cannot be read: {reason}") from error
        unread = "" if option.endswith(".toml") else _PAIR.sub("", option).strip()
        if unread or not found:
            raise ConfigError(
                f"--run-config {option!r}: cannot read {unread or 'anything'!r}; write key=value without spaces around "
                "the sign, and texts in quotes: key='text'."
            )
        overrides |= found
    try:
        defaults = get_fused_config_from_dir(app, {})
    except KeyError as error:
        raise ConfigError(f"{app / 'pyproject.toml'} is not a Flower app: it has no {error} table.") from error
    return {**defaults, **overrides}


def absolute_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with paths from this folder: the run itself starts in Flower's."""
    flat = dict(flat)
    for key in ("run.dir", "data.path", "data.test-path", "model.name"):
        value = flat.get(key)
        if not isinstance(value, str) or not value:
            continue
        path = Path(value).expanduser()
        if key != "model.name" or path.is_dir():
            flat[key] = str(path.resolve())
    return flat


def _plan(config: Config, console: Console) -> int:
    """Print what a run would do and send."""
    from fedlora.data import load_federated
    from fedlora.methods import build_method, count_parameters
    from fedlora.models import inspect_by_name
    from fedlora.roles import Role, with_role
    from fedlora.runs.report import clients_table, human_bytes
    from fedlora.wire import payload_bytes

    num_clients = config.federation.num_clients or 2  # one per SuperNode, of which Flower starts two by default
    data = load_federated(config, num_clients)
    console.print(clients_table(list(data.corpus.classes), data.label_counts().tolist()))
    structure = inspect_by_name(config.model.name, len(data.corpus.classes), config.method.target_modules)
    specs = build_method(config.method, structure.adapted, structure.head).specs()
    strategy = build_strategy(config, specs)
    roles = strategy.all_roles(1)
    table = RichTable(
        title=f"{config.strategy.name} / {config.method.name} on {config.model.name} ({structure.family})"
    )
    for column in ("kind", "role", "tensors", "parameters", "bytes up", "bytes down"):
        table.add_column(column, justify="left" if column in ("kind", "role") else "right")
    dtype = config.engine.tensor_dtype
    up_total = down_total = 0
    for kind, role in roles.items():
        own = {name: spec for name, spec in specs.items() if spec.kind == kind}
        up = payload_bytes(with_role(own, roles, Role.SHARED), dtype)
        down = payload_bytes(with_role(own, roles, Role.SHARED, Role.BROADCAST), dtype)
        up_total, down_total = up_total + up, down_total + down
        parameters = count_parameters(own)
        table.add_row(kind, str(role), str(len(own)), f"{parameters:,}", f"{up:,}", f"{down:,}")
    console.print(table)
    personal = Role.PRIVATE in roles.values()
    sampled = config.federation.clients_per_round or num_clients
    rows = [len(data.training_rows(client)) for client in range(num_clients)]
    per_epoch = [-(-count // config.train.batch_size) for count in rows]
    steps = [config.train.local_steps or config.train.local_epochs * count for count in per_epoch]
    trained = count_parameters(with_role(specs, roles, Role.SHARED, Role.PRIVATE))
    lines = [
        f"base model: {structure.num_parameters:,} parameters, {len(structure.adapted)} adapted layers, "
        f"{trained:,} trained parameters a client",
        f"head: {config.method.head}; the result is "
        + ("the clients' personal accuracy" if config.method.head == "private" else "the global model's test accuracy"),
        f"rounds: {config.rounds} of {sampled} of {num_clients} clients; {min(steps)} to {max(steps)} local steps of "
        f"{config.train.batch_size} examples",
        f"bytes a client a round: {human_bytes(up_total)} up, {human_bytes(down_total)} down",
        f"bytes of the whole run: {human_bytes(up_total * sampled * config.rounds)} up, "
        f"{human_bytes(down_total * sampled * config.rounds)} down",
        *(
            ["and down once more a round to every client that has trained, to evaluate its own head"]
            if personal
            else []
        ),
        "server mean of updates: " + ("exact" if strategy.exact else "not exact (means of A and B, not of B A)"),
        "privacy: none",
    ]
    for line in lines:
        console.print(line, markup=False)
    return 0


def _report(path: Path, console: Console) -> int:
    """Print a run's table and write its plots and summary anew."""
    from fedlora.runs.report import Run, metrics_table, write_report

    run = Run.read(path)
    write_report(run)
    console.print(metrics_table(run))
    for key, value in (run.result or {"run": "did not finish"}).items():
        console.print(f"{key.replace('_', ' ')}: {value}", markup=False)
    console.print(f"plots and summary: {run.path.resolve()}", markup=False)
    return 0 if run.result else 1


if __name__ == "__main__":
    main()
