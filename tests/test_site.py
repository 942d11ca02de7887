"""The wall of a site: what it demands of a job, and what it lets out of an error, whatever a server sends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clients.errors import WITHHELD, RefusedError, SiteError, TrainerLostError
from clients.ray_site import RaySite
from clients.site import Job
from clients.worker import Worker
from fedlora.engine import ClientResult
from fedlora.exchange import ClientReport, Instruction, Outcome
from fedlora.privacy import Mechanism, epsilon
from fedlora.reduce import fold
from fedlora.tasks import Classification
from simulations.setup import resolve
from tests.support.trainers import InProcess, ask, dp_config, instruction, ledger, tiny_flat, tiny_job

ROOT = Path(__file__).parents[1]
CALLS: dict[str, Callable[[RaySite, Instruction], list[Any]]] = {
    "describe": lambda site, _: [site.describe()],
    "train": lambda site, instruction: [update.report for update in site.train(instruction)],
    "reduce": lambda site, instruction: site.reduce(instruction)[0],
    "evaluate": lambda site, instruction: list(site.evaluate(instruction)),
}


def reasons(call: str, worker: Worker, heads: tuple[str, ...]) -> list[str]:
    """What a server reads of a site that fails."""
    site = RaySite(InProcess([worker]))
    try:
        reports: list[ClientReport] = CALLS[call](site, Instruction(2, (0, 1), {}, {}, ledger_heads=heads))
    except SiteError as error:
        return [str(error)]
    assert [report.client for report in reports] == [0, 1]
    assert {report.outcome for report in reports} == {Outcome.FAILED}
    return [report.reason for report in reports]


def no_encoding(*_: Any) -> None:
    raise ValueError("the text 'patient Smith' has no tokens")


def dp_job(folder: Path) -> Job:
    return tiny_job(dp_config(folder), folder)


def no_job(_: Path) -> Job:
    raise ValueError("'patient Smith' is not a row")


def no_config(folder: Path) -> Job:
    job = tiny_job(resolve(tiny_flat(folder)), folder)
    return Job({**job.flat, "patient Smith": 1}, job.data, job.limits)


@pytest.mark.parametrize("job", [dp_job, no_job, no_config])
@pytest.mark.parametrize("heads", [(), ("", "")])
@pytest.mark.parametrize("call", CALLS)
def test_no_text_of_an_error_leaves_whatever_the_server_omits(
    call: str,
    heads: tuple[str, ...],
    job: Callable[[Path], Job],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The planted bug: a server that sends no ledger hashes, as one without DP does, and waits for an error.

    Neither does text leave where a site cannot read what mode it is in.
    """
    monkeypatch.setattr(Classification, "encode", no_encoding)
    assert set(reasons(call, Worker(lambda: job(tmp_path), 1), heads)) == {WITHHELD}
    assert "patient Smith" in caplog.text, "the site's own log has it"


@pytest.mark.parametrize("call", CALLS)
def test_a_site_that_knows_that_it_has_no_privacy_says_why(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Classification, "encode", no_encoding)
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    found = reasons(call, Worker(lambda: job, 1), ("", ""))
    assert set(found) == {"ValueError: the text 'patient Smith' has no tokens"}


class Failing(InProcess):
    """Trainers whose process fails, as Ray reports it."""

    error: Exception

    def outcomes(self, work: Any, items: Any, *, packs: Any = (), server_round: int = 0) -> Iterator[Any]:
        yield from [self.error] * len(items)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [ValueError("patient Smith"), TrainerLostError("a trainer died")])
def test_of_a_process_that_fails_only_our_own_words_leave(call: str, error: Exception) -> None:
    pool = Failing([None])
    pool.error = error
    said = WITHHELD if isinstance(error, ValueError) else "a trainer died"
    asked = Instruction(1, (0, 1), {}, {})
    if call == "describe":
        with pytest.raises(SiteError, match=f"^{said}$"):
            RaySite(pool).describe()
    else:
        assert {report.reason for report in CALLS[call](RaySite(pool), asked)} == {said}


# -- limits -----------------------------------------------------------------------------------------------

LIMITS = {"dp_required": True, "max_epsilon": 3.0, "max_delta": 1e-2, "min_noise_multiplier": 0.5}


@pytest.mark.parametrize(
    ("job", "limits", "key", "limit"),
    [
        ({"privacy.mode": "none"}, {"dp_required": True}, "privacy.mode", "dp-required"),
        ({"privacy.seed": 7}, {"dp_required": True}, "privacy.seed", "dp-required"),
        ({"privacy.epsilon": 4.0}, LIMITS, "privacy.epsilon", "max-epsilon"),
        ({"privacy.delta": 2e-2}, LIMITS, "privacy.delta", "max-delta"),
        ({"privacy.noise-multiplier": 0.4}, LIMITS, "privacy.noise-multiplier", "min-noise-multiplier"),
        ({}, {"models": ("minilm",)}, "model.name", "models"),
        ({}, {"methods": ("mos",)}, "method.name", "methods"),
        ({}, {"strategies": ("fedavg",)}, "strategy.name", "strategies"),
        ({"method.head": "personal"}, {"heads": ("shared", "frozen")}, "method.head", "heads"),
        ({"train.local-steps": 4}, {"max_steps": 3}, "train.local-steps", "max-steps"),
        ({"train.local-steps": 0, "train.local-epochs": 9}, {"max_steps": 8}, "steps of a round", "max-steps"),
    ],
)
def test_a_server_that_asks_for_more_than_the_site_allows_is_refused(
    job: dict[str, Any],
    limits: dict[str, Any],
    key: str,
    limit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is loaded; it learns which key, and neither the limit's value nor anything else."""
    monkeypatch.setattr("clients.resident.load_base", lambda *_, **__: pytest.fail("nothing may be loaded"))
    if job.get("privacy.mode") == "none":
        config = resolve(tiny_flat(tmp_path, **job))
    else:
        config = dp_config(tmp_path, **{"privacy.epsilon": 2.0, "privacy.delta": 1e-3, **job})
    planted = tiny_job(config, tmp_path, **limits)
    for call in CALLS:
        said = set(reasons(call, Worker(lambda: planted, 1), ("", "")))
        assert said == {f"the site's own limits refuse the job: {key}, by {limit}"}
    assert not (tmp_path / "sites").exists()


@pytest.mark.parametrize("planted", [{"privacy.mode": "none"}, {}])
def test_another_model_under_a_name_that_is_allowed_is_refused(planted: dict[str, Any], tmp_path: Path) -> None:
    """The planted bug: a folder whose weights were exchanged. It is refused by what was loaded, in each mode."""
    config = dp_config(tmp_path) if not planted else resolve(tiny_flat(tmp_path, **planted))
    job = tiny_job(config, tmp_path, models=(config.model.name,))
    digest = Worker(lambda: job, 1).describe().digest
    for digests, refused in (((digest, "other"), False), (("other",), True)):
        known = tiny_job(config, tmp_path, model_digests=digests)
        said = reasons("train", Worker(lambda known=known: known, 1), ("", ""))  # type: ignore[misc]
        by_digest = "the site's own limits refuse the job: the digest of model.name, by model-digests"
        assert (set(said) == {by_digest}) == refused
    assert not (tmp_path / "sites").exists()


def test_no_more_bytes_leave_than_the_site_allows(tmp_path: Path) -> None:
    """To the byte, before anything is paid for: what leaves is not what arrives, where a head is kept."""
    config = dp_config(tmp_path, **{"privacy.epsilon": 9.0, "privacy.delta": 1e-3})
    worker = Worker(lambda: tiny_job(config, tmp_path), 1)
    leaves = sum(value.nbytes for value in ask(worker, (0,))[0].tensors.values())
    paid = len(ledger(tmp_path, 0).uses())
    for most, outcome in ((leaves - 1, Outcome.FAILED), (leaves, Outcome.OK)):
        bound = Worker(lambda most=most: tiny_job(config, tmp_path, max_bytes=most), 1)  # type: ignore[misc]
        (update,) = ask(bound, (0,), 2)
        assert update.report.outcome is outcome
        assert bool(update.tensors) == (outcome is Outcome.OK)
        if outcome is Outcome.FAILED:
            assert update.report.reason.endswith("bytes of the tensors that leave, by max-bytes")
            assert len(ledger(tmp_path, 0).uses()) == paid


def test_a_server_that_leaves_keys_to_the_site_is_refused(tmp_path: Path) -> None:
    """What is automatic is resolved by the server; a site cannot keep books of what is not said."""
    job = tiny_job(dp_config(tmp_path), tmp_path)
    for key in ("privacy.delta", "privacy.client-size"):
        planted = Job({**job.flat, key: 0}, job.data, job.limits)
        found = reasons("train", Worker(lambda planted=planted: planted, 1), ("", ""))  # type: ignore[misc]
        assert set(found) == {f"a site under DP needs {key}, and a value that can work"}


def test_the_stricter_budget_counts(tmp_path: Path) -> None:
    """A server that sets no budget, and one that sets a larger noise than it needs, meet the site's own."""
    keys = {"privacy.noise-multiplier": 2.0, "privacy.delta": 1e-3}
    config = dp_config(tmp_path, **keys)
    assert config.privacy.epsilon == 0
    use = Mechanism.of(config).use()
    able = next(n for n in range(1, 99) if epsilon([use] * (n + 1), target_delta=1e-3) > 1.0)
    job = tiny_job(config, tmp_path, dp_required=True, max_epsilon=1.0, max_delta=1e-2)
    worker = Worker(lambda: job, 1)
    said = [ask(worker, (0,), number)[0].report for number in range(1, able + 2)]
    assert [report.outcome for report in said] == [Outcome.OK] * able + [Outcome.BUDGET_SPENT]
    assert "the site's own max-epsilon" in said[-1].reason
    assert len(ledger(tmp_path, 0).uses()) == able


@pytest.mark.parametrize("reduction", ["mean", "one-by-one"])
def test_trainers_reduce_to_what_the_node_would(reduction: str, tmp_path: Path) -> None:
    """Two trainers, three packs: the same bits as of all updates at the node, and the same reports."""
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)
    site = RaySite(InProcess([Worker(lambda: job, 1) for _ in range(2)]))
    model = Worker(lambda: job, 1)
    asked = replace(instruction(model, (0, 1, 2, 3)), pack=3, reduction=reduction)
    (reports, reduced), (plain, folded) = site.reduce(asked), fold(asked, site.train(asked))
    assert [report.client for report in reports] == [0, 1, 2, 3]
    assert reports == plain
    ours, theirs = reduced.reduced(), folded.reduced()
    assert ours.count == theirs.count == 4
    assert bool(ours.mean) == (reduction == "mean")
    pairs = [(ours.mean, theirs.mean)]
    pairs += [(one.tensors, other.tensors) for one, other in zip(ours.updates, theirs.updates, strict=True)]
    assert all(np.array_equal(one[name], other[name]) for one, other in pairs for name in {**one, **other})


def test_a_pack_whose_sum_is_too_large_is_refused_and_the_others_are_not(tmp_path: Path) -> None:
    """Each pack's sum is within the exact range; that of both is not."""
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path)

    def large(engine: Any, works: Any, *_: Any, **__: Any) -> list[ClientResult]:
        value = {name: np.full_like(start, 2.0**35.9 / works[0].num_examples) for name, start in works[0].start.items()}
        return [ClientResult(work.client, value, work.num_examples, 1, 0.5, "") for work in works]

    worker = Worker(lambda: job, 1, large)
    asked = replace(instruction(worker, (0, 1)), pack=1)
    reports, reduced = RaySite(InProcess([worker])).reduce(asked)
    assert [report.outcome for report in reports] == [Outcome.OK, Outcome.FAILED]
    assert "updates of this size diverge" in reports[1].reason
    assert reduced.count == 1


def test_a_job_within_the_limits_trains(tmp_path: Path) -> None:
    config = dp_config(tmp_path, **{"privacy.epsilon": 2.0, "privacy.delta": 1e-3})
    job = tiny_job(config, tmp_path, **LIMITS, models=(config.model.name,))
    assert [update.report.outcome for update in ask(Worker(lambda: job, 1))] == [Outcome.OK] * 4


def test_what_a_site_refuses_reaches_whoever_runs_it(tmp_path: Path) -> None:
    job = tiny_job(resolve(tiny_flat(tmp_path)), tmp_path, dp_required=True)
    with pytest.raises(RefusedError, match=r"privacy\.mode, by dp-required"):
        Worker(lambda: job, 1).load()


def test_the_client_app_stays_thin() -> None:
    """Flower starts a process for each message: it must not pay for torch, nor for what only a trainer needs."""
    heavy = ["torch", "transformers", "peft", "opacus", "ray", "fedlora.methods", "fedlora.privacy", "fedlora.data"]
    code = "import sys, clients.app; print(sorted(set(sys.argv[1:]) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
