"""A deployed site: its own rows, limits, ledger and log around trainers.

All that a server can ask of it goes through here. Nothing that a server sends chooses a file, a plug-in or a folder.
What it may choose, the site's limits bound.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Protocol, final

import numpy as np

from clients.errors import WITHHELD, RefusedError, SiteError
from clients.last_update import LastUpdate, question_digest
from clients.own_disk import folder_id
from clients.release_log import ReleaseLog
from clients.site import Job, LoadedSite, Site
from clients.site_file import SiteFile
from fedlora import __version__, plugins
from fedlora.codec import WireError
from fedlora.config import Config, ConfigError
from fedlora.config.data_keys import read_names
from fedlora.config.sections import is_pattern
from fedlora.data import FederatedData
from fedlora.data.files import load_own_rows
from fedlora.data.partition import held_out
from fedlora.exchange import ClientReport, Instruction, Outcome, Update
from fedlora.headers import HeaderReader
from fedlora.joining import PROTOCOL, JoinReport, JoinRequest
from fedlora.quantisation import check_quantisation
from fedlora.storage import write_whole
from fedlora.tasks import TASKS

_logger = logging.getLogger(__name__)
_JOB = "job.json"


class Workplace(Protocol):
    """Where a deployed site trains: trainers that are given one job after the other."""

    def assign(self, job: Job) -> tuple[LoadedSite, int]:
        """Give the trainers a job; return them as a site, and how many there are."""
        ...


@final
class DeployedSite:
    """A site with rows of its own.

    Args:
        file: The site's file.
        workplace: Its trainers.
    """

    def __init__(self, file: SiteFile, workplace: Workplace) -> None:
        self.file = file
        self.log = ReleaseLog(file.state / "released.jsonl")
        self._last = LastUpdate(file.state / "last-update.safetensors")
        self._workplace = workplace
        self._lock = Lock()  # one job, and one piece of work at a time
        self._request: JoinRequest | None = None
        self._site: Site | None = None

    # -- what a server can ask ----------------------------------------------------------------------------

    def join(self, request: JoinRequest) -> JoinReport:
        """Take part in a run, or say why not, in words that hold nothing of a row."""
        try:
            with self._lock:
                report = self._joined(request)
                write_whole(self.file.state / _JOB, json.dumps(request.header()).encode())
                return report
        except Exception as error:
            return JoinReport(self.file.name, reason=_reason(error), version=__version__)

    def train(self, instruction: Instruction) -> Iterator[Update]:
        """Train for a round; an update is in the log, on the disk, before it is yielded.

        A round that is asked again, as by a coordinator that died in it, gets the same update again and costs nothing.
        """
        with self._lock:
            try:
                site, question = self._ready(instruction), question_digest(instruction)
                if (before := self._last.answer_to(question)) is not None:
                    _logger.info("round %d is asked again: its update is sent again", instruction.round)
                    self._write(instruction, before, again=True)
                    yield before
                    return
                limit = self.file.limits.max_rounds_per_day
                if limit and (today := self.log.rounds_today()) >= limit:
                    _logger.error("refused a round: %d left in 24 hours, and max-rounds-per-day = %d", today, limit)
                    raise RefusedError("the site's own limits refuse the round, by max-rounds-per-day")
                for update in site.train(instruction):
                    if update.report.outcome is Outcome.OK:
                        self._last.keep(question, update)
                    self._write(instruction, update)
                    yield update
            except Exception as error:
                for client in instruction.clients:
                    yield Update(_failed(client, error))

    def evaluate(self, instruction: Instruction) -> Iterator[ClientReport]:
        """Evaluate on the rows that the site holds out, if its mode lets the sums leave."""
        with self._lock:
            try:
                for report in self._ready(instruction).evaluate(instruction):
                    self._write(instruction, Update(report))
                    yield report
            except Exception as error:
                for client in instruction.clients:
                    yield _failed(client, error)

    # -- for whoever runs the site ------------------------------------------------------------------------

    def restore(self) -> None:
        """Take up the run that the site was in when its daemon ended, if there is one that it still joins."""
        path = self.file.state / _JOB
        if not path.is_file():
            return
        try:
            request = JoinRequest.read(HeaderReader(json.loads(path.read_text(encoding="utf-8")), "join"))
            with self._lock:
                self._joined(request)
        except Exception as error:
            _logger.error("the run of %s is not taken up again: %s", path, error)

    # -- helpers ------------------------------------------------------------------------------------------

    def _joined(self, request: JoinRequest) -> JoinReport:
        """Check a run against the site's file, and have the trainers load it."""
        file = self.file
        if request.protocol != PROTOCOL:
            raise RefusedError(
                f"the coordinator speaks version {request.protocol} of the joining protocol, this site {PROTOCOL}; "
                "install the same fedlora on both sides"
            )
        if request.site != file.name:
            raise RefusedError(f"this is site {file.name!r}, not {request.site!r}")
        job = own_job(file, request)
        self._request = self._site = None
        site, trainers = self._workplace.assign(job)
        described = site.describe()
        self._request, self._site = request, site
        return described.join_report(file.name, rows=file.public.rows, trainers=trainers)

    def _ready(self, instruction: Instruction) -> Site:
        if self._request is None or self._site is None or instruction.job != self._request.job:
            raise RefusedError("it has not joined this run", Outcome.NOT_JOINED)
        if instruction.clients != (self._request.client,):
            raise RefusedError(f"the instruction is for clients {list(instruction.clients)[:5]}, which are not here")
        return self._site

    def _write(self, instruction: Instruction, update: Update, *, again: bool = False) -> None:
        assert self._request is not None, "work is done for a run"
        self.log.write(str(self._request.flat.get("run.name", "")), instruction.round, update, again=again)


def own_job(file: SiteFile, request: JoinRequest) -> Job:
    """Return a server's job as the site works on it, with the site's own rows, model folder and limits.

    Raises:
        RefusedError: The site's limits or its file do not allow the job.
        ValueError: The rows cannot be read; the message may quote one.
    """
    if request.flat.get("run.plugins", "") != file.plugins:
        raise RefusedError("the job's run.plugins are not those of this site; code comes from the site's operator only")
    if request.flat.get("model.trust-remote-code", False):
        raise RefusedError("the job has model.trust-remote-code; code comes from the site's operator only")
    if request.flat.get("method.start", ""):  # a path on this machine, whose adapter may be private
        raise RefusedError("the job has method.start; a site's own files are no server's to name")
    if is_pattern(str(request.flat.get("method.target-modules", ""))):  # which may be made to match for ever
        raise RefusedError("the job's method.target-modules is a regular expression; a site takes names")
    try:
        asked = plugins.read_config({**request.flat, **file.data.flat}, foreign=True)
        check_quantisation(asked.model, None)
    except ConfigError as error:  # of the server's own values: the site's were checked when its file was read
        raise RefusedError(f"the job's configuration cannot be used: {error}") from error
    file.limits.check(asked)
    if file.data.task not in ("", asked.task):
        raise RefusedError(f"the job has task = {asked.task!r}, and this site's rows are for {file.data.task!r}")
    task = TASKS[asked.task]
    if task.has_head and task.has_classes and asked.data.class_names != read_names(file.public.classes):
        raise RefusedError(
            f"the job has data.classes = {asked.data.classes!r} and this site {file.public.classes!r}; they must agree"
        )
    config = replace(asked, model=replace(asked.model, name=file.models[asked.model.name]))
    rows = _federated(config, request.client, request.clients)
    count = len(rows.training_rows(request.client))
    if config.privacy.mode != "dp":  # under DP steps go by the public size and are checked; rows are not counted
        train = config.train
        file.limits.check_steps(train.local_steps or train.local_epochs * -(-count // train.batch_size))
        if count > file.public.rows:
            raise ValueError(
                f"{file.path} [public]: rows = {file.public.rows}: the site trains on {count} rows and would count for "
                "more than it declares; raise it."
            )
    limits = replace(file.limits, models=tuple(file.models.values()))
    run = hashlib.sha256(asked.run.name.encode()).hexdigest()[:16]
    return Job(config.to_flat(), rows, limits, str(Path(limits.folder) / "runs" / run), folder_id(file.state))


def _federated(config: Config, client: int, clients: int) -> FederatedData:
    """Return the site's rows as those of one client among others, whose rows are elsewhere."""
    corpus = load_own_rows(config)
    rows, nobody = np.arange(len(corpus.train)), np.zeros(0, dtype=np.int64)
    held = held_out(rows, client, config.data.holdout, config.seed, "holdout")
    own = [(rows, held) if number == client else (nobody, nobody) for number in range(clients)]
    return FederatedData(corpus, tuple(one for one, _ in own), tuple(one for _, one in own))


def _failed(client: int, error: Exception) -> ClientReport:
    outcome = error.outcome if isinstance(error, RefusedError) else Outcome.FAILED
    return ClientReport.failed(client, _reason(error), outcome)


def _reason(error: Exception) -> str:
    """Return what may leave of an error: words that were written for the server, and of any other none."""
    if isinstance(error, RefusedError | SiteError | WireError):
        return str(error)
    _logger.error("failed while answering the server", exc_info=error)
    return WITHHELD
