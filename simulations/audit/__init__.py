"""``fedlora audit``: whether the shipped training path does what its epsilon assumes.

Everything is measured on what trainers let out: each check builds clients whose rows it knows, has the real worker
train them (sampler, engine, noise, ledger and all), and examines the tensors that leave or are kept. What is claimed is
taken from the ledger entries that the worker wrote. Checks are deterministic, or have a chance of a false alarm of
about one in a million. They run on the run's own model, method and strategy, in float64, with plain SGD of rate 1, so
that what a client's tensors moved by is what its optimizer was given. Penalties, which see no data, are switched off:
they would hide what comes from rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from clients.trainer import TrainPack
from fedlora.config import Config
from fedlora.data import FederatedData
from fedlora.engine import train_pack
from simulations.audit.findings import Finding, show
from simulations.audit.noise import noise
from simulations.audit.rounds import order, rounds
from simulations.audit.sampler import sampler
from simulations.audit.sensitivity import sensitivity
from simulations.audit.site import Audited
from simulations.audit.statistical import statistical


def audit(
    config: Config, data: FederatedData, train: TrainPack = train_pack, *, attacks: bool = False
) -> list[Finding]:
    """Run all checks on a configuration whose ``privacy`` keys are all given.

    Args:
        config: The configuration.
        data: The data.
        train: What trains a pack.
        attacks: Whether to bound epsilon from below, too, by attacks on what is released.
    """
    with TemporaryDirectory() as folder:
        run = Audited(config, data, Path(folder), train)
        found = [*rounds(run), order(run)]
        if not all(finding.passed for finding in found):
            return found  # nothing is claimed that the rest could be compared with
        turns = run.turns()
        for number in turns:
            turn = f", roles of round {number}" if len(turns) > 1 else ""
            for one in (*sensitivity(run, number), *noise(run, number)):
                found.append(replace(one, name=one.name + turn))
        return [*found, *sampler(run), *(statistical(run) if attacks else [])]


__all__ = ["Finding", "audit", "show"]
