"""A deployed site in this process: real rows, real training, and a coordinator that asks for what it must not get."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from clients.deployed import DeployedSite
from clients.errors import WITHHELD
from clients.last_update import LastUpdate
from clients.limits import SiteLimits
from clients.release_log import ReleaseLog
from clients.show import show
from clients.site import Job
from clients.site_file import SiteFile
from clients.worker import Worker
from fedlora.data import load_federated
from fedlora.exchange import ClientReport, Outcome, Update
from fedlora.joining import PROTOCOL, JoinReport
from fedlora.methods import tensors_digest
from fedlora.privacy import Ledger, Mechanism, epsilon
from fedlora.roles import Role
from simulations.setup import resolve
from tests.support.sites import (
    LIMITS,
    RAW,
    ROWS,
    Deployment,
    Here,
    coordinators_worker,
    request_of,
    server_config,
    site_file,
)
from tests.support.tiny import save_texts

RAW_CONFIG: dict[str, Any] = {"privacy.mode": "none"}


def raw_site(folder: Path, limits: str = RAW, *, client: int = 0, data: str = "", **changes: Any) -> Deployment:
    return Deployment(site_file(folder, limits, data=data), server_config(**RAW_CONFIG, **changes), client)


def own_ledger(file: SiteFile) -> Ledger:
    return Ledger(file.state / "ledger.jsonl", "north")


# -- what it does -----------------------------------------------------------------------------------------


def test_it_joins_by_what_the_coordinator_compares_and_trains(tmp_path: Path) -> None:
    """Its digests are those of a coordinator's own model, whose folder has another name; the update has been paid."""
    north = Deployment(site_file(tmp_path))
    report = north.site.join(north.request)
    described = coordinators_worker(tmp_path, north.config).describe()
    own = JoinReport(
        "",
        digest=described.digest,
        initial_digest=described.initial_digest,
        constants_digest=described.constants_digest,
    )
    assert report.differs(own) == ""
    assert (report.site, report.reason, report.rows, report.trainers) == ("north", "", ROWS, 1)
    assert report.fingerprint == described.fingerprint[0]
    update = north.train()
    assert (update.report.outcome, update.report.steps) == (Outcome.OK, 3)
    assert (update.report.examples, dict(update.report.metrics)) == (0, {})
    (entry,) = own_ledger(north.file).entries()
    assert entry.hash == update.report.ledger_head


@pytest.mark.parametrize("client", [0, 1])
@pytest.mark.parametrize("strategy", ["ffa-lora", "fedavg"])
def test_same_update_as_in_a_simulation(client: int, strategy: str, tmp_path: Path) -> None:
    """To the bit, for the same rows, seed and number: rounds of a simulation say what a deployment will do."""
    changes: dict[str, Any] = {"strategy.name": strategy, "seed": 5}
    north = raw_site(tmp_path, client=client, **changes).joined()
    rows = (tmp_path / "data.csv").read_text().splitlines()[1:]
    others = Path(save_texts(tmp_path / "others.csv", ROWS, seed=4)).read_text().splitlines()[1:]
    named = ("a-north", "b-others") if client == 0 else ("b-north", "a-others")
    with (tmp_path / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "site"])
        for name, own in zip(named, (rows, others), strict=True):
            writer.writerows([*row.split(","), name] for row in own)
    flat = {
        **{key: value for key, value in north.config.to_flat().items() if not key.startswith(("data.", "federation."))},
        "model.name": str(tmp_path / "model"),
        "data.name": "file",
        "data.path": str(tmp_path / "all.csv"),
        "data.test-path": str(tmp_path / "all.csv"),
        "data.classes": "bad,good",
        "data.partition": "natural",
        "data.partition-column": "site",
        "federation.num-clients": 2,
    }
    config = resolve(flat)
    job = Job(config.to_flat(), load_federated(config, 2), SiteLimits(str(tmp_path / "simulated")))
    simulated = Worker(lambda: job, 1)
    for number in (1, 2):
        ours = north.train(number)
        (theirs,) = simulated.train(north.instruction(number))
        assert ours.report == theirs.report
        assert ours.report.examples == ROWS
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, value in ours.tensors.items():
            assert np.array_equal(value, theirs.tensors[name]), name


def test_sums_over_what_it_holds_out_leave_without_privacy_only(tmp_path: Path) -> None:
    north = raw_site(tmp_path, data="holdout = 0.25").joined()
    (report,) = north.site.evaluate(north.instruction())
    assert (report.outcome, report.examples) == (Outcome.OK, ROWS // 4)
    assert set(report.metrics) >= {"accuracy", "loss"}
    assert north.train().report.examples == ROWS - ROWS // 4
    private = Deployment(site_file(tmp_path / "dp", data="holdout = 0.25")).joined()
    (report,) = private.site.evaluate(private.instruction())
    assert (report.outcome, report.examples, dict(report.metrics)) == (Outcome.FAILED, 0, {})
    assert report.reason == "a client under DP does not report how its model does on its rows"


# -- one ledger -------------------------------------------------------------------------------------------


def test_no_number_or_name_that_a_server_gives_starts_a_new_budget(tmp_path: Path) -> None:
    """The planted bug: a ledger by client, or by run: a coordinator that gives another number would start anew."""
    config = server_config()
    use = Mechanism.of(config).use()
    budget = epsilon([use] * 2, target_delta=1e-2)
    file = site_file(tmp_path, LIMITS.replace("40.0", str(budget * 1.0001)))
    outcomes = []
    for client, name in ((0, "first"), (1, "first"), (1, "second"), (0, "third")):
        asked = server_config(**{"run.name": name, "privacy.delta": 1e-2, "seed": client})
        outcomes.append(Deployment(file, asked, client).joined().train().report.outcome)
    assert outcomes == [Outcome.OK, Outcome.OK, Outcome.BUDGET_SPENT, Outcome.BUDGET_SPENT]
    assert own_ledger(file).uses() == [use, use]
    assert [path.name for path in file.state.rglob("ledger.jsonl")] == ["ledger.jsonl"]


def test_a_ledger_that_was_rolled_back_is_noticed_by_whoever_saw_it(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    first = north.train(1)
    second = north.train(2, ledger_heads=(first.report.ledger_head,))
    path = north.file.state / "ledger.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    said = north.train(3, ledger_heads=(second.report.ledger_head,))
    assert "ledger cannot be trusted" in said.report.reason
    assert not said.tensors


# -- what a server may not ask when it has the site join --------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "reason"),
    [
        ({"privacy.mode": "none"}, r"the job's configuration cannot be used|privacy\.mode, by dp-required"),
        ({"privacy.noise-multiplier": 0.1}, r"privacy\.noise-multiplier, by min-noise-multiplier"),
        ({"privacy.noise-multiplier": 0.0}, r"privacy\.noise-multiplier"),
        ({"privacy.epsilon": 41.0}, r"privacy\.epsilon, by max-epsilon"),
        ({"privacy.delta": 2e-2}, r"privacy\.delta, by max-delta"),
        ({"privacy.seed": 7}, r"privacy\.seed, by dp-required"),
        ({"privacy.client-size": 0}, r"needs privacy\.client-size"),
        ({"model.name": "minilm"}, r"model\.name, by models"),
        ({"model.name": "model"}, r"model\.name, by models"),
        ({"model.name": "/etc"}, r"model\.name, by models"),
        ({"method.name": "mos"}, r"method\.name, by methods"),
        ({"strategy.name": "fedrep"}, r"strategy\.name, by strategies"),
        ({"method.head": "personal"}, r"method\.head, by heads"),
        ({"train.local-steps": 4}, r"train\.local-steps, by max-steps"),
        ({"train.local-steps": 0, "train.local-epochs": 2}, r"steps of a round, by max-steps"),
        ({"run.plugins": "evil.py"}, r"run\.plugins are not those of this site; code comes from the site's operator"),
        ({"run.plugins": "os"}, r"run\.plugins are not those of this site"),
        ({"method.start": "/etc"}, r"the job has method\.start; a site's own files"),
        ({"method.start": "adapter"}, r"the job has method\.start; a site's own files"),
        ({"method.init": "gradient"}, r"the job's configuration cannot be used: method\.init"),
        ({"method.init": "gradient", "data.public-path": "/etc/passwd"}, r"cannot be used: method\.init"),
        ({"run.plugins": 3}, r"run\.plugins are not those of this site"),
        ({"run.name": "../../other"}, r"run\.name = .*must be a plain folder name"),
        ({"data.classes": "good,bad"}, r"data\.classes = 'good,bad' and this site 'bad,good'; they must agree"),
        ({"data.classes": ""}, r"data\.classes = '' and this site 'bad,good'"),
        ({"train.batch-size": -1}, r"the job's configuration cannot be used: train\.batch-size"),
        ({"train.batch-size": "4"}, r"the job's configuration cannot be used: train\.batch-size"),
        ({"train.bach-size": 4}, r"the job's configuration cannot be used: .*train\.bach-size"),
    ],
)
def test_a_job_beyond_the_sites_limits_is_refused(flat: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Before a trainer hears of it: nothing is loaded, and no ledger or job is written."""
    north = Deployment(site_file(tmp_path))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    report = north.site.join(request_of(north.config, **flat))
    assert re.search(reason, report.reason), report.reason
    assert (report.rows, report.digest) == (0, "")
    assert not north.place.jobs
    assert not north.file.state.exists()
    assert not (tmp_path / "ran").exists()


def test_classes_agree_by_their_names_however_they_are_written(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path))
    assert north.site.join(request_of(north.config, **{"data.classes": ' bad,  "good"'})).reason == ""


def test_dp_switched_off_by_a_whole_configuration(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path), server_config(**RAW_CONFIG))
    assert north.site.join(north.request).reason.endswith("privacy.mode, by dp-required")


def test_steps_of_epochs_are_bounded_without_privacy_too(tmp_path: Path) -> None:
    """The planted bug: a limit on train.local-steps alone, which epochs go around."""
    epochs: dict[str, Any] = {"train.local-steps": 0, "train.local-epochs": 1, "train.batch-size": 6}
    north = raw_site(tmp_path, **epochs)  # four steps, and the limit is three
    assert north.site.join(north.request).reason.endswith("steps of a round, by max-steps")
    assert raw_site(tmp_path, RAW.replace("3", "4"), **epochs).joined().train().report.steps == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": PROTOCOL + 1}, rf"speaks version {PROTOCOL + 1} of the joining protocol, this site {PROTOCOL}"),
        ({"site": "south"}, r"this is site 'north', not 'south'"),
    ],
)
def test_another_protocol_and_another_sites_name_are_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    north = Deployment(site_file(tmp_path))
    assert re.search(reason, north.site.join(replace(north.request, **change)).reason)
    assert not north.place.jobs


def test_no_key_of_a_servers_chooses_rows(tmp_path: Path) -> None:
    """The planted bug: data.path, data.name or columns that are taken as they come."""
    north = Deployment(site_file(tmp_path))
    save_texts(tmp_path / "secret.csv", 60, seed=9)
    planted: dict[str, Any] = {
        "data.name": "file",
        "data.path": str(tmp_path / "secret.csv"),
        "data.test-path": str(tmp_path / "secret.csv"),
        "data.text-column": "label",
        "data.label-column": "text",
        "data.header": False,
        "data.holdout": 0.9,
        "data.partition": "natural",
        "data.partition-column": "text",
    }
    request = request_of(north.config, **planted)
    assert request.job == north.request.job
    assert not north.site.join(request).reason
    (job,) = north.place.jobs
    assert job.flat["data.path"] == str(tmp_path.resolve() / "data.csv")
    assert (len(job.data.corpus.train), len(job.data.corpus.test)) == (ROWS, 0)
    assert len(job.data.training_rows(0)) == ROWS
    texts = [line.split(",")[0] for line in (tmp_path / "data.csv").read_text().splitlines()[1:]]
    assert list(job.data.corpus.train.texts) == texts


def test_the_site_loads_its_own_folder_for_a_models_name(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    assert north.place.jobs[0].flat["model.name"] == str(tmp_path.resolve() / "model")


# -- what it may not ask afterwards -----------------------------------------------------------------------


@pytest.fixture
def joined(tmp_path: Path) -> Deployment:
    return Deployment(site_file(tmp_path)).joined()


def refused(north: Deployment, **changes: Any) -> ClientReport:
    """What it says to an instruction that it refuses: nothing else leaves, and nothing is paid."""
    before = len(own_ledger(north.file).uses())
    update = north.train(**changes)
    assert not update.tensors
    assert not update.extra
    assert len(own_ledger(north.file).uses()) == before
    (evaluated,) = north.site.evaluate(north.instruction(**changes))
    assert (evaluated.examples, dict(evaluated.metrics)) == (0, {})
    return update.report


def test_an_instruction_for_another_client_is_refused(joined: Deployment) -> None:
    report = refused(joined, clients=(1,))
    assert (report.client, report.outcome) == (1, Outcome.FAILED)
    assert report.reason == "the instruction is for clients [1], which are not here"
    both = list(joined.site.train(joined.instruction(clients=(0, 1), ledger_heads=("", ""))))
    assert [update.report.outcome for update in both] == [Outcome.FAILED] * 2
    assert list(joined.site.train(joined.instruction(clients=(), ledger_heads=()))) == []
    assert not own_ledger(joined.file).uses()


@pytest.mark.parametrize("job", ["", "0" * 64])
def test_a_job_that_it_has_not_joined_is_refused(job: str, joined: Deployment) -> None:
    report = refused(joined, job=job)
    assert (report.outcome, report.reason) == (Outcome.NOT_JOINED, "it has not joined this run")


def test_a_site_that_never_joined_says_so(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    fresh = DeployedSite(north.file, Here())
    (update,) = fresh.train(north.instruction())
    assert update.report.outcome is Outcome.NOT_JOINED


def test_a_join_that_is_refused_leaves_the_run_that_is_on(joined: Deployment) -> None:
    """The planted bug: a site that has forgotten its run when it refuses another."""
    assert joined.site.join(request_of(joined.config, **{"privacy.seed": 3})).reason
    assert joined.train().report.outcome is Outcome.OK


@pytest.mark.parametrize(("head", "role"), [("personal", "shared"), ("personal", "upload"), ("frozen", "shared")])
def test_a_head_leaves_only_where_the_job_says_so(head: str, role: str, tmp_path: Path) -> None:
    """The planted bug: a job with a head that the site allows, and an instruction that has it sent all the same."""
    file = site_file(tmp_path, LIMITS.replace('"shared", "frozen"', '"personal", "frozen"'))
    north = Deployment(file, server_config(**{"method.head": head})).joined()
    roles = {**north.instruction().roles, "head": Role(role)}
    assert refused(north, roles=roles).reason == f"the head is {role}, and the job has method.head = '{head}'"
    update = north.train()
    assert update.report.outcome is Outcome.OK
    assert not any("classifier" in name for name in update.tensors)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        ("unknown", "the instruction holds 'patient', which is no tensor of the method"),
        ("wide", r"has shape \[.*\], not \[.*\]"),
        ("flat", r"has shape \[.*\], not \[.*\]"),
        ("scalar", r"has shape \[\], not \[.*\]"),
        ("roles", r"the instruction gives roles to \['A'.*\], and the method has"),
        ("kind", r"the instruction gives roles to .*'patient'.*, and the method has"),
        ("heads", "trains only for a server that says what it last saw of its ledger"),
    ],
)
def test_an_instruction_that_is_not_the_jobs_is_refused(plant: str, reason: str, joined: Deployment) -> None:
    plain = joined.instruction()
    tensors, roles = dict(plain.tensors), dict(plain.roles)
    name, value = next(iter(tensors.items()))
    changes: dict[str, Any] = {"tensors": tensors, "roles": roles}
    match plant:
        case "unknown":
            tensors["patient"] = np.zeros(3)
        case "wide":
            tensors[name] = np.concatenate([value, value])
        case "flat":
            tensors[name] = value.ravel()
        case "scalar":
            tensors[name] = np.zeros(())
        case "roles":
            changes["roles"] = {"A": roles["A"]}
        case "kind":
            roles["patient"] = roles["A"]
        case "heads":
            changes["ledger_heads"] = ()
    assert re.search(reason, refused(joined, **changes).reason)


def test_no_more_rounds_a_day_than_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Counted in what left, whatever run it was for; rounds that came to nothing do not count."""
    file = site_file(tmp_path, f"{LIMITS}max-rounds-per-day = 2\n")
    north = Deployment(file).joined()
    assert north.train(1, tensors={"patient": np.zeros(1)}).report.outcome is Outcome.FAILED
    assert north.train(1).report.outcome is Outcome.OK
    other = Deployment(file, server_config(**{"run.name": "other"}), client=1).joined()
    assert other.train(1).report.outcome is Outcome.OK
    assert other.train(1).report.outcome is Outcome.OK, "what is sent again does not count"
    (update,) = other.site.train(other.instruction(2))
    assert update == Update(ClientReport.failed(1, "the site's own limits refuse the round, by max-rounds-per-day"))
    assert "2 left in 24 hours" in caplog.text
    log = file.state / "released.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[1]["time"] -= 86401.0
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert other.train(2).report.outcome is Outcome.OK, "a day later"
    assert other.train(3).report.outcome is Outcome.FAILED


# -- no text of an error leaves ---------------------------------------------------------------------------


def test_no_row_is_quoted_when_it_joins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A label that is none of the classes: the error for the site's operator quotes it; with and without privacy."""
    for limits, config in ((LIMITS, server_config()), (RAW, server_config(**RAW_CONFIG))):
        north = Deployment(site_file(tmp_path, limits), config)
        with (tmp_path / "data.csv").open("a") as file:
            file.write("w1 w2,patient Smith\n")
        caplog.clear()
        assert north.site.join(north.request).reason == WITHHELD
        assert "patient Smith" in caplog.text, "the site's own log has it"
        (tmp_path / "data.csv").unlink()
        assert north.site.join(north.request).reason == WITHHELD
        assert str(tmp_path) in caplog.text


def test_no_row_is_quoted_when_training_fails(tmp_path: Path) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ValueError("the text 'patient Smith' has no tokens")

    north = Deployment(site_file(tmp_path), place=Here(fails)).joined()
    report = north.train().report
    assert report.outcome is Outcome.FAILED
    assert "Smith" not in report.reason
    assert "ValueError" not in report.reason


def test_a_trainer_that_fails_beside_its_own_wall(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last wall: what a trainer's site raises itself is withheld, too."""
    north = Deployment(site_file(tmp_path)).joined()
    instruction = north.instruction()

    def fails(_: Any) -> Any:
        raise KeyError("patient Smith")

    north.site._site.train = fails  # type: ignore[union-attr,method-assign]
    (update,) = north.site.train(instruction)
    assert update == Update(ClientReport.failed(0, WITHHELD))
    assert "patient Smith" in caplog.text


def test_more_rows_than_are_declared_do_not_train_without_privacy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would count for more than the site lets the coordinator know; under DP no rows are counted."""
    raw = Deployment(site_file(tmp_path, RAW, rows=ROWS + 1), server_config(**RAW_CONFIG))
    assert raw.site.join(raw.request).reason == WITHHELD
    assert f"rows = {ROWS}: the site trains on {ROWS + 1} rows" in caplog.text
    assert Deployment(site_file(tmp_path, rows=ROWS + 1)).joined().train().report.outcome is Outcome.OK


# -- the log of what left ---------------------------------------------------------------------------------


def test_an_update_is_in_the_log_before_it_leaves(tmp_path: Path) -> None:
    """The planted bug: a log that is written after the update is handed on."""
    north = Deployment(site_file(tmp_path)).joined()
    log = north.file.state / "released.jsonl"
    assert not log.exists()
    updates = north.site.train(north.instruction())
    update = next(iter(updates))
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert line["sha256"] == tensors_digest(update.tensors)
    assert line["tensors"] == {name: list(value.shape) for name, value in update.tensors.items()}
    assert line["bytes"] == sum(value.nbytes for value in update.tensors.values()) > 0
    assert (line["run"], line["round"], line["outcome"]) == ("first", 1, "ok")
    assert line["ledger"] == own_ledger(north.file).head()
    assert log.stat().st_mode & 0o777 == 0o600
    assert not list(updates)


def test_a_log_that_cannot_be_written_lets_nothing_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    north = raw_site(tmp_path, data="holdout = 0.25").joined()
    instruction = north.instruction()
    (north.file.state / "released.jsonl").mkdir()
    (update,) = north.site.train(instruction)
    assert update == Update(ClientReport.failed(0, WITHHELD))
    assert list(north.site.evaluate(instruction)) == [ClientReport.failed(0, WITHHELD)]
    assert "IsADirectoryError" in caplog.text


# -- a round that is asked again ----------------------------------------------------------------------------


def test_a_round_that_is_asked_again_is_paid_for_once(tmp_path: Path) -> None:
    """As by a coordinator that died in it: the same numbers leave, after a restart of the daemon too."""
    north = Deployment(site_file(tmp_path)).joined()
    first = north.train(1)
    again = north.train(1, ledger_heads=(first.report.ledger_head,))
    restarted = Deployment(north.file).joined().train(1)
    for update in (again, restarted):
        assert update.report == first.report
        assert tensors_digest(update.tensors) == tensors_digest(first.tensors)
    assert len(own_ledger(north.file).uses()) == 1
    lines = north.site.log.lines()
    assert [line["again"] for line in lines] == [False, True, True]
    assert len({line["sha256"] for line in lines}) == 1


@pytest.mark.parametrize("what", ["round", "tensors", "run", "terms"])
def test_another_question_is_never_answered_by_an_earlier_update(what: str, tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    first = north.train(1)
    number, changes = 1, {}
    if what == "round":
        number = 2
    if what == "tensors":
        changes["tensors"] = {name: value + 1e-9 for name, value in north.instruction(1).tensors.items()}
    if what == "run":
        north = Deployment(north.file, server_config(**{"run.name": "second"})).joined()
    if what == "terms":
        changes["local"] = replace(north.instruction(1).local, learning_rate=0.5)
    update = north.train(number, **changes)
    assert update.report.outcome is Outcome.OK, update.report.reason
    assert tensors_digest(update.tensors) != tensors_digest(first.tensors)
    assert len(own_ledger(north.file).uses()) == 2


@pytest.mark.parametrize("content", [b"", b"garbage" * 10])
def test_a_kept_update_that_cannot_be_read_is_trained_anew(content: bytes, tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    north.train(1)
    (north.file.state / "last-update.safetensors").write_bytes(content)
    assert north.train(1).report.outcome is Outcome.OK
    assert len(own_ledger(north.file).uses()) == 2


def test_what_a_strategy_sends_beside_comes_again_too(tmp_path: Path) -> None:
    kept = LastUpdate(tmp_path / "kept")
    update = Update(
        ClientReport(0, examples=3, steps=2, metrics={"loss": 0.5}), {"a": np.ones(2)}, {"v/a": np.zeros(1)}
    )
    kept.keep("q", update)
    back = kept.answer_to("q")
    assert back is not None
    assert back.report == update.report
    for group, kept_group in ((back.tensors, update.tensors), (back.extra, update.extra)):
        assert tensors_digest(group) == tensors_digest(kept_group)
    assert kept.answer_to("r") is None


# -- its own disk ---------------------------------------------------------------------------------------------


def test_a_trainer_on_another_disk_is_refused(tmp_path: Path) -> None:
    """The planted bug: a trainer on another machine of a Ray cluster begins a ledger there, with a new budget."""
    north = Deployment(site_file(tmp_path))
    fetch = north.place.assign

    def elsewhere(job: Job) -> tuple[Any, int]:
        return fetch(replace(job, limits=replace(job.limits, folder=str(tmp_path / "elsewhere"))))

    (tmp_path / "elsewhere").mkdir()
    north.place.assign = elsewhere  # type: ignore[method-assign]
    reason = north.site.join(north.request).reason
    assert re.search(r"a trainer of the site does not see the site's state folder", reason)
    assert not list((tmp_path / "elsewhere").iterdir())


# -- its log ------------------------------------------------------------------------------------------------


def test_a_line_that_was_torn_is_no_update_and_harms_no_other(tmp_path: Path) -> None:
    """A process killed while it writes leaves half a line: what it was of has not left."""
    log = ReleaseLog(tmp_path / "state/released.jsonl")
    update = Update(ClientReport(0, steps=1), {"x": np.ones(3)})
    log.write("r", 1, update)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole[:-20])
    assert [line["round"] for line in log.lines()] == [1]
    assert log.rounds_today() == 1
    log.write("r", 3, update)
    assert [line["round"] for line in log.lines()] == [1, 3]
    assert log.path.read_bytes().startswith(whole + whole[:-20] + b"\n"), "nothing of it is rewritten"
    assert log.lines()[1]["sha256"] == tensors_digest(update.tensors)


# -- a restart --------------------------------------------------------------------------------------------


def restarted(north: Deployment, file: SiteFile | None = None) -> Deployment:
    """The site as a daemon that was killed finds it again."""
    again = Deployment(file or north.file, north.config, north.client)
    again.site.restore()
    return again


def test_a_daemon_that_starts_again_takes_up_its_run(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path), client=1).joined()
    first = north.train(1)
    again = restarted(north)
    second = again.train(2, ledger_heads=(first.report.ledger_head,))
    assert second.report.outcome is Outcome.OK
    assert [entry.round for entry in own_ledger(north.file).entries()] == [1, 2]


def test_a_run_that_the_site_would_not_join_any_more_is_not_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The planted bug: a saved job that goes around limits which were made stricter since."""
    north = Deployment(site_file(tmp_path)).joined()
    instruction = north.instruction()
    stricter = site_file(tmp_path, LIMITS.replace("min-noise-multiplier = 0.5", "min-noise-multiplier = 2.0"))
    again = restarted(north, stricter)
    (update,) = again.site.train(instruction)
    assert update.report.outcome is Outcome.NOT_JOINED
    assert "is not taken up again" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"site": 3}', '{"flat": "[1]"}'])
def test_a_saved_job_that_cannot_be_read_stops_nothing(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    (north.file.state / "job.json").write_text(text)
    again = restarted(north)
    assert "is not taken up again" in caplog.text
    assert again.joined().train().report.outcome is Outcome.OK


def test_a_site_without_a_run_starts_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        restarted(Deployment(site_file(tmp_path)))
    assert not caplog.records


# -- what it says to its own operator ---------------------------------------------------------------------


def shown(file: SiteFile) -> tuple[int, str]:
    text = io.StringIO()
    code = show(file, Console(file=text, width=400))
    return code, " ".join(text.getvalue().split())


def test_show_for_a_site_under_dp(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path))
    code, before = shown(north.file)
    assert code == 0
    for words in (
        "updates leave under differential privacy only",
        "(40, 0.01)-differentially private, also against the coordinator",
        "No number of rows, no loss, no accuracy",
        f"rows = {ROWS} (nominal)",
        "nothing has left it yet",
        "spent: epsilon 0 at delta 0.01 in 0 round(s), 40 of 40 are left",
    ):
        assert words in before, words
    assert "RAW" not in before
    assert re.search(r"min-noise-multiplier\W+0\.5", before)
    assert re.search(r"max-bytes\W+none", before)
    update = north.joined().train()
    _, after = shown(north.file)
    spent = epsilon([Mechanism.of(north.config).use()], target_delta=1e-2)
    assert f"spent: epsilon {spent:.4g} at delta 0.01 in 1 round(s), {40 - spent:.4g} of 40 are left" in after
    assert "left, the last of 1" in after
    assert tensors_digest(update.tensors)[:16] in after
    assert str(sum(value.nbytes for value in update.tensors.values())) in after


def test_show_for_a_site_with_raw_updates(tmp_path: Path) -> None:
    north = raw_site(tmp_path, data="holdout = 0.25").joined()
    north.train()
    code, text = shown(north.file)
    assert code == 0
    for words in (
        "RAW UPDATES ARE ALLOWED (raw-updates = true)",
        "can turn them back into rows of this site",
        "the number of its training rows; its mean loss, and sums of metrics over the 25% that it holds out",
        "left, the last of 1",
    ):
        assert words in text, words
    assert "differentially private" not in text
    assert "spent" not in text


def test_show_fails_where_the_ledger_was_changed(tmp_path: Path) -> None:
    north = Deployment(site_file(tmp_path)).joined()
    north.train()
    path = north.file.state / "ledger.jsonl"
    path.write_text(path.read_text().replace('"noise_multiplier": 1.0', '"noise_multiplier": 9.0'))
    code, text = shown(north.file)
    assert code == 1
    assert "the ledger cannot be trusted, and the site will not train" in text
