"""Who can get at a path, by its owner, group and mode, and checks of what must be private."""

from __future__ import annotations

import os
import pwd
import shlex
import stat
from collections.abc import Sequence
from pathlib import Path

from deploy.checks import Finding, Grade


def secret(path: Path, what: str, owners: Sequence[int]) -> Finding:
    """Check that a private key belongs to one of the given users, and that nobody else can get at it."""
    try:
        status = path.stat()
    except PermissionError:
        return Finding(what, Grade.OK, f"{path.parent} lets its owner in only, and not this user")
    except OSError as error:
        return Finding(what, Grade.FAILED, f"{path}: {error.strerror}", "bring it back from what deploy init has made")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        cure = f"chmod 600 {shlex.quote(str(path))}; if others were on this machine, have a new key made"
        return Finding(what, Grade.FAILED, f"{path} has mode {mode:04o}: other users can get at it", cure)
    if status.st_uid not in owners:
        users = " or ".join(map(user_name, owners))
        found = f"{path} belongs to {user_name(status.st_uid)}, not to {users}"
        return Finding(what, Grade.FAILED, found, f"chown {user_name(owners[0])} {shlex.quote(str(path))}")
    return Finding(what, Grade.OK, f"mode {mode:04o}, of {user_name(status.st_uid)}")


def private_folder(path: Path, what: str) -> Finding:
    """Check that other users cannot look into a folder; one that is not there yet will be made so."""
    if not path.is_dir():
        return Finding(what, Grade.OK, f"{path} is made at the first start")
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        found = f"{path} has mode {mode:04o}: other users can look in"
        return Finding(what, Grade.FAILED, found, f"chmod 700 {shlex.quote(str(path))}")
    return Finding(what, Grade.OK, f"mode {mode:04o}, of {user_name(status.st_uid)}")


def may(user: int, path: Path, wanted: int) -> bool:
    """Return whether a user has the permissions ``wanted`` (such as ``os.R_OK``) on a path, and on the way to it.

    Access control lists are not looked at.
    """
    if user == 0:
        return path.exists()
    try:
        entry = pwd.getpwuid(user)
        groups = set(os.getgrouplist(entry.pw_name, entry.pw_gid))
    except KeyError:
        groups = set()
    return all(_has(user, groups, above, os.X_OK) for above in path.parents) and _has(user, groups, path, wanted)


def _has(user: int, groups: set[int], path: Path, wanted: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    shift = 6 if status.st_uid == user else 3 if status.st_gid in groups else 0
    return (status.st_mode >> shift) & wanted == wanted


def user_name(number: int) -> str:
    """Return a user's name, or the number where there is none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
