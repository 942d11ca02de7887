"""Certificates and keys of a deployment.

A certificate authority of the federation's own, the coordinator's server certificate, the SuperNodes' keys as Flower
reads them, and the key that signs adapters.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.new_files import refuse_existing, write_new, write_secret

_AUTHORITY_DAYS = 3650
_BACKDATED = timedelta(hours=1)  # for clocks that are behind
_LOOPBACK = ("localhost", "127.0.0.1")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


# -- the certificate authority and the server's certificate ---------------------------------------------------


def create_authority(key: Path, certificate: Path, name: str = "fedlora federation") -> None:
    """Write the key and the certificate of a new authority, good for ten years.

    It signs server certificates only, and no other authorities.

    Args:
        key: Where the private key goes; to be kept off the network.
        certificate: Where the certificate goes, which everybody trusts.
        name: Its common name.

    Raises:
        ValueError: A file is there already.
    """
    refuse_existing(key, certificate)
    private = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    built = (
        _builder(subject, subject, private.public_key(), _AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(private, hashes.SHA384())
    )
    write_secret(key, _pem(private))
    write_new(certificate, built.public_bytes(Encoding.PEM))


def create_server_certificate(
    key: Path,
    certificate: Path,
    *,
    authority_key: Path,
    authority: Path,
    names: Sequence[str],
    days: int = 365,
) -> None:
    """Write a server's new key, and its certificate signed by the authority.

    Args:
        key: Where the private key goes.
        certificate: Where the certificate goes.
        authority_key: The authority's private key.
        authority: The authority's certificate.
        names: Host names and IP addresses that clients reach the server by; ``localhost`` and ``127.0.0.1`` are added.
        days: How long it is valid.

    Raises:
        ValueError: A file is there already, a name is none, or the authority's files do not fit.
    """
    refuse_existing(key, certificate)
    if days < 1:
        raise ValueError(f"days = {days}: must be at least 1.")
    ca = read_certificate(authority)
    ca_key = serialization.load_pem_private_key(authority_key.read_bytes(), None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or ca_key.public_key() != ca.public_key():
        raise ValueError(f"{authority_key}: is not the key of the certificate {authority}.")
    if datetime.now(UTC) + timedelta(days=days) > expiry(ca):
        raise ValueError(
            f"days = {days}: the authority {authority} itself ends on {expiry(ca):%Y-%m-%d}; choose fewer days."
        )
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora coordinator")])
    private = ec.generate_private_key(ec.SECP384R1())
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    alternatives = [_general_name(name) for name in dict.fromkeys((*map(checked_host, names), *_LOOPBACK))]
    built = (
        _builder(subject, ca.subject, private.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    write_secret(key, _pem(private))
    write_new(certificate, built.public_bytes(Encoding.PEM))


def checked_host(name: str) -> str:
    """Return a host name or IP address in its usual form.

    Raises:
        ValueError: It is neither.
    """
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        pass
    host = name.lower()
    if not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
        raise ValueError(
            f"{name!r}: is neither a host name nor an IP address; give it without https:// and without a port."
        )
    return host


def read_certificate(path: Path) -> x509.Certificate:
    """Read a PEM certificate.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a certificate ({error}).") from error


def expiry(certificate: x509.Certificate) -> datetime:
    """Return when a certificate ends."""
    return certificate.not_valid_after_utc


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Return whether the authority has signed the certificate; whether either is still valid is not looked at."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def names(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the host names and IP addresses that a certificate is for."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(one.value) for one in found if isinstance(one, x509.DNSName | x509.IPAddress))


def is_key_of(key: Path, certificate: x509.Certificate) -> bool:
    """Return whether a PEM private key belongs to a certificate.

    Raises:
        ValueError: The key cannot be read.
    """
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{key}: cannot be read as a private key ({error}).") from error
    return private.public_key() == certificate.public_key()


# -- keys -----------------------------------------------------------------------------------------------------


def create_supernode_key(key: Path, comment: str) -> Path:
    """Write a SuperNode's new key, as ``ssh-keygen -t ecdsa -b 384`` does, and its public half beside it.

    Args:
        key: Where the private key goes, for ``flower-supernode --auth-supernode-private-key``.
        comment: Whose it is; a word.

    Returns:
        The public key, for ``flwr supernode register``.

    Raises:
        ValueError: A file is there already.
    """
    public = key.with_name(f"{key.name}.pub")
    refuse_existing(key, public)
    private = ec.generate_private_key(ec.SECP384R1())
    write_secret(key, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_new(public, line + f" {comment}\n".encode())
    return public


def create_signing_key(key: Path, public: Path) -> None:
    """Write a new Ed25519 key that signs adapters, and its public half, both PEM.

    Raises:
        ValueError: A file is there already.
    """
    refuse_existing(key, public)
    private = ed25519.Ed25519PrivateKey.generate()
    write_secret(key, _pem(private))
    write_new(public, private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def read_signing_key(path: Path) -> ed25519.Ed25519PrivateKey:
    """Read the key that signs adapters.

    Raises:
        ValueError: It cannot be read, or is of another kind.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read as a signing key ({error}).") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(f"{path}: is not an Ed25519 private key; give the coordinator's signing/adapter.key.")
    return key


def read_verifying_key(path: Path) -> ed25519.Ed25519PublicKey:
    """Read the public half of the key that signs adapters.

    Raises:
        ValueError: It cannot be read, or is of another kind.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a public key ({error}).") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"{path}: is not an Ed25519 public key; give the federation's signing/adapter.pub.")
    return key


# -- parts ----------------------------------------------------------------------------------------------------


def _pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
