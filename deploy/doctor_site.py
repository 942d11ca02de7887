"""What ``fedlora doctor`` looks at on a site's machine."""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clients.site_file import SiteFile, SuperNodeTable
from deploy import checks, permissions
from deploy.checks import Finding, Grade
from fedlora.config import ConfigError
from fedlora.config.data_keys import read_names
from fedlora.messages import first_line

_SOCKET_PATH = 107  # bytes that Linux takes
_GUESSED = ("classification", "multi-label", "regression", "causal-lm")  # the first two where there are classes
_GET_AGAIN = "get tls/ca.crt from the coordinator again"


class LoadedAs(NamedTuple):
    """How a run loads a base model, on which the model's digest depends.

    Attributes:
        dtype: ``engine.dtype``.
        quantization: ``model.quantization``.
    """

    dtype: str = "float32"
    quantization: str = "none"


def examine_site(
    site: SiteFile, *, loaded_as: LoadedAs | None = None, coordinator: Mapping[str, str] | None = None
) -> list[Finding]:
    """Check a site's installation.

    Args:
        site: Its file.
        loaded_as: How to load its models for their digests, which takes time and memory; None: not at all.
        coordinator: The coordinator's versions by package, where they are known.
    """
    daemon = site.state.stat().st_uid if site.state.is_dir() else os.getuid()
    findings = checks.versions(coordinator)
    others: list[int] = []
    try:
        others = _others(site, daemon)
        findings.append(_users(daemon, others))
    except ValueError as error:
        cure = "make it with useradd --system, or name the SuperNode's user"
        findings.append(Finding("users", Grade.FAILED, str(error), cure))
    findings += _places(site, daemon, others)
    if site.supernode is None:
        cure = "add superlink = 'HOST:PORT' under [supernode] in the site's file"
        findings.append(Finding("SuperNode", Grade.WARNING, "the file has no [supernode]", cure))
    else:
        findings += _supernode(site, site.supernode, others or [daemon])
    data, task = _data(site)
    findings += [checks.disk(site.state), checks.gpu(), data, *_models(site, task, loaded_as)]
    return findings


def _others(site: SiteFile, daemon: int) -> list[int]:
    """Return the users, other than the daemon's, that may connect to it.

    Raises:
        ValueError: There is no such user.
    """
    ids, own = site.access.ids, os.getuid()
    if not {str(own), permissions.user_name(own)} & set(site.access.users):
        ids -= {own}  # whoever runs this
    return sorted(ids - {daemon})


def _users(daemon: int, others: list[int]) -> Finding:
    """Check that what the coordinator sends does not run as the user who owns the data."""
    own = permissions.user_name(daemon)
    if others:
        names = ", ".join(map(permissions.user_name, others))
        return Finding("users", Grade.OK, f"the daemon is {own}; {names} may connect to it")
    found = f"nobody but the daemon's user, {own}, may connect to it: what the coordinator sends can read the data"
    cure = "run the SuperNode as another user, and name that one in [access] users"
    return Finding("users", Grade.WARNING, found, cure)


def _places(site: SiteFile, daemon: int, others: list[int]) -> Iterator[Finding]:
    """Check who gets at state, data and socket."""
    yield permissions.private_folder(site.state, "state folder")
    data, folder, socket = Path(site.data.path), site.socket.parent, str(site.socket)
    quoted = shlex.quote(str(data))
    if os.path.exists(data) and not permissions.may(daemon, data, os.R_OK):
        found = f"{permissions.user_name(daemon)}, the daemon's user, cannot read {data}"
        yield Finding("data wall", Grade.FAILED, found, f"chown {permissions.user_name(daemon)} {quoted}")
    for user in others:
        if os.path.exists(data) and permissions.may(user, data, os.R_OK):
            found = f"{permissions.user_name(user)} can read {data}, and so can what the coordinator sends"
            yield Finding(
                "data wall", Grade.FAILED, found, f"chown {permissions.user_name(daemon)} {quoted}; chmod 600 {quoted}"
            )
        if folder.is_dir() and not permissions.may(user, folder, os.X_OK):
            found = f"{permissions.user_name(user)} does not get into {folder}, where the socket is"
            cure = f"chmod 711 {shlex.quote(str(folder))} and the folders above it"
            yield Finding("socket", Grade.FAILED, found, cure)
    if len(os.fsencode(socket)) > _SOCKET_PATH:
        found = f"the path has {len(os.fsencode(socket))} bytes, and Linux takes {_SOCKET_PATH}"
        yield Finding("socket", Grade.FAILED, found, "set socket to a shorter path, such as /run/fedlora/site.sock")
    elif os.path.exists(site.socket):
        is_socket = stat.S_ISSOCK(site.socket.stat().st_mode)
        grade, cure = (Grade.OK, "") if is_socket else (Grade.FAILED, f"remove {socket}")
        yield Finding("socket", grade, f"{socket} is {'there' if is_socket else 'no socket'}", cure)
    elif folder.is_dir() and not permissions.may(daemon, folder, os.W_OK | os.X_OK):
        found = f"{permissions.user_name(daemon)} cannot write in {folder}"
        cure = f"chown {permissions.user_name(daemon)} {shlex.quote(str(folder))}"
        yield Finding("socket", Grade.FAILED, found, cure)
    else:
        yield Finding("socket", Grade.OK, f"{socket} is made when the daemon starts")


def _supernode(site: SiteFile, supernode: SuperNodeTable, users: list[int]) -> Iterator[Finding]:
    """Check what the SuperNode needs: its key, the way to the coordinator, a port."""
    ca = site.beside(supernode.ca)
    yield checks.certificate(ca, "authority's certificate", _GET_AGAIN)
    key = site.beside(supernode.key)
    yield permissions.secret(key, "SuperNode's key", users)
    if os.access(key, os.R_OK):
        yield from _key_kind(key)
    yield from checks.coordinator_at(supernode.superlink, ca)
    yield checks.port(supernode.port, "SuperNode, loopback", "[supernode] port")


def _key_kind(path: Path) -> Iterator[Finding]:
    """Check that a key is one that Flower's SuperNode takes."""
    try:
        usable = isinstance(serialization.load_ssh_private_key(path.read_bytes(), None), ec.EllipticCurvePrivateKey)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        usable = False
    if not usable:
        cure = "bring it back from what deploy init has made (Flower takes EC keys in OpenSSH's format)"
        yield Finding("SuperNode's key", Grade.FAILED, f"{path} is no key that Flower takes", cure)


def _data(site: SiteFile) -> tuple[Finding, str]:
    """Check that the data can be read for their task; return the task, too.

    Where the site's file names no task, the first that its columns can be read for is taken, and said.
    """
    from fedlora.data.files import load_own_rows
    from fedlora.plugins import read_config
    from fedlora.tasks import TASKS

    data, refused = site.data, dict[str, str]()
    for task in (data.task,) if data.task else _GUESSED if site.public.classes else _GUESSED[2:]:
        try:
            named = TASKS[task].has_head and TASKS[task].has_classes
            classes = site.public.classes if named else ""
            corpus = load_own_rows(read_config({**data.flat, "task": task, "data.classes": classes}))
            break
        except (ValueError, OSError) as error:
            refused[task] = first_line(error)
    else:
        found = refused.get(data.task) or "; ".join(f"as {one}: {why}" for one, why in refused.items())
        cure = "put the file in its place, and set [data] with its task, and [public] classes, to what it has"
        return Finding("data", Grade.FAILED, found, cure), next(iter(refused))
    rows, names = len(corpus.train), len(corpus.classes)
    kinds = {"classification": f", {names} classes", "multi-label": f", {names} labels", "regression": " with numbers"}
    found = f"{rows} rows{kinds.get(task, ' with answers' if corpus.train.answers else '')}"
    if not rows / 2 <= site.public.rows <= rows * 2:
        cure = "set rows to a round number near it; under privacy it sets the sample rate"
        return Finding("data", Grade.WARNING, f"{found}, and [public] rows = {site.public.rows}", cure), task
    if not data.task:
        found += f", read for {task}; {site.path.name} does not say what they are for"
        return Finding("data", Grade.WARNING, found, f"say it: task = '{task}', or another, under [data]"), task
    return Finding("data", Grade.OK, found), task


def _models(site: SiteFile, task: str, loaded_as: LoadedAs | None) -> Iterator[Finding]:
    """Check that the models are there; with ``loaded_as`` that they load, and their digests."""
    from fedlora.models import model_path

    for name, place in site.models.items():
        what = f"model {name}"
        try:
            if loaded_as is not None:
                digest = _digest(site, place, task, loaded_as)
                wanted = site.limits.model_digests
                if wanted and digest not in wanted:
                    cure = "get the model that was agreed on, or change model-digests if this is the one"
                    yield Finding(what, Grade.FAILED, f"digest {digest} is none of [limits] model-digests", cure)
                else:
                    yield Finding(what, Grade.OK, f"digest {digest}")
            elif (folder := Path(model_path(place))).is_dir():
                if not (folder / "config.json").is_file():
                    raise ValueError(f"{folder} holds no config.json")
                yield Finding(what, Grade.OK, f"{folder} (its digest: --model)")
            else:
                yield Finding(what, Grade.OK, f"{place}, loaded by that name when it is asked for (try it: --model)")
        except ConfigError as error:  # of the dtype or quantisation that were asked for
            yield Finding(what, Grade.FAILED, first_line(error), "until then this site cannot take part in such a run")
        except ValueError as error:
            yield Finding(
                what, Grade.FAILED, first_line(error), "set its entry under [models] to a folder that holds it"
            )


def _digest(site: SiteFile, place: str, task: str, loaded_as: LoadedAs) -> str:
    import torch

    from fedlora.config import ModelConfig
    from fedlora.models import load_base
    from fedlora.tasks import TASKS

    outputs = max(2, len(read_names(site.public.classes)))
    kind, device, dtype = TASKS[task], torch.device("cpu"), getattr(torch, loaded_as.dtype)
    model = ModelConfig(place, quantization=loaded_as.quantization)
    return load_base(model, kind, outputs, "auto", dtype=dtype, device=device).digest
