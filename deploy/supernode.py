"""Starts a site's SuperNode, which carries messages between the coordinator and the site's daemon."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from clients.site_file import SiteFile
from simulations.superlink import FLOWER_ENVIRONMENT

_POLL_S = "0.1"  # how often Flower looks for a message's ClientApp to start; by default once a second


def supernode_command(file: SiteFile) -> tuple[list[str], dict[str, str]]:
    """Return the command of a site's SuperNode, and its environment.

    Raises:
        ValueError: The file says nothing of a SuperNode, or names files that are not there.
    """
    own = file.supernode
    if own is None:
        raise ValueError(f"{file.path}: has no table [supernode], which says how the coordinator is reached.")
    paths = {key: file.beside(value) for key, value in (("ca", own.ca), ("key", own.key))}
    for key, path in paths.items():
        if not path.is_file():
            raise ValueError(f"{file.path} [supernode]: {key} = {str(path)!r}: there is no such file.")
    command = [
        *(sys.executable, "-m", "deploy.own_supernode"),
        *("--superlink", own.superlink),
        *("--root-certificates", str(paths["ca"])),
        *("--auth-supernode-private-key", str(paths["key"])),
        *("--port", str(own.port)),
        *("--node-config", f'site-socket="{file.socket}"'),
    ]
    environment = {**os.environ, **FLOWER_ENVIRONMENT, "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL_S}
    beside = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])  # Flower's other commands
    return command, {**environment, "PATH": beside}


def run_supernode(file: SiteFile) -> None:
    """Become the SuperNode.

    It ends when the coordinator refuses it, as for a minute after it was killed, or when it gives up its connection.
    Then it is to be started again: by systemd, by Docker, or by whoever starts it.
    """
    command, environment = supernode_command(file)
    os.execve(command[0], command, environment)
