"""``fedlora deploy init``: all the files of a federation, from its certificates to its systemd units.

What is written is in ``templates/``, to be read as such. The folder appears whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import final

from rich.console import Console

from deploy import new_files, pki
from fedlora.config import DataConfig, ModelConfig, to_toml
from fedlora.config.sections import SITE_NAME

SITE_FOLDER = "/var/lib/fedlora/site"
"""Where the units and compose files expect a site's folder on its machine."""
_NODE_PORT = 9300
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+@=-]+")
_CA_KEY, _CA = "ca/ca.key", "ca/ca.crt"
_SERVER_KEY, _SERVER = "coordinator/tls/server.key", "coordinator/tls/server.crt"
_PRIVATE = ("ca", "coordinator", "coordinator/tls", "coordinator/signing", "sites")
_SYSTEMD = ("fedlora-superlink.service", "fedlora-run.service", "fedlora-site.service", "fedlora-supernode.service")
_DOCKER = ("Dockerfile", "compose.coordinator.yaml", "compose.site.yaml")


@final
@dataclass(frozen=True)
class Setup:
    """What ``fedlora deploy init`` is asked for.

    Attributes:
        sites: Names of the sites, in order.
        address: Host name or IP address by which sites reach the coordinator.
        names: Further ones, for the server's certificate.
        port: The coordinator's port.
        classes: Names of the classes, with commas between.
        model: The base model (``model.name``).
        rows: Nominal number of rows of a site, which is public.
        days: How long the server's certificate is valid.
        link_port: Port of Flower's own SuperLink, on the coordinator's loopback.
        node_ports: Ports of Flower's runtime interface at each site, on its loopback; empty: 9300 for all. Sites that
            share a machine need different ones.
    """

    sites: tuple[str, ...]
    address: str
    names: tuple[str, ...] = ()
    port: int = 8443
    classes: str = "neg,pos"
    model: str = "minilm"
    rows: int = 1000
    days: int = 365
    link_port: int = 39300
    node_ports: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields."""
        if not self.sites:
            raise ValueError("sites: must name one site or more, with commas between.")
        for name in self.sites:
            if not SITE_NAME.fullmatch(name):
                raise ValueError(
                    f"sites: {name!r} must be small letters, digits and hyphens, and begin with no hyphen."
                )
            if self.sites.count(name) > 1:
                raise ValueError(f"sites: {name!r} is there twice; each site has a name of its own.")
        object.__setattr__(self, "address", pki.checked_host(self.address))
        if not 0 < self.port < 65536 or self.port == self.link_port:
            raise ValueError(
                f"port = {self.port}: must be between 1 and 65535, and not {self.link_port}, Flower's own."
            )
        if self.rows < 1:
            raise ValueError(f"rows = {self.rows}: must be at least 1.")
        ModelConfig(self.model)
        if not self.classes:
            raise ValueError(
                "classes: must be given, two names or more with commas between: sites have to agree on them."
            )
        DataConfig(name="file", path="data.csv", classes=self.classes)

    @property
    def superlink(self) -> str:
        """What sites connect to, as Flower reads it."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def initialise(folder: Path, setup: Setup) -> None:
    """Write the files of a federation.

    Args:
        folder: Where to; it must not exist, or be empty.
        setup: What is asked for.

    Raises:
        ValueError: The folder is not empty, or has a path that systemd and Docker could not read.
    """
    folder = folder.expanduser().resolve()
    if not _PLAIN_PATH.fullmatch(str(folder)):
        raise ValueError(
            f"{folder}: choose a path of letters, digits and _./+@=- only; units and compose files name it."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: is there already, and not empty; nothing of it is overwritten. Choose another folder."
        )
    if not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}; make it first.")
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        made.chmod(0o755)  # so that the coordinator's user gets to its part
        _write_keys(made, setup)
        _write_texts(made, folder, setup)
        try:
            made.rename(folder)
        except OSError as error:
            raise ValueError(f"{folder}: could not be put in its place ({error.strerror}).") from error
    except BaseException:
        shutil.rmtree(made)
        raise


def renew(folder: Path, days: int = 365) -> None:
    """Give the coordinator a new key and certificate for the same names, signed by the same authority.

    The authority's key must be back in ``FOLDER/ca`` for it. The coordinator's gateway has to be restarted afterwards;
    sites need nothing.

    Raises:
        ValueError: The folder is not one of ``fedlora deploy init``, or the authority's key is not in it.
    """
    folder = folder.expanduser().resolve()
    key, certificate = folder / _SERVER_KEY, folder / _SERVER
    if not (folder / _CA_KEY).is_file():
        raise ValueError(f"{folder / _CA_KEY}: is not there; bring the authority's key back for as long as this takes.")
    current = pki.read_certificate(certificate)
    owner = certificate.stat()
    with tempfile.TemporaryDirectory(dir=key.parent, prefix=".renewed-") as made:
        new_key, new_certificate = Path(made, key.name), Path(made, certificate.name)
        pki.create_server_certificate(
            new_key,
            new_certificate,
            authority_key=folder / _CA_KEY,
            authority=folder / _CA,
            names=pki.names(current),
            days=days,
        )
        for new, old in ((new_key, key), (new_certificate, certificate)):
            if os.getuid() == 0:
                os.chown(new, owner.st_uid, owner.st_gid)
            new.replace(old)


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedlora deploy init``."""
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--sites", required=True, metavar="A,B,...", help="names of the sites, with commas between")
    parser.add_argument(
        "--address",
        default=socket.gethostname(),
        metavar="HOST_OR_IP",
        help="by which sites reach the coordinator (default: %(default)s, this machine)",
    )
    parser.add_argument(
        "--also", default="", metavar="NAME,...", help="further host names and addresses of the coordinator"
    )
    parser.add_argument("--port", type=int, default=Setup.port, help="the coordinator's (default: %(default)s)")
    parser.add_argument("--classes", default=Setup.classes, help="with commas between (default: %(default)s)")
    parser.add_argument("--model", default=Setup.model, help="the base model, as model.name (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=Setup.rows, help="nominal rows of a site (default: %(default)s)")
    _add_days(parser)


def add_renew_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedlora deploy renew``."""
    parser.add_argument("folder", type=Path, help="the folder that fedlora deploy init has made")
    _add_days(parser)


def run_init(options: argparse.Namespace, console: Console) -> int:
    """Carry out ``fedlora deploy init``; 0, as what cannot work is a ``ValueError``."""
    setup = Setup(
        sites=_listed(options.sites),
        address=options.address,
        names=_listed(options.also),
        port=options.port,
        classes=options.classes,
        model=options.model,
        rows=options.rows,
        days=options.days,
    )
    folder = options.folder.expanduser().resolve()
    initialise(folder, setup)
    valid = pki.expiry(pki.read_certificate(folder / _SERVER))
    lines = [
        f"{folder}",
        f"  coordinator/  stays here; sites reach it at {setup.superlink}; certificate valid until {valid:%Y-%m-%d}",
        "  ca/           take it off this machine now, and keep it; only fedlora deploy renew needs it",
        *(
            f"  sites/{name}/  goes to that site, by a way that nobody else can read; then delete it here"
            for name in setup.sites
        ),
        "  systemd/      units, and in their first lines how to install them; docker/: the same in containers",
        f"then: {shlex.join(['fedlora', 'doctor', str(folder / 'coordinator/coordinator.toml')])}",
        "at each site: its data, and fedlora doctor site.toml",
    ]
    console.print("\n".join(lines), markup=False)
    return 0


def run_renew(options: argparse.Namespace, console: Console) -> int:
    """Carry out ``fedlora deploy renew``; 0, as what cannot work is a ``ValueError``."""
    renew(options.folder, options.days)
    valid = pki.expiry(pki.read_certificate(options.folder.expanduser() / _SERVER))
    console.print(f"certificate valid until {valid:%Y-%m-%d}; restart fedlora-superlink to use it", markup=False)
    return 0


def _add_days(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--days",
        type=int,
        default=Setup.days,
        help="for which the server's certificate is valid (default: %(default)s)",
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text.strip() else ()


def _write_keys(made: Path, setup: Setup) -> None:
    """Write certificates and keys, each where it is used."""
    for name in _PRIVATE:
        new_files.make_folder(made / name)
    pki.create_authority(made / _CA_KEY, made / _CA)
    pki.create_server_certificate(
        made / _SERVER_KEY,
        made / _SERVER,
        authority_key=made / _CA_KEY,
        authority=made / _CA,
        names=(setup.address, *setup.names),
        days=setup.days,
    )
    signing = made / "coordinator/signing/adapter.pub"
    pki.create_signing_key(signing.with_suffix(".key"), signing)
    new_files.make_folder(made / "coordinator/keys", 0o755)
    ca = (made / _CA).read_bytes()
    new_files.write_new(made / "coordinator/tls/ca.crt", ca)
    for name in setup.sites:
        site = made / "sites" / name
        for part, mode in (("", 0o755), ("tls", 0o755), ("signing", 0o755), ("keys", 0o700), ("state", 0o700)):
            new_files.make_folder(site / part, mode)
        new_files.make_folder(site / "run", 0o755)
        public = pki.create_supernode_key(site / "keys/supernode", name)
        new_files.write_new(made / f"coordinator/keys/{name}.pub", public.read_bytes())
        new_files.write_new(site / "tls/ca.crt", ca)
        new_files.write_new(site / "signing/adapter.pub", signing.read_bytes())


def _write_texts(made: Path, folder: Path, setup: Setup) -> None:
    """Write what is made from templates; paths in it are those of the final folder."""
    coordinator = folder / "coordinator"
    for name in ("flwr", "state", "runs"):
        new_files.make_folder(made / "coordinator" / name)
    quoted = {
        "model": _toml(setup.model),
        "classes": _toml(setup.classes),
        "superlink": _toml(setup.superlink),
        "run_dir": _toml(str(coordinator / "runs")),
        "roster": _toml(str(coordinator / "state/roster.json")),
        "ca": _toml(str(coordinator / "tls/ca.crt")),
    }
    values = {
        **quoted,
        "port": setup.port,
        "link_port": setup.link_port,
        "rows": setup.rows,
        "min_replies": -(-2 * len(setup.sites) // 3),
    }
    keys = "\n".join(f'{name} = "keys/{name}.pub"' for name in setup.sites)
    _write(made / "coordinator/coordinator.toml", "coordinator.toml", {**values, "sites": keys})
    _write(made / "coordinator/run.toml", "run.toml", {**values, "sites": _toml(",".join(setup.sites))})
    _write(made / "coordinator/flwr/config.toml", "flwr.toml", values)
    ports = setup.node_ports or (_NODE_PORT,) * len(setup.sites)
    for name, port in zip(setup.sites, ports, strict=True):
        _write(made / f"sites/{name}/site.toml", "site.toml", {**values, "name": name, "node_port": port})
    program = str(Path(sys.executable).with_name("fedlora"))
    if not _PLAIN_PATH.fullmatch(program):
        program = "/opt/fedlora/.venv/bin/fedlora"
    places = {"coordinator": coordinator, "site": SITE_FOLDER, "program": program, "port": setup.port}
    for kind, files in (("systemd", _SYSTEMD), ("docker", _DOCKER)):
        new_files.make_folder(made / kind, 0o755)
        for name in files:
            _write(made / kind / name, name, places)


def _write(path: Path, template: str, values: Mapping[str, object]) -> None:
    text = resources.files("deploy").joinpath("templates", template).read_text(encoding="utf-8")
    new_files.write_new(path, Template(text).substitute(values).encode())


def _toml(value: str) -> str:
    """Return a text as TOML has it, in quotes."""
    return to_toml({"key": value}).removeprefix("key = ").rstrip("\n")
