"""Certificates and keys: what Flower, OpenSSL and ssh-keygen make of them, who can read them, and what is refused."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from argparse import Namespace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.args import try_obtain_root_certificates, try_obtain_server_certificates
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

from deploy import new_files, pki


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def authority(folder: Path, name: str = "ca") -> tuple[Path, Path]:
    key, certificate = folder / f"{name}.key", folder / f"{name}.crt"
    pki.create_authority(key, certificate)
    return key, certificate


def server(folder: Path, names: tuple[str, ...] = ("10.0.0.1", "coordinator.example.org"), days: int = 365) -> Path:
    ca_key, ca = folder / "ca.key", folder / "ca.crt"
    if not ca.exists():
        authority(folder)
    pki.create_server_certificate(
        folder / "server.key", folder / "server.crt", authority_key=ca_key, authority=ca, names=names, days=days
    )
    return folder / "server.crt"


def test_a_supernode_key_is_one_that_flower_takes(tmp_path: Path) -> None:
    """Flower's own functions for --auth-supernode-private-key and `flwr supernode register`, on the files."""
    public = pki.create_supernode_key(tmp_path / "supernode", "a")
    options = Namespace(auth_supernode_private_key=str(tmp_path / "supernode"), auth_supernode_public_key=None)
    keys = _try_setup_client_authentication(options)
    assert keys is not None
    assert isinstance(keys[0].curve, ec.SECP384R1)
    assert try_load_public_key(public) == public_key_to_bytes(keys[1])
    assert mode(tmp_path / "supernode") == 0o600


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_ssh_keygen_reads_the_key_and_has_the_same_public_half(tmp_path: Path) -> None:
    public = pki.create_supernode_key(tmp_path / "supernode", "a")
    said = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "supernode")], capture_output=True, text=True, check=True
    )
    assert said.stdout.split()[:2] == public.read_text().split()[:2]
    size = subprocess.run(["ssh-keygen", "-l", "-f", str(public)], capture_output=True, text=True, check=True)
    assert size.stdout.startswith("384 ")
    assert size.stdout.strip().endswith("a (ECDSA)")


def test_flower_takes_the_certificates_of_a_superlink(tmp_path: Path) -> None:
    certificate = server(tmp_path)
    options = Namespace(
        ssl_certfile=str(certificate),
        ssl_keyfile=str(tmp_path / "server.key"),
        ssl_ca_certfile=str(tmp_path / "ca.crt"),
        root_certificates=str(tmp_path / "ca.crt"),
        insecure=False,
    )
    loaded = try_obtain_server_certificates(options)
    assert loaded is not None
    assert [part.splitlines()[0] for part in loaded] == [
        b"-----BEGIN CERTIFICATE-----",
        b"-----BEGIN CERTIFICATE-----",
        b"-----BEGIN PRIVATE KEY-----",
    ]
    assert try_obtain_root_certificates(options, "") == (tmp_path / "ca.crt").read_bytes()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (["-verify_ip", "10.0.0.1"], True),
        (["-verify_ip", "127.0.0.1"], True),
        (["-verify_hostname", "coordinator.example.org"], True),
        (["-verify_hostname", "localhost"], True),
        (["-verify_ip", "10.0.0.2"], False),
        (["-purpose", "sslserver"], True),
        (["-purpose", "sslclient"], False),
    ],
)
def test_openssl_agrees_on_what_the_certificate_is_for(check: list[str], holds: bool, tmp_path: Path) -> None:
    """Also under -x509_strict, which newer Pythons demand of a certificate."""
    certificate = server(tmp_path)
    command = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "ca.crt"), *check, str(certificate)]
    assert (subprocess.run(command, capture_output=True, check=False).returncode == 0) == holds


def test_what_a_certificate_says(tmp_path: Path) -> None:
    certificate = pki.read_certificate(server(tmp_path, names=("2001:db8::1", "Coordinator.Example.org"), days=90))
    assert pki.names(certificate) == ("2001:db8::1", "coordinator.example.org", "localhost", "127.0.0.1")
    left = pki.expiry(certificate) - datetime.now(UTC)
    assert timedelta(days=89) < left <= timedelta(days=90)
    assert pki.signed_by(certificate, pki.read_certificate(tmp_path / "ca.crt"))
    assert pki.is_key_of(tmp_path / "server.key", certificate)
    assert not pki.is_key_of(tmp_path / "ca.key", certificate)


def test_another_authority_of_the_same_name_has_not_signed(tmp_path: Path) -> None:
    certificate = pki.read_certificate(server(tmp_path))
    _, other = authority(tmp_path, "other")
    assert not pki.signed_by(certificate, pki.read_certificate(other))


def test_a_key_that_is_not_the_authoritys_signs_nothing(tmp_path: Path) -> None:
    _, ca = authority(tmp_path)
    other, _ = authority(tmp_path, "other")
    with pytest.raises(ValueError, match=r"other.key: is not the key of the certificate .*ca.crt"):
        pki.create_server_certificate(
            tmp_path / "server.key", tmp_path / "server.crt", authority_key=other, authority=ca, names=("a",)
        )
    assert not (tmp_path / "server.key").exists()


@pytest.mark.parametrize("days", [0, 4000])
def test_days_that_cannot_be(days: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"days = {days}: "):
        server(tmp_path, days=days)


@pytest.mark.parametrize("name", ["https://a.org", "a.org:8443", "", "a b", "-a", "10.0.0", "a" * 64, "*.a.org", "a_b"])
def test_what_is_no_host_name(name: str) -> None:
    with pytest.raises(ValueError, match="neither a host name nor an IP address"):
        pki.checked_host(name)


def test_private_files_are_private_whatever_the_mask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        server(tmp_path)
        pki.create_supernode_key(tmp_path / "supernode", "a")
        pki.create_signing_key(tmp_path / "adapter.key", tmp_path / "adapter.pub")
        new_files.make_folder(tmp_path / "keys")
    finally:
        os.umask(previous)
    private = ("ca.key", "server.key", "supernode", "adapter.key")
    assert {mode(tmp_path / name) for name in private} == {0o600}
    assert {mode(tmp_path / name) for name in ("ca.crt", "server.crt", "supernode.pub", "adapter.pub")} == {0o644}
    assert mode(tmp_path / "keys") == 0o700


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_secret_is_opened_with_its_mode(tmp_path: Path) -> None:
    """From the first byte: the file is made with O_EXCL and 0600, and not narrowed afterwards."""
    load = "from pathlib import Path; from deploy import new_files"
    code = f"{load}; new_files.write_secret(Path({str(tmp_path / 'x')!r}), b'1')"
    command = ["strace", "-f", "-e", "trace=openat", sys.executable, "-c", code]
    traced = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if not (tmp_path / "x").exists():
        pytest.skip("strace may not trace here")
    (line,) = [line for line in traced.stderr.splitlines() if str(tmp_path / "x") in line]
    assert "O_CREAT|O_EXCL" in line
    assert "0600" in line


@pytest.mark.parametrize("planted", ["file", "link"])
@pytest.mark.parametrize("half", ["key", "key.pub"])
def test_nothing_is_overwritten(half: str, planted: str, tmp_path: Path) -> None:
    """Neither half of a pair is, and a link is not followed; the other half is not written then."""
    target = tmp_path / half
    if planted == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"is there already, and is not overwritten"):
        pki.create_supernode_key(tmp_path / "key", "a")
    with pytest.raises(ValueError, match=r"is there already, and is not overwritten"):
        pki.create_signing_key(tmp_path / "key", tmp_path / "key.pub")
    with pytest.raises(ValueError, match=r"is there already, and is not overwritten"):
        pki.create_authority(tmp_path / "key", tmp_path / "key.pub")
    assert sorted(tmp_path.iterdir()) == before
    if planted == "file":
        assert target.read_text() == "mine"


def test_keys_of_another_kind_are_refused(tmp_path: Path) -> None:
    public = pki.create_supernode_key(tmp_path / "supernode", "a")
    server(tmp_path)
    for path in (tmp_path / "supernode", tmp_path / "server.key", tmp_path / "none"):
        with pytest.raises(ValueError, match=str(path)):
            pki.read_signing_key(path)
    for path in (public, tmp_path / "server.crt", tmp_path / "none"):
        with pytest.raises(ValueError, match=str(path)):
            pki.read_verifying_key(path)
    with pytest.raises(ValueError, match="cannot be read as a certificate"):
        pki.read_certificate(public)
