"""`fedlora deploy init`: the folder is whole or not there, and what reads its files takes them."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import stat
import subprocess
from argparse import ArgumentParser
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.supernode.register import try_load_public_key
from rich.console import Console

from clients.site_file import SiteFile
from deploy import init, pki
from deploy.coordinator_file import CoordinatorFile
from deploy.init import Setup, initialise, renew
from fedlora.config import from_toml
from fedlora.privacy import least_noise_multiplier
from simulations.setup import resolve

SETUP = Setup(("a", "b-2", "c"), "10.0.0.1", names=("coordinator.example.org",), port=8444, rows=500)
UNITS = ("fedlora-superlink", "fedlora-run", "fedlora-site", "fedlora-supernode")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three sites; tests do not change it."""
    folder = tmp_path_factory.mktemp("init") / "federation"
    initialise(folder, SETUP)
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- what is there ----------------------------------------------------------------------------------------


def test_the_coordinators_file_is_read_and_names_what_is_there(federation: Path) -> None:
    file = CoordinatorFile.read(federation / "coordinator/coordinator.toml")
    assert (file.port, file.link_port, list(file.sites)) == (8444, 39300, ["a", "b-2", "c"])
    for path in (file.ca, file.certificate, file.key, file.signing_key, file.run, *file.sites.values()):
        assert path.is_file(), path
    assert file.database.parent.is_dir()
    certificate = pki.read_certificate(file.certificate)
    assert pki.names(certificate) == ("10.0.0.1", "coordinator.example.org", "localhost", "127.0.0.1")
    assert pki.signed_by(certificate, pki.read_certificate(file.ca))
    assert pki.is_key_of(file.key, certificate)


@pytest.mark.parametrize("name", SETUP.sites)
def test_a_sites_file_is_read_and_has_its_own_key(name: str, federation: Path) -> None:
    site = SiteFile.read(federation / f"sites/{name}/site.toml")
    assert (site.name, site.public.rows, site.public.classes) == (name, 500, "neg,pos")
    assert (site.limits.dp_required, site.limits.max_epsilon, site.limits.strategies) == (True, 16.0, ("ffa-lora",))
    assert site.supernode is not None
    assert site.supernode.superlink == "10.0.0.1:8444"
    public = site.beside(site.supernode.key).with_suffix(".pub")
    assert public.read_bytes() == (federation / f"coordinator/keys/{name}.pub").read_bytes()
    assert try_load_public_key(public)


def test_each_site_has_another_key(federation: Path) -> None:
    assert len({path.read_text().split()[1] for path in (federation / "coordinator/keys").iterdir()}) == 3


def test_the_run_can_be_resolved_and_sites_allow_it(federation: Path) -> None:
    """Nothing of it is refused before training, with the noise that keeps to its budget."""
    config = resolve(from_toml((federation / "coordinator/run.toml").read_text()))
    assert config.federation.site_names == SETUP.sites
    assert config.run.dir == str(federation / "coordinator/runs")
    privacy = config.privacy
    noise = least_noise_multiplier(
        target_epsilon=privacy.epsilon,
        target_delta=privacy.delta,
        sample_rate=config.train.batch_size / privacy.client_size,
        steps=config.rounds * config.train.local_steps,
        accountant="pld",
    )
    site = SiteFile.read(federation / "sites/a/site.toml")
    site.limits.check(replace(config, privacy=replace(privacy, noise_multiplier=noise)))


def test_flower_finds_the_connection(federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(federation / "coordinator/flwr"))
    for name in (None, "deployment"):
        connection = read_superlink_connection(name)
        assert connection.address == "127.0.0.1:39300"
        assert connection.root_certificates == str(federation / "coordinator/tls/ca.crt")
        assert not connection.insecure


def test_secrets_are_where_they_belong_and_nobody_else_reads_them(federation: Path) -> None:
    private = {
        "ca/ca.key",
        "coordinator/tls/server.key",
        "coordinator/signing/adapter.key",
        *(f"sites/{name}/keys/supernode" for name in SETUP.sites),
    }
    files = {str(path.relative_to(federation)): path for path in federation.rglob("*") if path.is_file()}
    assert {name for name, path in files.items() if b"PRIVATE KEY" in path.read_bytes()} == private
    for name in private:
        assert mode(files[name]) == 0o600
        assert mode(files[name].parent) == 0o700
    assert {mode(path) for name, path in files.items() if name not in private} == {0o644}


# -- systemd and Docker -----------------------------------------------------------------------------------


def unit(federation: Path, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string((federation / f"systemd/{name}.service").read_text())
    return dict(parser["Service"])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_hardened(name: str, federation: Path) -> None:
    service = unit(federation, name)
    wanted = {"NoNewPrivileges": "yes", "ProtectSystem": "strict", "PrivateTmp": "yes", "RestartSec": "5"}
    assert wanted.items() <= service.items()
    assert service["UMask"] == "0077"
    assert service["CapabilityBoundingSet"] == ""
    assert service["Restart"] == ("on-failure" if name == "fedlora-run" else "always")


def test_the_supernode_is_another_user_and_sees_no_data(federation: Path) -> None:
    site, supernode = unit(federation, "fedlora-site"), unit(federation, "fedlora-supernode")
    assert (site["User"], supernode["User"]) == ("fedlora", "flower")
    assert site["PrivateNetwork"] == "yes", "the process with the data has no network"
    assert "PrivateNetwork" not in supernode
    assert site["SupplementaryGroups"] == supernode["Group"], "so that the daemon may give the socket to that group"
    assert supernode["TemporaryFileSystem"] == "/var/lib/fedlora:ro"
    seen = {path.removeprefix(f"{init.SITE_FOLDER}/") for path in supernode["BindReadOnlyPaths"].split()}
    assert seen == {"site.toml", "tls", "keys", "run"}
    assert "ReadWritePaths" not in supernode


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_units(federation: Path, tmp_path: Path) -> None:
    """With a program that is there in place of fedlora's; and it does find a key that is misspelt."""
    for name in UNITS:
        text = (federation / f"systemd/{name}.service").read_text()
        text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE)
        (tmp_path / f"{name}.service").write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.glob("*.service"))]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    (tmp_path / "fedlora-site.service").write_text(text.replace("NoNewPrivileges", "NoNewPrivilege"))
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "NoNewPrivilege" in said.stderr


def compose_services(path: Path) -> dict[str, Any]:
    """Read a compose file as Docker resolves it; by PyYAML where there is no `docker compose`."""
    docker = shutil.which("docker")
    if docker and subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode == 0:
        command = [docker, "compose", "-f", str(path), "--profile", "*", "config", "--format", "json"]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        services: dict[str, Any] = json.loads(said.stdout)["services"]
        return services
    yaml = pytest.importorskip("yaml", reason="neither `docker compose` nor PyYAML is installed")
    services = yaml.safe_load(path.read_text())["services"]
    return services


def sources(service: dict[str, Any]) -> set[str]:
    """The host's paths that a service sees."""
    found = (one["source"] if isinstance(one, dict) else one.split(":")[0] for one in service["volumes"])
    return {path for path in found if path.startswith("/")}


@pytest.mark.parametrize("name", ["coordinator", "site"])
def test_containers_are_hardened_by_docker_compose_or_else_pyyaml(name: str, federation: Path) -> None:
    for service in compose_services(federation / f"docker/compose.{name}.yaml").values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["image"] == "fedlora"
        assert service["command"][0] == "fedlora"


def test_the_coordinators_containers_see_its_folder_at_the_same_path(federation: Path) -> None:
    """Flower's connection file names certificates by absolute paths."""
    services = compose_services(federation / "docker/compose.coordinator.yaml")
    folder = str(federation / "coordinator")
    for service in services.values():
        assert sources(service) == {folder}
        assert service["command"][-1] == f"{folder}/coordinator.toml"
    assert services["run"]["network_mode"] == "service:superlink"
    assert "8444" in str(services["superlink"]["ports"])


def test_the_sites_containers_are_two_users_and_only_one_has_the_network(federation: Path) -> None:
    services = compose_services(federation / "docker/compose.site.yaml")
    daemon, supernode = services["daemon"], services["supernode"]
    assert daemon["network_mode"] == "none"
    assert "network_mode" not in supernode
    assert daemon["user"] != supernode["user"]
    parts = {path.removeprefix(f"{init.SITE_FOLDER}/") for path in sources(supernode)}
    assert parts == {"site.toml", "tls", "keys", "run"}
    numbers = re.findall(r"--uid (\d+)", (federation / "docker/Dockerfile").read_text())
    assert {f"{number}:{number}" for number in numbers} == {daemon["user"], supernode["user"]}


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ()}, "sites: must name one site or more"),
        ({"sites": ("a", "b", "a")}, "'a' is there twice"),
        *(({"sites": (name,)}, "small letters, digits and hyphens") for name in ("A", "-a", "", "a/b", "..", "a.b")),
        ({"address": "https://a"}, "'https://a': is neither a host name nor an IP address"),
        ({"port": 0}, "port = 0: must be between 1 and 65535"),
        ({"port": 39300}, "port = 39300: .* Flower's own"),
        ({"rows": 0}, "rows = 0: must be at least 1"),
        ({"classes": ""}, "classes: must be given"),
        ({"classes": "neg"}, "data.classes = 'neg': must be two names or more"),
        ({"model": " "}, "model.name = ' ': must name a model"),
    ],
)
def test_what_cannot_be_set_up(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup(**{**vars(SETUP), **changes})


@pytest.mark.parametrize("there", ["file in it", "file", "link to a full one"])
def test_what_is_there_is_left_alone(there: str, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    folder = {"file in it": full, "file": full / "mine", "link to a full one": tmp_path / "link"}[there]
    if there == "link to a full one":
        folder.symlink_to(full)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="is there already, and not empty"):
        initialise(folder, SETUP)
    assert sorted(tmp_path.rglob("*")) == before
    assert (full / "mine").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    initialise(tmp_path / "empty", SETUP)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    assert (tmp_path / "empty/coordinator/coordinator.toml").is_file()


@pytest.mark.parametrize(
    ("folder", "message"),
    [("no/such", "there is no folder .*no; make it first"), ("a b", "a path of letters"), ("a%b", "a path of letters")],
)
def test_folders_that_cannot_be_used(folder: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        initialise(tmp_path / folder, SETUP)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_one_that_fails_on_the_way(tmp_path: Path) -> None:
    """The authority would end before the server's certificate: found after the authority was written."""
    with pytest.raises(ValueError, match="choose fewer days"):
        initialise(tmp_path / "federation", Setup(("a",), "10.0.0.1", days=4000))
    assert list(tmp_path.iterdir()) == []


def test_texts_are_what_they_are_in_toml(tmp_path: Path) -> None:
    """Names with quotes and backslashes, and an IPv6 address."""
    wanted = Setup(("a",), "2001:db8::1", classes='"yes",no\\maybe', model='org/"model"')
    initialise(tmp_path / "federation", wanted)
    site = SiteFile.read(tmp_path / "federation/sites/a/site.toml")
    assert site.public.classes == wanted.classes
    assert dict(site.models) == {wanted.model: wanted.model}
    assert site.supernode is not None
    assert site.supernode.superlink == "[2001:db8::1]:8443"
    flat = from_toml((tmp_path / "federation/coordinator/run.toml").read_text())
    assert (flat["model.name"], flat["data.classes"]) == (wanted.model, wanted.classes)


# -- renewing ---------------------------------------------------------------------------------------------


def test_a_renewed_certificate_has_the_same_names_and_authority(tmp_path: Path) -> None:
    initialise(tmp_path / "federation", Setup(("a",), "10.0.0.1", days=3))
    tls = tmp_path / "federation/coordinator/tls"
    before = pki.read_certificate(tls / "server.crt")
    renew(tmp_path / "federation")
    after = pki.read_certificate(tls / "server.crt")
    assert pki.names(after) == pki.names(before)
    assert (pki.expiry(after) - pki.expiry(before)).days >= 361
    assert pki.signed_by(after, pki.read_certificate(tmp_path / "federation/sites/a/tls/ca.crt"))
    assert pki.is_key_of(tls / "server.key", after)
    assert mode(tls / "server.key") == 0o600
    assert sorted(path.name for path in tls.iterdir()) == ["ca.crt", "server.crt", "server.key"]


def test_without_the_authoritys_key_nothing_is_renewed(tmp_path: Path) -> None:
    initialise(tmp_path / "federation", SETUP)
    (tmp_path / "federation/ca/ca.key").rename(tmp_path / "offline")
    before = (tmp_path / "federation/coordinator/tls/server.crt").read_bytes()
    with pytest.raises(ValueError, match="bring the authority's key back"):
        renew(tmp_path / "federation")
    assert (tmp_path / "federation/coordinator/tls/server.crt").read_bytes() == before


# -- the command and the coordinator's file ---------------------------------------------------------------


def test_the_commands(tmp_path: Path) -> None:
    parser, said = ArgumentParser(), StringIO()
    init.add_init_arguments(parser)
    folder = str(tmp_path / "federation")
    options = parser.parse_args([folder, "--sites", "a, b", "--address", "10.0.0.1", "--also", "x.org"])
    assert init.run_init(options, Console(file=said, width=300)) == 0
    for part in ("coordinator/", "ca/", "sites/a/", "sites/b/", "10.0.0.1:8443"):
        assert part in said.getvalue()
    parser = ArgumentParser()
    init.add_renew_arguments(parser)
    assert init.run_renew(parser.parse_args([folder]), Console(file=said, width=300)) == 0
    assert "restart fedlora-superlink" in said.getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1\n[sites]\na = 'a.pub'", r"\[server\]: unknown key 'prot'. Did you mean 'port'\?"),
        ("[server]\nport = '1'\n[sites]\na = 'a.pub'", r"port = '1': must be a whole number"),
        ("[server]\nport = 70000\n[sites]\na = 'a.pub'", r"port = 70000: must be between 1 and 65535"),
        ("[server]\nport = 1\nlink-port = 1\n[sites]\na = 'a.pub'", r"link-port = 1: is the port of the gateway"),
        ("[server]\n", r"sites: must be given"),
        ("[server]\n[sites]\n", r"\[sites\]: must name a site"),
        ("[server]\n[sites]\nA = 'a.pub'", r"\[sites\] 'A': a name must be small letters"),
        ("[server]\n[sites]\na = 'a.pub'\nb = 'a.pub'", r"'a.pub': is another site's key, too"),
        ("[sevrer]\n[sites]\na = 'a.pub'", r"unknown key 'sevrer'"),
        ("[server", r"the coordinator's file cannot be read from"),
    ],
)
def test_a_coordinators_file_that_cannot_work(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        CoordinatorFile.read(tmp_path / "coordinator.toml")
