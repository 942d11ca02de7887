"""Single checks of an installation: what is found, whether it will do, and the cure where it will not."""

from __future__ import annotations

import email.utils
import http.client
import importlib.metadata
import os
import shutil
import ssl
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import final

import psutil
from cryptography import x509
from packaging.requirements import Requirement

from deploy import pki
from deploy.admission import HEALTH
from deploy.gateway import VERSIONS
from fedlora.messages import first_line

_SHOWN = ("fedlora", "flwr", "torch", "transformers", "peft", "ray")
_MUST_BE_EQUAL = ("fedlora", "flwr")  # between coordinator and sites
_SOON = timedelta(days=30)
_AHEAD_S, _BEHIND_S = 5, 300  # Flower refuses a SuperNode whose clock is so far from the coordinator's
_DISK = (1 << 30, 5 << 30)
_TIMEOUT_S = 5.0
_OURS = ("fedlora", "flower-super")
_TLS_CURES = {
    9: "set this machine's clock, or the coordinator's certificate is not valid yet",
    10: "on the coordinator: fedlora deploy renew FOLDER, and restart its gateway",
    62: "reach it by a name in its certificate, or make one: fedlora deploy init with --address or --also",
    64: "reach it by an address in its certificate, or make one: fedlora deploy init with --address or --also",
}


class Grade(StrEnum):
    """Whether what was found will do."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@final
@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: What was looked at.
        grade: Whether it will do.
        found: What it is like.
        cure: What to do about it; empty where nothing needs to be done.
    """

    what: str
    grade: Grade
    found: str
    cure: str = ""


def versions(theirs: Mapping[str, str] | None = None) -> list[Finding]:
    """Check Python and packages against what fedlora needs, and against the other side's.

    Args:
        theirs: The other side's versions by package, if they are known.
    """
    own = {name: importlib.metadata.version(name) for name in _SHOWN}
    found = ", ".join([f"Python {sys.version.split()[0]}", *(f"{name} {version}" for name, version in own.items())])
    wrong = [text for text in importlib.metadata.requires("fedlora") or () if not _satisfied(Requirement(text))]
    cure = "install them: pip install --constraint constraints.txt -e ."
    if wrong:
        findings = [Finding("versions", Grade.FAILED, f"{found}; not satisfied: {', '.join(wrong)}", cure)]
    else:
        findings = [Finding("versions", Grade.OK, found)]
    for name, version in own.items():
        if theirs is not None and theirs.get(name, version) != version:
            grade = Grade.FAILED if name in _MUST_BE_EQUAL else Grade.WARNING
            said = f"{name} is {version} here and {theirs[name]} at the coordinator"
            findings.append(Finding("versions", grade, said, f"install the same {name} on both sides"))
    return findings


def _satisfied(needed: Requirement) -> bool:
    if needed.marker and not needed.marker.evaluate({"extra": ""}):
        return True
    try:
        return needed.specifier.contains(importlib.metadata.version(needed.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def certificate(path: Path, what: str, renew: str) -> Finding:
    """Check that a certificate can be read and is valid for some time yet.

    Args:
        path: The certificate.
        what: What it is called.
        renew: How to get another.
    """
    try:
        read = pki.read_certificate(path)
    except ValueError as error:
        return Finding(what, Grade.FAILED, str(error), renew)
    return _validity(what, read, renew)


def _validity(what: str, read: x509.Certificate, renew: str) -> Finding:
    start, end, now = read.not_valid_before_utc, pki.expiry(read), datetime.now(UTC)
    if now < start:
        return Finding(what, Grade.FAILED, f"is valid from {start:%Y-%m-%d %H:%M} UTC only", "set this machine's clock")
    if now >= end:
        return Finding(what, Grade.FAILED, f"expired on {end:%Y-%m-%d %H:%M} UTC", renew)
    found = f"valid for {(end - now).days} days, until {end:%Y-%m-%d}"
    return Finding(what, Grade.WARNING, found, renew) if end - now < _SOON else Finding(what, Grade.OK, found)


def coordinator_at(address: str, ca: Path) -> list[Finding]:
    """Check the coordinator's certificate, and this machine's clock, by a request to its gateway.

    Args:
        address: Host and port.
        ca: The certificate of the federation's authority.
    """
    host, _, port = address.rpartition(":")
    what = "coordinator"
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError):
        return []  # the check of the authority's certificate says so
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context)
    try:
        connection.request("GET", "/health")
        assert connection.sock is not None, "it is connected"
        presented = connection.sock.getpeercert(binary_form=True)
        response = connection.getresponse()
        status, date = response.status, response.headers["Date"]
    except ssl.SSLCertVerificationError as error:
        cure = _TLS_CURES.get(
            error.verify_code, "use the tls/ca.crt of this federation, as the coordinator hands it out"
        )
        return [Finding(what, Grade.FAILED, f"{address} is refused: {error.verify_message}", cure)]
    except (OSError, http.client.HTTPException) as error:
        cure = "start it, or open the way to it in the firewalls between"
        return [Finding(what, Grade.WARNING, f"{address} cannot be reached ({first_line(error)})", cure)]
    finally:
        connection.close()
    assert presented is not None, "a server presents a certificate"
    found = f"{address} answers, with a certificate for this name by this federation's authority"
    if status == http.client.OK:
        state = Finding(what, Grade.OK, found)
    else:
        cure = "its operator: start fedlora-superlink anew, and see its log"
        state = Finding(what, Grade.WARNING, f"{found}, but with status {status}: its SuperLink is not there", cure)
    return [
        state,
        _validity(
            "its certificate", x509.load_der_x509_certificate(presented), "its operator: fedlora deploy renew FOLDER"
        ),
        _clock(date),
    ]


def versions_at(address: str, ca: Path) -> dict[str, str] | None:
    """Return the coordinator's versions by package, as its gateway gives them; None where it does not answer."""
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=ca)
        connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=_TIMEOUT_S, context=context)
        with closing(connection):
            connection.request("GET", HEALTH)
            said = connection.getresponse().headers[VERSIONS]
    except (OSError, http.client.HTTPException):
        return None  # the check of the coordinator says why
    pairs = (one.partition("=") for one in (said or "").split())
    return {name: version for name, _, version in pairs if version} or None


def _clock(date: str | None) -> Finding:
    what, cure = "clock", "set this machine's clock and keep it set, such as by systemd-timesyncd or chrony"
    if date is None:
        return Finding(what, Grade.WARNING, "the coordinator sends no date to compare with", "update its fedlora")
    ahead = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    found = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if not -_BEHIND_S < ahead < _AHEAD_S:
        return Finding(what, Grade.FAILED, f"{found}: Flower refuses this site", cure)
    near = -_BEHIND_S / 5 < ahead < _AHEAD_S / 2
    return Finding(what, Grade.OK, found) if near else Finding(what, Grade.WARNING, found, cure)


def disk(folder: Path) -> Finding:
    """Check the space on the disk of a folder, or of the nearest folder above it that exists."""
    place = next(one for one in (folder, *folder.parents) if one.is_dir())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free for {folder}"
    least, comfortable = _DISK
    grade = Grade.FAILED if free < least else Grade.WARNING if free < comfortable else Grade.OK
    return Finding("disk", grade, found, "" if grade is Grade.OK else "make room, or move the folder to a larger disk")


def gpu() -> Finding:
    """Check whether PyTorch sees the GPU that there is."""
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Finding("GPU", Grade.OK, f"{count} of {torch.cuda.get_device_name(0)}")
    if Path("/dev/nvidiactl").exists():
        cure = "install PyTorch's CUDA build (without constraints.txt), and a driver that fits it"
        return Finding("GPU", Grade.WARNING, f"there is one, but torch {torch.__version__} does not see it", cure)
    return Finding("GPU", Grade.OK, f"none; training on {os.cpu_count()} CPU cores")


def port(number: int, what: str, key: str) -> Finding:
    """Check that a port is free, or is used by fedlora itself.

    Args:
        number: The port.
        what: What uses it.
        key: The key that sets it.
    """
    using = [one for one in psutil.net_connections("tcp") if one.laddr and one.laddr.port == number]
    listening = next((one for one in using if one.status == psutil.CONN_LISTEN), None)
    what = f"port {number} ({what})"
    if listening is None:
        return Finding(what, Grade.OK, "free")
    try:
        command = " ".join(psutil.Process(listening.pid).cmdline()) if listening.pid else ""
    except psutil.Error:
        command = ""
    if any(name in command for name in _OURS):
        return Finding(what, Grade.OK, f"used by fedlora, process {listening.pid}")
    if not command:
        return Finding(what, Grade.WARNING, "used by another user's process", "run as root to see by which")
    return Finding(what, Grade.FAILED, f"used by {command[:60]}", f"end that program, or set another {key}")
