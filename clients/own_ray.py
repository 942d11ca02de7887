"""A site's own Ray: on its machine for the daemon's time, or a cluster that the site runs."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clients.shards import Machine

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray advises, instead of warning about it at each start
    # A worker for each core, before any is asked for: trainers and Flower's actors are processes of their own.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_raylet_start_wait_time_s": "120",  # for which it waits for its own processes; 30 are too few on a busy machine
}
"""What a Ray that is started here has in its environment."""

_PREFIX = "fl-ray-"
_LOOPBACK = "127.0.0.2"  # Ray takes 127.0.0.1 for the machine's address on the network


@contextmanager
def own_ray(remember: Path, address: str = "", threads: int = 0) -> Iterator[list[Machine]]:
    """Connect to a site's Ray for the time of the block, and yield its machines.

    Whoever can talk to Ray can have it run code. A Ray of this machine therefore answers nobody who lacks a token that
    is drawn for this process, its files are in a folder that no other user may enter, and it knows itself by a loopback
    address, so that it does not depend on the network. Its ports are open on all addresses all the same, which Ray
    cannot be told otherwise: the daemon's systemd unit closes them.

    Args:
        remember: File for the name of Ray's folder, so that the next process clears up after one that was killed.
        address: A cluster's address; its token, if it has one, comes from the environment as Ray documents. Empty: a
            Ray of this process on this machine.
        threads: CPU threads of all trainers together; 0: all cores.
    """
    # Ray reads the token once, when it is imported.
    assert "ray" not in sys.modules or address, "this process has imported Ray already"
    os.environ.update(RAY_ENVIRONMENT)
    if not address:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.pop("RAY_ADDRESS", None)
    import ray

    from clients.pool import machines

    if address:
        ray.init(address=address, log_to_driver=False)
        try:
            yield machines()
        finally:
            ray.shutdown()
        return
    _clear(remember)
    folder = tempfile.mkdtemp(prefix=_PREFIX)  # mode 0700; the paths of its sockets must stay short
    remember.write_text(folder, encoding="utf-8")
    try:
        ray.init(
            address="local",
            num_cpus=threads or None,
            include_dashboard=False,
            log_to_driver=False,
            _node_ip_address=_LOOPBACK,
            _temp_dir=folder,
        )
        yield machines()
    finally:
        ray.shutdown()
        _clear(remember)


def _clear(remember: Path) -> None:
    """Remove the folder of the Ray before, if there is one."""
    try:
        folder = Path(remember.read_text(encoding="utf-8"))
    except OSError:
        return
    if folder.name.startswith(_PREFIX) and folder.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(folder, ignore_errors=True)
    remember.unlink(missing_ok=True)
