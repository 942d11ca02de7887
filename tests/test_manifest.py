"""The signed manifest of an adapter: every way in which a folder can differ from what was signed is found."""

from __future__ import annotations

import json
import shutil
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from deploy import manifest
from deploy.manifest import Origin, sign, verify
from deploy.pki import create_signing_key, read_signing_key

ORIGIN = Origin("first", 3, "minilm", "ab" * 32, "(8, 1e-5)-DP in each record, \u03b5 = 7.9")


def signed(folder: Path, key: str = "adapter.key") -> None:
    sign(folder, folder.parent / key, **vars(ORIGIN))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A signed adapter, with its key beside it."""
    folder = tmp_path / "adapter"
    (folder / "more").mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "more" / "r\u00e4nge.json").write_text("[1]")
    create_signing_key(tmp_path / "adapter.key", tmp_path / "adapter.pub")
    signed(folder)
    return folder


def check(folder: Path) -> manifest.Manifest:
    return verify(folder, folder.parent / "adapter.pub")


def test_what_was_signed_is_verified(adapter: Path) -> None:
    found = check(adapter)
    assert found.origin == ORIGIN
    assert sorted(found.files) == ["adapter_config.json", "adapter_model.safetensors", "more/r\u00e4nge.json"]
    assert found.files["adapter_model.safetensors"][1] == 25600


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_signature(adapter: Path) -> None:
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "../adapter.pub", "-rawin"]
    command += ["-in", "manifest.json", "-sigfile", "manifest.sig"]
    assert subprocess.run(command, cwd=adapter, capture_output=True, check=False).returncode == 0
    (adapter / "manifest.json").write_text("{}")
    assert subprocess.run(command, cwd=adapter, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_the_hashes_are_those_of_sha256sum(adapter: Path) -> None:
    for name, (digest, _) in check(adapter).files.items():
        said = subprocess.run(["sha256sum", name], cwd=adapter, capture_output=True, text=True, check=True).stdout
        assert said.split()[0] == digest


def flip(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[12345] ^= 1
    file.write_bytes(data)


def sign_again(folder: Path) -> None:
    create_signing_key(folder.parent / "other.key", folder.parent / "other.pub")
    signed(folder, "other.key")


def forge(folder: Path) -> None:
    """A better guarantee than was given."""
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("7.9", "0.9"))


def link_file(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.rename(folder.parent / "elsewhere.json")
    file.symlink_to(folder.parent / "elsewhere.json")


def link_folder(folder: Path) -> None:
    (folder / "more").rename(folder.parent / "elsewhere")
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def link_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere.json")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere.json")


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed file": (flip, r"adapter_model.safetensors is not the file that was signed"),
    "a longer file": (
        lambda folder: (folder / "adapter_config.json").write_text("{} "),
        r"adapter_config.json is not the file that was signed",
    ),
    "a missing file": (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config.json is missing"),
    "an added file": (lambda folder: (folder / "more" / "x.py").write_text(""), r"more/x.py was added \(1 in all\)"),
    "a manifest in a folder": (
        lambda folder: shutil.copy(folder / "manifest.json", folder / "more"),
        r"more/manifest.json was added",
    ),
    "another key": (sign_again, r"manifest.sig is no signature of manifest.json by this key"),
    "a forged manifest": (forge, r"manifest.sig is no signature of manifest.json by this key"),
    "a cut signature": (
        lambda folder: (folder / "manifest.sig").write_bytes((folder / "manifest.sig").read_bytes()[:-1]),
        r"manifest.sig is no signature",
    ),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest.json"),
    "no signature": (lambda folder: (folder / "manifest.sig").unlink(), r"has no manifest.sig"),
    "a huge manifest": (
        lambda folder: (folder / "manifest.json").write_bytes(bytes((1 << 24) + 1)),
        r"manifest.json is too large",
    ),
    "a link to a file": (link_file, r"adapter_config.json is a link"),
    "a link to a folder": (link_folder, r"more is a link"),
    "a link for the manifest": (link_manifest, r"manifest.json is a link"),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_differs_is_named(what: str, adapter: Path) -> None:
    plant, message = PLANTED[what]
    plant(adapter)
    with pytest.raises(ValueError, match=message):
        check(adapter)


def test_a_manifest_of_a_later_version_is_not_half_understood(adapter: Path) -> None:
    path = adapter / "manifest.json"
    data = json.dumps({**json.loads(path.read_text()), "format": 2}).encode()
    path.write_bytes(data)
    (adapter / "manifest.sig").write_bytes(read_signing_key(adapter.parent / "adapter.key").sign(data))
    with pytest.raises(ValueError, match="the manifest has format 2, and this fedlora reads 1"):
        check(adapter)


def test_signing_again_replaces_the_manifest(adapter: Path) -> None:
    flip(adapter)
    signed(adapter)
    assert len(check(adapter).files) == 3


def test_what_cannot_be_signed(tmp_path: Path) -> None:
    create_signing_key(tmp_path / "adapter.key", tmp_path / "adapter.pub")
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "nothing to sign"), (tmp_path / "none", "is not a folder")):
        with pytest.raises(ValueError, match=message):
            signed(folder)


@pytest.mark.parametrize(("plant", "code"), [(lambda _: None, 0), (flip, 1)])
def test_the_command(plant: Callable[[Path], object], code: int, adapter: Path) -> None:
    plant(adapter)
    parser, said = ArgumentParser(), StringIO()
    manifest.add_arguments(parser)
    options = parser.parse_args([str(adapter), "--key", str(adapter.parent / "adapter.pub")])
    assert manifest.run_verify(options, Console(file=said, width=300)) == code
    text = said.getvalue()
    expected = "not verified: " if code else f"privacy: {ORIGIN.guarantee}"
    assert expected in text
