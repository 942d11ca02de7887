"""The console command ``fedlora``: simulations, and what a deployment's operators need beside them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from simulations.exits import exit_with

_COMMANDS = {
    "deploy": "a federation on several machines: init, superlink, run, renew, demo",
    "site": "a site of such a federation: run, supernode, show",
    "doctor": "what is wrong with an installation, and its cure",
    "verify": "whether an adapter is what its coordinator signed",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 when all went well, 1 when a run failed, 2 when the input cannot work."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    exit_with(lambda console: _chosen(given, console))


def _chosen(given: Sequence[str], console: Console) -> int:
    if given and given[0] in _COMMANDS:
        return _command(given, console)
    from simulations import cli

    return cli.run(given, console, others=_COMMANDS)


def _command(given: Sequence[str], console: Console) -> int:
    from deploy import doctor, init, manifest

    parser = argparse.ArgumentParser(prog="fedlora")
    commands = parser.add_subparsers(dest="command", required=True)
    deploy = commands.add_parser("deploy", help=_COMMANDS["deploy"]).add_subparsers(dest="what", required=True)
    init.add_init_arguments(deploy.add_parser("init", help="keys, certificates and files of a new federation"))
    init.add_renew_arguments(deploy.add_parser("renew", help="a new server certificate"))
    for name, text in (
        ("superlink", "what sites connect to: Flower's SuperLink behind a gateway"),
        ("run", "the run of run.toml, from its last finished round"),
    ):
        deploy.add_parser(name, help=text).add_argument("file", type=Path, help="coordinator.toml")
    demo = deploy.add_parser("demo", help="three sites on this machine, through the same files")
    demo.add_argument("folder", type=Path, nargs="?", default=Path("deployment"), help="where its files go")
    site = commands.add_parser("site", help=_COMMANDS["site"]).add_subparsers(dest="what", required=True)
    for name, text in (
        ("run", "the daemon: rows, limits, ledger and training"),
        ("supernode", "Flower's SuperNode, as another user"),
        ("show", "what may leave the site, and what has left"),
    ):
        site.add_parser(name, help=text).add_argument("file", type=Path, help="site.toml")
    doctor.add_arguments(commands.add_parser("doctor", help=_COMMANDS["doctor"]))
    manifest.add_arguments(commands.add_parser("verify", help=_COMMANDS["verify"]))
    options = parser.parse_args(given)
    match options.command, getattr(options, "what", ""):
        case "deploy", "init":
            return init.run_init(options, console)
        case "deploy", "renew":
            return init.run_renew(options, console)
        case "deploy", "demo":
            from deploy.demo import run_demo

            return run_demo(options.folder, console)
        case "deploy", what:
            return _coordinator(what, options.file, console)
        case "site", what:
            return _site(what, options.file, console)
        case "doctor", _:
            return doctor.run_doctor(options, console)
        case _:
            return manifest.run_verify(options, console)


def _coordinator(what: str, path: Path, console: Console) -> int:
    from deploy.coordinator_file import CoordinatorFile

    file = CoordinatorFile.read(path)
    if what == "superlink":
        from deploy.superlink import serve

        return serve(file)
    from deploy.run import run_federation

    return run_federation(file, console)


def _site(what: str, path: Path, console: Console) -> int:
    import logging

    if what == "run":
        from clients.daemon import run

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        run(path)
        return 0
    from clients.site_file import SiteFile

    file = SiteFile.read(path)
    if what == "supernode":
        from deploy.supernode import run_supernode

        run_supernode(file)
    from clients.show import show

    return show(file, console)


if __name__ == "__main__":
    main()
