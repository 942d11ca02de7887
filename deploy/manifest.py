"""The signed manifest of an adapter folder: what the coordinator released, and how anybody can tell that it is that.

``manifest.json`` has the SHA-256 and size of every other file, and where the adapter comes from; ``manifest.sig`` is
the raw Ed25519 signature of exactly its bytes, which OpenSSL checks as well:
``openssl pkeyutl -verify -pubin -inkey adapter.pub -rawin -in manifest.json -sigfile manifest.sig``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from cryptography.exceptions import InvalidSignature
from rich.console import Console

from deploy.pki import read_signing_key, read_verifying_key
from fedlora.storage import write_whole

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
_FORMAT = 1
_MOST_BYTES = 1 << 24  # of a manifest: whoever made it, it is read before its signature is checked
_OWN = (MANIFEST, SIGNATURE)


@final
@dataclass(frozen=True)
class Origin:
    """Where an adapter comes from.

    Attributes:
        run: Name of the run.
        rounds: The rounds after which it was saved.
        base_model: The base model that it goes on (``model.name``).
        base_digest: Digest of that model's weights and vocabulary, as :class:`fedlora.models.Base` has it.
        guarantee: The privacy that it was trained with, in words.
    """

    run: str
    rounds: int
    base_model: str
    base_digest: str
    guarantee: str


@final
@dataclass(frozen=True)
class Manifest:
    """What a verified folder says of itself.

    Attributes:
        origin: Where the adapter comes from.
        time: When it was signed, in UTC.
        files: SHA-256 and size of each file, by its path in the folder.
    """

    origin: Origin
    time: str
    files: Mapping[str, tuple[str, int]]


def sign(folder: Path, key: Path, *, run: str, rounds: int, base_model: str, base_digest: str, guarantee: str) -> None:
    """Write the manifest of an adapter folder and its signature, in place of those that may be there.

    Args:
        folder: The adapter's folder.
        key: The coordinator's ``signing/adapter.key``.
        run: See :class:`Origin`, as for what follows.
        rounds: See there.
        base_model: See there.
        base_digest: See there.
        guarantee: See there.

    Raises:
        ValueError: The key cannot be read, the folder holds no files, or something that is neither file nor folder.
    """
    private = read_signing_key(key)
    origin = Origin(run, rounds, base_model, base_digest, guarantee)
    files = {name: _fingerprint(folder / name) for name in _listed(folder)}
    if not files:
        raise ValueError(f"{folder}: there is nothing to sign in it.")
    content = {
        "format": _FORMAT,
        **asdict(origin),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: {"sha256": digest, "bytes": size} for name, (digest, size) in files.items()},
    }
    data = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    write_whole(folder / MANIFEST, data)
    write_whole(folder / SIGNATURE, private.sign(data))


def verify(folder: Path, key: Path) -> Manifest:
    """Check an adapter folder against its signed manifest.

    Args:
        folder: The adapter's folder.
        key: The federation's ``signing/adapter.pub``.

    Returns:
        The manifest.

    Raises:
        ValueError: The key cannot be read, or the folder is not what its owner has signed, with what differs.
    """
    public = read_verifying_key(key)
    present = set(_listed(folder))  # refuses links first: nothing outside the folder is read
    data, signature = (_own(folder, name) for name in _OWN)
    try:
        public.verify(signature, data)
    except InvalidSignature:
        raise ValueError(
            f"{folder}: {SIGNATURE} is no signature of {MANIFEST} by this key: the manifest was changed, or the "
            "adapter was signed by somebody else. Get both, adapter and key, from the coordinator again."
        ) from None
    manifest = _read(folder, data)
    for name, (digest, size) in manifest.files.items():
        if name not in present:
            raise ValueError(f"{folder}: {name} is missing; the manifest lists it.")
        if _fingerprint(folder / name) != (digest, size):
            raise ValueError(f"{folder}: {name} is not the file that was signed; its content was changed.")
    added = sorted(present - manifest.files.keys())
    if added:
        raise ValueError(f"{folder}: {added[0]} was added ({len(added)} in all); the manifest does not list it.")
    return manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fedlora verify``."""
    parser.add_argument("folder", type=Path, help="the adapter's folder, with manifest.json and manifest.sig")
    parser.add_argument("--key", type=Path, required=True, help="the federation's signing/adapter.pub")


def run_verify(options: argparse.Namespace, console: Console) -> int:
    """Carry out ``fedlora verify``: 0 when the folder is what was signed, 1 when it is not.

    Raises:
        ValueError: The key cannot be read.
    """
    key = options.key.expanduser()
    read_verifying_key(key)  # a wrong key says nothing of the folder
    try:
        manifest = verify(options.folder.expanduser().resolve(), key)
    except ValueError as error:
        console.print(f"fedlora: not verified: {error}", markup=False, style="bold red")
        return 1
    origin = manifest.origin
    lines = [
        f"verified: {len(manifest.files)} files are what the owner of {options.key} signed at {manifest.time}",
        f"run {origin.run}, after {origin.rounds} rounds",
        f"base model {origin.base_model}, digest {origin.base_digest}",
        f"privacy: {origin.guarantee}",
    ]
    console.print("\n".join(lines), markup=False)
    return 0


def _listed(folder: Path) -> list[str]:
    """Return the paths of all files but the manifest's own, sorted.

    Raises:
        ValueError: There is no such folder, or it holds a link or something else that is no file.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; give the adapter's own.")
    found = []
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{folder}: {path.relative_to(folder)} is a link or a device; only files are signed.")
        found += [Path(place, name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in found if name not in _OWN)


def _own(folder: Path, name: str) -> bytes:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder}: has no {name}, so nobody vouches for it; get the whole folder.")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{folder}: {name} is too large to be one.")
    return path.read_bytes()


def _fingerprint(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def _read(folder: Path, data: bytes) -> Manifest:
    """Return the manifest in bytes whose signature was checked: only another version of fedlora can fail here."""
    content: dict[str, Any] = json.loads(data)
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{folder}: the manifest has format {content.get('format')!r}, and this fedlora reads {_FORMAT}; verify it "
            "with the version that signed it."
        )
    origin = Origin(**{item.name: content[item.name] for item in fields(Origin)})
    files = {name: (entry["sha256"], entry["bytes"]) for name, entry in content["files"].items()}
    return Manifest(origin, content["time"], files)
