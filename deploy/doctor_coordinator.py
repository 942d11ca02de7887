"""What ``fedlora doctor`` looks at on the coordinator's machine."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deploy import checks, permissions, pki
from deploy.checks import Finding, Grade
from deploy.coordinator_file import CoordinatorFile
from fedlora.config import from_toml
from fedlora.messages import first_line

_RENEW = "fedlora deploy renew FOLDER, and restart fedlora-superlink"
_NEW_AUTHORITY = "an authority cannot be renewed: make a new federation with fedlora deploy init"


def examine_coordinator(file: CoordinatorFile) -> list[Finding]:
    """Check the coordinator's installation."""
    return [
        *checks.versions(),
        checks.certificate(file.ca, "authority's certificate", _NEW_AUTHORITY),
        checks.certificate(file.certificate, "server's certificate", _RENEW),
        *_signature(file),
        *_coordinator_keys(file),
        *_site_keys(file),
        _connection(file),
        _run(file),
        checks.disk(file.database.parent),
        checks.gpu(),
        checks.port(file.port, "gateway", "[server] port"),
        checks.port(file.link_port, "SuperLink, loopback", "[server] link-port"),
    ]


def _signature(file: CoordinatorFile) -> Iterator[Finding]:
    """Check that certificate, key and authority belong together, and what the certificate is for."""
    what = "server's certificate"
    try:
        certificate, ca = pki.read_certificate(file.certificate), pki.read_certificate(file.ca)
        fits = pki.is_key_of(file.key, certificate)
    except ValueError as error:
        yield Finding(what, Grade.FAILED, str(error), _RENEW)
        return
    if not pki.signed_by(certificate, ca):
        yield Finding(what, Grade.FAILED, f"is not signed by {file.ca}: every site would refuse it", _RENEW)
    elif not fits:
        yield Finding(what, Grade.FAILED, f"{file.key} is not its key", _RENEW)
    else:
        yield Finding("its names", Grade.OK, ", ".join(pki.names(certificate)))


def _coordinator_keys(file: CoordinatorFile) -> Iterator[Finding]:
    owner = [file.path.parent.stat().st_uid]
    yield permissions.secret(file.key, "server's key", owner)
    yield permissions.secret(file.signing_key, "signing key", owner)
    left = file.path.parent.parent / "ca" / "ca.key"
    if os.access(left, os.F_OK):
        found = f"{left} is on this machine: whoever takes it can be the coordinator"
        yield Finding("authority's key", Grade.WARNING, found, "move the folder ca to where it is offline")


def _site_keys(file: CoordinatorFile) -> Iterator[Finding]:
    """Check that each site has a key of its own, of a kind that Flower takes."""
    owners: dict[bytes, str] = {}
    for name, path in file.sites.items():
        what = f"key of site {name}"
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("not an EC key")
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            cure = "get keys/supernode.pub from the site again"
            yield Finding(what, Grade.FAILED, f"{path} cannot be used ({first_line(error)})", cure)
            continue
        line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        if line in owners:
            cure = "each site needs a key of its own: ssh-keygen -t ecdsa -b 384 at one of them"
            yield Finding(what, Grade.FAILED, f"is also that of site {owners[line]}", cure)
        owners[line] = name
    yield Finding("sites", Grade.OK, ", ".join(file.sites))


def _connection(file: CoordinatorFile) -> Finding:
    """Check Flower's connection file against the coordinator's."""
    what, path = "Flower's connection", file.flower_home / "config.toml"
    try:
        entry = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"]["deployment"]
        address, ca = entry["address"], Path(entry["root-certificates"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        cure = f"write [superlink.deployment] with address and root-certificates into {path}"
        return Finding(what, Grade.FAILED, f"{path} has no connection 'deployment' ({first_line(error)})", cure)
    for key, is_, wanted in (
        ("address", address, f"127.0.0.1:{file.link_port}"),
        ("root-certificates", str(ca), str(file.ca)),
    ):
        if is_ != wanted:
            return Finding(
                what, Grade.FAILED, f"{path}: {key} = {is_!r}", f"set it to {wanted!r}; was the folder moved?"
            )
    return Finding(what, Grade.OK, f"deployment, at {address}")


def _run(file: CoordinatorFile) -> Finding:
    """Check the run's configuration, and that its sites are those with keys."""
    from simulations.setup import resolve

    what = "run"
    try:
        config = resolve(from_toml(file.run.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        return Finding(what, Grade.FAILED, f"{file.run}: {first_line(error)}", "correct that key in it")
    names = config.federation.site_names
    unknown = [name for name in names if name not in file.sites]
    if unknown:
        cure = f"add its public key to [sites] in {file.path.name}, or take it out of federation.sites"
        return Finding(what, Grade.FAILED, f"site {unknown[0]} of federation.sites has no key here", cure)
    return Finding(
        what, Grade.OK, f"{config.run.name}: {config.strategy.name}, {config.rounds} rounds, {len(names)} sites"
    )
