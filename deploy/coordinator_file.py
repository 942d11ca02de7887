"""The coordinator's own file, ``coordinator.toml``: where it listens, its certificate, and the sites that it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, final

from fedlora.config.sections import SITE_NAME
from fedlora.config.tables import read_table, read_tables

SIGNING_KEY = "FEDLORA_SIGNING_KEY"
"""Environment variable that tells a run's ServerApp, a child of the SuperLink, which key signs its adapter."""


@final
@dataclass(frozen=True)
class CoordinatorFile:
    """A coordinator's own file.

    Attributes:
        path: The file.
        host: Address on which the gateway listens for the sites.
        port: Its port.
        link_port: Port of Flower's own SuperLink, on loopback only.
        ca: Certificate of the federation's authority.
        certificate: The server's certificate.
        key: Its private key.
        database: The SuperLink's database.
        signing_key: The key that signs adapters.
        flower_home: Flower's home, which holds the connection ``deployment``.
        run: The run's configuration.
        sites: The public key of each site's SuperNode, by the site's name.
    """

    path: Path
    host: str
    port: int
    link_port: int
    ca: Path
    certificate: Path
    key: Path
    database: Path
    signing_key: Path
    flower_home: Path
    run: Path
    sites: Mapping[str, Path]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file; relative paths are beside it.

        Raises:
            ValueError: It cannot be read, or a key is unknown, missing or wrong.
        """
        path = path.expanduser().resolve()
        values = read_tables(path, "the coordinator's file")
        server = read_table(_Server, values.pop("server", {}), f"{path} [server]")
        sites = read_table(_Sites, values, str(path)).sites
        folder = path.parent
        return cls(
            path=path,
            host=server.host,
            port=server.port,
            link_port=server.link_port,
            ca=folder / server.ca,
            certificate=folder / server.certificate,
            key=folder / server.key,
            database=folder / server.database,
            signing_key=folder / server.signing_key,
            flower_home=folder / server.flower_home,
            run=folder / server.run,
            sites={name: folder / key for name, key in sites.items()},
        )


@final
@dataclass(frozen=True)
class _Server:
    host: str = "0.0.0.0"
    port: int = 8443
    link_port: int = 39300
    ca: str = "tls/ca.crt"
    certificate: str = "tls/server.crt"
    key: str = "tls/server.key"
    database: str = "state/superlink.sqlite"
    signing_key: str = "signing/adapter.key"
    flower_home: str = "flwr"
    run: str = "run.toml"

    def __post_init__(self) -> None:
        for key, value in (("port", self.port), ("link-port", self.link_port)):
            if not 0 < value < 65536:
                raise ValueError(f"{key} = {value}: must be between 1 and 65535.")
        if self.port == self.link_port:
            raise ValueError(f"link-port = {self.link_port}: is the port of the gateway; choose another.")


@final
@dataclass(frozen=True)
class _Sites:
    sites: dict[str, str]

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("[sites]: must name a site and its public key, such as a = 'keys/a.pub'.")
        for name in self.sites:
            if not SITE_NAME.fullmatch(name):
                raise ValueError(f"[sites] {name!r}: a name must be small letters, digits and hyphens.")
        twice = [name for name, key in self.sites.items() if list(self.sites.values()).count(key) > 1]
        if twice:
            raise ValueError(
                f"[sites] {twice[0]} = {self.sites[twice[0]]!r}: is another site's key, too; each has its own."
            )
