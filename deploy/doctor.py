"""``fedlora doctor``: whether an installation is complete and will work, with the cure for what is not.

It reads and asks, and changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clients.site_file import SiteFile
from deploy import checks
from deploy.checks import Finding, Grade
from deploy.coordinator_file import CoordinatorFile
from deploy.doctor_coordinator import examine_coordinator
from deploy.doctor_site import LoadedAs, examine_site
from fedlora.config.tables import read_tables

Versions = Callable[[SiteFile], Mapping[str, str] | None]
"""How to ask the coordinator for its versions by package; None where it does not say."""

_STYLES = {Grade.OK: "green", Grade.WARNING: "yellow", Grade.FAILED: "bold red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedlora doctor``."""
    parser.add_argument("file", type=Path, help="a site.toml or coordinator.toml")
    parser.add_argument("--model", action="store_true", help="also load the site's models, and print their digests")
    dtypes, quantizations = ("float32", "bfloat16", "float64"), ("none", "nf4", "int8")
    said = "with --model: as a run loads them whose {} is this (default: %(default)s)"
    parser.add_argument("--dtype", default="float32", choices=dtypes, help=said.format("engine.dtype"))
    parser.add_argument("--quantization", default="none", choices=quantizations, help=said.format("model.quantization"))


def ask_versions(site: SiteFile) -> Mapping[str, str] | None:
    """Ask the coordinator of a site for its versions."""
    own = site.supernode
    return checks.versions_at(own.superlink, site.beside(own.ca)) if own is not None else None


def run_doctor(options: argparse.Namespace, console: Console, coordinator_versions: Versions = ask_versions) -> int:
    """Carry out ``fedlora doctor``: 0 when nothing failed (warnings are none), 1 when something did.

    Raises:
        ValueError: The file cannot be read.
    """
    path = options.file.expanduser().resolve()
    if "server" in read_tables(path, "the file"):
        findings = examine_coordinator(CoordinatorFile.read(path))
    else:
        site = SiteFile.read(path)
        loaded = LoadedAs(options.dtype, options.quantization) if options.model else None
        findings = examine_site(site, loaded_as=loaded, coordinator=coordinator_versions(site))
    show(findings, console)
    return 1 if any(finding.grade is Grade.FAILED for finding in findings) else 0


def show(findings: list[Finding], console: Console) -> None:
    """Print findings as a table, and their cures below it."""
    table = Table("check", "", "found")
    for finding in findings:
        style = _STYLES[finding.grade]
        table.add_row(escape(finding.what), f"[{style}]{finding.grade}[/{style}]", escape(finding.found))
    console.print(table)
    for finding in findings:
        if finding.cure:
            console.print(f"{finding.grade}: {finding.what}: {finding.cure}", markup=False)
    failed, warned = (sum(finding.grade is grade for finding in findings) for grade in (Grade.FAILED, Grade.WARNING))
    console.print(f"{len(findings)} checks: {failed} failed, {warned} with a warning", markup=False)
