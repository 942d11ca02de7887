"""A deployed site's own file: what it says is what holds, and what it does not say clearly is refused."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any

import pytest

from clients.limits import SiteLimits
from clients.site_file import AccessTable, DataTable, PublicTable, SiteFile, SuperNodeTable, TrainersTable

TEMPLATE = Template((Path(__file__).parents[1] / "deploy/templates/site.toml").read_text(encoding="utf-8"))
VALUES = {
    "name": "north",
    "rows": "500",
    "classes": '"bad,good"',
    "model": '"minilm"',
    "superlink": '"host.example:9092"',
    "node_port": "9301",
}
LEAST = """
name = "north"
[data]
path = "data.csv"
[public]
rows = 24
[models]
minilm = "minilm"
[limits]
max-epsilon = 2.0
max-delta = 1e-3
"""


def read(folder: Path, text: str) -> SiteFile:
    file = folder / "site.toml"
    file.write_text(text, encoding="utf-8")
    return SiteFile.read(file)


def with_line(text: str, table: str, line: str) -> str:
    """Add a line to a table, in place of what the table has for its key."""
    key = line.partition(" =")[0]
    head, start, rest = text.partition(f"[{table}]\n") if table else ("", "", text)
    own, mark, others = rest.partition("\n[")
    kept = [one for one in own.splitlines() if one.partition(" =")[0] != key]
    return head + start + "\n".join([*kept, line]) + mark + others


def test_the_file_that_deploy_init_writes(tmp_path: Path) -> None:
    """Each key of the template has the value that stands there, and stands where the daemon looks for it."""
    text = TEMPLATE.substitute(VALUES).replace('users = ["flower"]', "users = []")
    folder = tmp_path.resolve()
    assert read(tmp_path, text) == SiteFile(
        path=folder / "site.toml",
        name="north",
        state=folder / "state",
        socket=folder / "run/site.sock",
        plugins="",
        data=DataTable(str(folder / "data.csv"), task="classification"),
        public=PublicTable(500, "bad,good"),
        models={"minilm": "minilm"},
        limits=SiteLimits(
            str(folder / "state"),
            name="north",
            dp_required=True,
            max_epsilon=16.0,
            max_delta=1e-5,
            min_noise_multiplier=0.5,
            max_steps=200,
            max_rounds_per_day=200,
            methods=("lora",),
            strategies=("ffa-lora",),
            heads=("shared",),
            models=("minilm",),
        ),
        supernode=SuperNodeTable("host.example:9092", port=9301),
    )


def test_every_key_has_its_value(tmp_path: Path) -> None:
    """All keys at values that are not their defaults: one that was not read would show."""
    text = """
        name = "south-2"
        state = "books"
        socket = "s.sock"
        plugins = "mine.py"
        [data]
        path = "rows.jsonl"
        text-column = "question"
        label-column = "kind"
        answer-column = "reply"
        label-separator = ";"
        task = "multi-label"
        header = false
        holdout = 0.25
        [public]
        rows = 7
        classes = "x,y"
        [models]
        one = "model"
        other = "org/hub-name"
        [limits]
        max-epsilon = 3
        max-delta = 1e-4
        min-noise-multiplier = 0.75
        max-steps = 11
        max-rounds-per-day = 12
        max-bytes = 13
        methods = ["lora", "mos"]
        strategies = ["fedavg"]
        heads = ["frozen", "personal"]
        model-digests = ["abc"]
        [trainers]
        count = 2
        gpus = 4
        threads = 3
        ray-address = "10.0.0.1:6379"
        [access]
        users = ["4242"]
        max-message-bytes = 99
        [supernode]
        superlink = "h:1"
        ca = "ca.pem"
        key = "node"
        port = 9400
    """
    (tmp_path / "model").mkdir()
    folder = tmp_path.resolve()
    file = read(tmp_path, text)
    assert file == SiteFile(
        path=folder / "site.toml",
        name="south-2",
        state=folder / "books",
        socket=folder / "s.sock",
        plugins="mine.py",
        data=DataTable(str(folder / "rows.jsonl"), "question", "kind", "reply", False, 0.25, "multi-label", ";"),
        public=PublicTable(7, "x,y"),
        models={"one": str(folder / "model"), "other": "org/hub-name"},
        limits=SiteLimits(
            str(folder / "books"),
            "south-2",
            True,
            3.0,
            1e-4,
            0.75,
            11,
            12,
            13,
            ("lora", "mos"),
            ("fedavg",),
            ("frozen", "personal"),
            ("one", "other"),
            ("abc",),
        ),
        trainers=TrainersTable(2, 4, 3, "10.0.0.1:6379"),
        access=AccessTable(("4242",), 99),
        supernode=SuperNodeTable("h:1", "ca.pem", "node", 9400),
    )
    assert file.access.ids == {os.getuid(), 4242}
    assert file.beside("keys/x") == folder / "keys/x"


def test_absolute_paths_and_those_of_the_home_folder_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    text = with_line(LEAST.replace('"data.csv"', '"~/data.csv"'), "", "")
    file = read(tmp_path, f'state = "/var/lib/site"\nsocket = "/run/site.sock"\n{text}')
    assert (file.state, file.socket) == (Path("/var/lib/site"), Path("/run/site.sock"))
    assert (file.data.path, file.limits.folder) == ("/home/somebody/data.csv", "/var/lib/site")


def test_it_is_read_from_wherever_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: paths beside the working directory, where systemd starts the daemon in /."""
    own = read(tmp_path, LEAST)
    monkeypatch.chdir(tmp_path)
    named = SiteFile.read(Path("site.toml"))
    assert named == own
    assert named.state == tmp_path.resolve() / "state"


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        # A limit that is misspelt would be no limit.
        ("limits", "max-epsilo = 3.0", r"site.toml \[limits\]: unknown key 'max-epsilo'. Did you mean 'max-epsilon'\?"),
        ("limits", "max_steps = 3", r"\[limits\]: unknown key 'max_steps'. Did you mean 'max-steps'\?"),
        ("limits", "folder = '/tmp'", r"\[limits\]: unknown key 'folder'"),
        ("limits", "models = ['a']", r"\[limits\]: unknown key 'models'"),
        ("", "limit = 1", r"site.toml: unknown key 'limit'"),
        ("data", "pth = 'x'", r"\[data\]: unknown key 'pth'. Did you mean 'path'\?"),
        ("access", "user = ['x']", r"\[access\]: unknown key 'user'. Did you mean 'users'\?"),
        # Wrong types: none is turned into another.
        ("limits", "raw-updates = 'no'", r"\[limits\]: raw-updates = 'no': must be true or false"),
        ("limits", "raw-updates = 1", r"raw-updates = 1: must be true or false"),
        ("limits", "max-epsilon = '3'", r"max-epsilon = '3': must be a number"),
        ("limits", "max-epsilon = true", r"max-epsilon = True: must be a number"),
        ("limits", "max-epsilon = nan", r"max-epsilon = nan: must be a finite number"),
        ("limits", "max-epsilon = inf", r"max-epsilon = inf: must be a finite number"),
        ("limits", "max-epsilon = -1.0", r"\[limits\]: max-epsilon = -1.0: must be a finite number of at least 0"),
        ("limits", "max-steps = 1.5", r"max-steps = 1.5: must be a whole number"),
        ("limits", "max-steps = -1", r"max-steps = -1: must be a finite number of at least 0"),
        ("limits", "methods = 'lora'", r"methods = 'lora': must be a list of texts in quotes"),
        ("limits", "heads = ['shared', 1]", r"heads = \['shared', 1\]: must be a list of texts in quotes"),
        ("models", "minilm = 3", r"\[models\].*must be a table of texts in quotes"),
        ("data", "holdout = 1.0", r"\[data\]: holdout = 1.0: must be at least 0 and below 1"),
        ("public", "rows = 0", r"\[public\]: rows = 0: must be at least 1"),
        ("trainers", "count = -1", r"\[trainers\]: count = -1: must be at least 0"),
        ("supernode", "port = 1", r"\[supernode\]: superlink: must be given, a text in quotes"),
        ("", "name = 'North'", r"site.toml: name = 'North': must be small letters, digits and hyphens"),
        ("", "name = '../other'", r"name = '../other': must be small letters"),
        ("", "name = ''", r"name = '': must be small letters"),
        ("", "name = 'a\\nb'", r"name = .*: must be small letters"),
        ("", f"name = '{'a' * 64}'", r"must be small letters"),
        # Limits that say nothing.
        ("limits", "max-delta = 0.0", r"\[limits\]: max-epsilon = 2.0: says nothing without a delta; set max-delta"),
        ("limits", "max-delta = 1.0", r"max-epsilon = 2.0: says nothing without a delta"),
        ("limits", "max-epsilon = 0.0", r"\[limits\]: max-epsilon: must be given, .*; or raw-updates = true"),
        ("limits", "raw-updates = true", r"\[limits\]: max-epsilon = 2.0: a job without differential privacy would"),
    ],
)
def test_what_is_not_clear_is_refused(table: str, line: str, message: str, tmp_path: Path) -> None:
    text = LEAST if f"[{table}]\n" in LEAST or not table else f"{LEAST}[{table}]\n"
    with pytest.raises(ValueError, match=message):
        read(tmp_path, with_line(text, table, line))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ('name = "north"\n', r"site.toml: name: must be given, a text in quotes"),
        ('path = "data.csv"\n', r"\[data\]: path: must be given"),
        ("rows = 24\n", r"\[public\]: rows: must be given, a whole number"),
        ('[models]\nminilm = "minilm"\n', r"\[models\]: must name a model that this site loads"),
        ("max-epsilon = 2.0\n", r"\[limits\]: max-epsilon: must be given, the budget of the site's rows"),
        ("[limits]\nmax-epsilon = 2.0\nmax-delta = 1e-3\n", r"\[limits\]: max-epsilon: must be given"),
    ],
)
def test_what_is_missing_is_named(part: str, message: str, tmp_path: Path) -> None:
    assert part in LEAST
    with pytest.raises(ValueError, match=message):
        read(tmp_path, LEAST.replace(part, ""))


@pytest.mark.parametrize("limit", ["max-epsilon = 2.0", "max-delta = 0.1", "min-noise-multiplier = 0.5"])
def test_a_limit_of_privacy_beside_raw_updates_is_refused(limit: str, tmp_path: Path) -> None:
    """It would bound nothing: a job without differential privacy passes it."""
    text = LEAST.replace("max-epsilon = 2.0\nmax-delta = 1e-3", f"raw-updates = true\n{limit}")
    with pytest.raises(ValueError, match=r"\[limits\]: .*a job without differential privacy would pass it"):
        read(tmp_path, text)


def test_raw_updates_leave_only_where_the_file_says_so(tmp_path: Path) -> None:
    raw = LEAST.replace("max-epsilon = 2.0\nmax-delta = 1e-3", "raw-updates = true\nmax-steps = 5")
    assert not read(tmp_path, raw).limits.dp_required
    assert read(tmp_path, LEAST).limits.dp_required
    stated = read(tmp_path, LEAST + "raw-updates = false\n").limits
    assert stated == replace(read(tmp_path, LEAST).limits, dp_required=True)


@pytest.mark.parametrize(("text", "what"), [("name = ", r"Invalid value"), ("[data]\n[data]\n", r"data"), ("\xff", "")])
def test_a_file_that_is_no_toml(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"this site's file cannot be read from .*site.toml: .*{what}"):
        SiteFile.read(tmp_path / "site.toml")
    with pytest.raises(ValueError, match=r"this site's file cannot be read from .*nowhere.toml"):
        SiteFile.read(tmp_path / "nowhere.toml")


def test_a_table_that_is_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\[data\]: must be a table"):
        read(tmp_path, LEAST.replace('[data]\npath = "data.csv"\n', "").replace("[public]", "data = 3\n[public]"))


def test_users_by_name_and_number(tmp_path: Path) -> None:
    def access(users: Any) -> frozenset[int]:
        return read(tmp_path, f"{LEAST}[access]\nusers = {users}\n").access.ids

    assert access(["0", "nobody"]) == {os.getuid(), 0, pwd.getpwnam("nobody").pw_uid}
    assert access([]) == {os.getuid()}
    with pytest.raises(ValueError, match=r"\[access\] users: there is no user 'no-such-user' on this machine"):
        access(["no-such-user"])
    with pytest.raises(ValueError, match=r"there is no user '-1'"):
        access(["-1"])
