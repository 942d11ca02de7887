"""Whom the coordinator trusts: the keys of its sites, its authority's certificate, its own."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes


def keys_of(sites: Mapping[str, Path]) -> dict[bytes, tuple[str, ec.EllipticCurvePublicKey]]:
    """Return name and key of each site, by the key as its SuperNode sends it."""
    return {public_key_to_bytes(key): (name, key) for name, key in read_public_keys(sites).items()}


def read_public_keys(sites: Mapping[str, Path]) -> dict[str, ec.EllipticCurvePublicKey]:
    """Read each site's public key.

    Raises:
        ValueError: One cannot be read, is of a kind that Flower does not take, or is another site's, too.
    """
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    for name, path in sites.items():
        try:
            key = load_ssh_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ValueError(f"[sites] {name} = {str(path)!r}: cannot be read as a public key ({error}).") from error
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError(f"[sites] {name} = {str(path)!r}: must be an ECDSA key: ssh-keygen -t ecdsa -b 384.")
        if other := next((one for one, known in keys.items() if known == key), None):
            raise ValueError(f"[sites] {name} = {str(path)!r}: is the key of site {other}, too; each has its own.")
        keys[name] = key
    return keys


def authority(ca: Path) -> ssl.SSLContext:
    """Return what verifies certificates against the federation's own authority, and no other.

    Raises:
        ValueError: Its certificate cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(ca)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(f"ca = {str(ca)!r}: cannot be read as a certificate ({error}).") from error
    return context


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """Return what a server presents its certificate with.

    Raises:
        ValueError: Certificate or key cannot be read, or they do not fit.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise ValueError(
            f"certificate = {str(certificate)!r} and key = {str(key)!r}: cannot be read, or do not fit ({error})."
        ) from error
    return context
