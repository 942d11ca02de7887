"""Deployed sites: who is there, who has joined, who is missing and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedlora.codec import WireError
from fedlora.joining import JoinReport, JoinRequest
from fedlora.server.errors import FederationError
from fedlora.server.mail import Mail
from fedlora.server.nodes import Nodes
from fedlora.wire import read_join_report, write_join_request

_logger = logging.getLogger(__name__)
_POLL_S = 1.0
_SAY_S = 60.0  # between two lines that say the same of who is missing
_ASK_AGAIN_S = 60.0  # a site that refused may have been mended
_LOST_S = 300.0  # after which an answer will not come any more: a large model takes minutes to load


@dataclass
class _Site:
    """What is known of one site."""

    name: str
    node: int
    request: JoinRequest
    online: bool = False
    report: JoinReport | None = None  # of a site that has joined
    refused: str = ""
    asked: float = 0.0
    pending: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def present(self) -> bool:
        return self.online and self.report is not None

    @property
    def why(self) -> str:
        """Why it is not present."""
        if not self.online:
            return "its SuperNode is not connected"
        if self.refused:
            return self.refused
        return "it has been asked to join, and has not answered yet"


@final
class Sites(Nodes):
    """The sites of a deployment, each of which is one client with its own SuperNode.

    Args:
        roster: Each site's SuperNode by the site's name, in the order of clients.
        request: Makes the request to join for a site's name and client number.
        own: The coordinator's own report, which a site's must agree with.
        needed: Sites that a round needs; 0: at the start of a run all, then one.
        wait: Seconds to wait for them.
        grace: Seconds to go on waiting, before the first round, for sites that are connected and have yet to answer.
        timeout: Seconds that a site has to answer.
        say: Tells whoever runs the coordinator.
    """

    def __init__(
        self,
        roster: Mapping[str, int],
        request: Callable[[str, int], JoinRequest],
        own: JoinReport,
        *,
        needed: int,
        wait: float,
        grace: float = 0.0,
        timeout: float,
        say: Callable[[str], None],
    ) -> None:
        self._sites = [_Site(name, node, request(name, client)) for client, (name, node) in enumerate(roster.items())]
        self._own = own
        self._needed, self._wait, self._grace, self._timeout = needed, wait, grace, timeout
        self._say = say
        self._started = False

    @property
    def reports(self) -> dict[str, JoinReport]:
        """What each site that has joined said of itself."""
        return {site.name: site.report for site in self._sites if site.report is not None}

    def assign(self, grid: Grid, clients: Sequence[int], server_round: int) -> dict[int, tuple[int, ...]]:
        """Return each present client's node, having waited for as many sites as the round needs.

        Raises:
            FederationError: They did not come in time; the message names who is missing, and why.
        """
        needed = self._needed or (1 if self._started else len(self._sites))
        end, graced, told, again = time.monotonic() + self._wait, time.monotonic() + self._grace, "", 0.0
        while True:
            self._look(grid)
            missing = [site for site in self._sites if not site.present]
            able = [client for client in clients if self._sites[client].present]
            answering = not self._started and any(site.online and not site.refused for site in missing)
            if len(self._sites) - len(missing) >= needed and able and not (answering and time.monotonic() < graced):
                break
            reasons = "; ".join(f"site {site.name}: {site.why}" for site in missing)
            if time.monotonic() >= end:
                raise FederationError(
                    f"round {server_round}: {len(self._sites) - len(missing)} of {len(self._sites)} sites are there "
                    f"after federation.wait = {self._wait:g} s, and {needed} are needed. {reasons}"
                )
            if reasons != told or time.monotonic() >= again:
                self._say(f"round {server_round}: waiting for sites. {reasons}")
                told, again = reasons, time.monotonic() + _SAY_S
            time.sleep(_POLL_S)
        self._started = True
        if missing:
            self._say(
                f"round {server_round} goes without {'; '.join(f'site {one.name}: {one.why}' for one in missing)}"
            )
        return {self._sites[client].node: (client,) for client in able}

    def job(self, clients: Sequence[int]) -> str:
        """Return the digest of the job that a site has joined."""
        (client,) = clients
        return self._sites[client].request.job

    def rows(self, client: int) -> int | None:
        """Return the rows that a site declared when it joined."""
        report = self._sites[client].report
        return report.rows if report is not None else 0

    def left(self, client: int, reason: str) -> None:
        """Ask a site to join anew."""
        site = self._sites[client]
        site.report, site.refused, site.asked = None, "", 0.0
        self._say(f"site {site.name} has to join anew: {reason}")

    def name(self, client: int) -> str:
        """Return a site's name."""
        return f"site {self._sites[client].name}"

    def node_name(self, node: int) -> str:
        """Return the name of the site that a node is of."""
        return next((f"site {site.name}" for site in self._sites if site.node == node), f"node {node}")

    def _look(self, grid: Grid) -> None:
        """See who is connected, ask newcomers to join, and read their answers; without waiting."""
        online, mail = set(grid.get_node_ids()), Mail(grid, self._timeout, deployed=True)
        for client, site in enumerate(self._sites):
            was, site.online = site.online, site.node in online
            if was and not site.online:
                self._say(f"site {site.name}: its SuperNode is not connected any more")
            if not site.online:  # what comes back may have another model or daemon
                site.report, site.refused, site.pending, site.asked = None, "", {}, 0.0
                continue
            if site.report is not None:
                continue
            for reply in list(mail.pull(site.pending)) if site.pending else ():
                self._read(site, reply)
            due = time.monotonic() - site.asked > (_ASK_AGAIN_S if site.refused else _LOST_S)
            if site.report is None and (not site.asked or due):
                message = Message(
                    write_join_request(site.request),
                    dst_node_id=site.node,
                    message_type=MessageType.QUERY,
                    ttl=self._timeout,
                    group_id="join",
                )
                site.pending, site.asked = mail.send([message]), time.monotonic()
                _logger.info("asked site %s, client %d, to join", site.name, client)

    def _read(self, site: _Site, reply: Message) -> None:
        """Take up a site's answer: it has joined, or there is a reason why not."""
        site.refused = self._fault(site, reply)
        if site.refused:
            self._say(f"site {site.name} does not join: {site.refused}")
        else:
            assert site.report is not None, "it has no fault"
            other = site.report.fingerprint != self._own.fingerprint
            self._say(
                f"site {site.name} has joined: {site.report.rows} declared rows, {site.report.trainers} trainer(s) of "
                f"{site.report.threads} thread(s) on {site.report.device}"
                + (
                    f"; note: its installed code (fedlora {site.report.version}) is not the coordinator's"
                    if other
                    else ""
                )
            )

    def _fault(self, site: _Site, reply: Message) -> str:
        if reply.has_error():
            return f"its node failed: {reply.error.reason}"
        try:
            report = read_join_report(reply.content)
        except WireError as error:
            return f"its answer cannot be read: {error}"
        if report.reason:
            return report.reason
        if report.site != site.name:
            return f"its SuperNode is registered as {site.name!r}, and its daemon calls itself {report.site[:64]!r}"
        if report.rows < 1:
            return "it declares no rows"
        differing = report.differs(self._own)
        if not differing:
            site.report = report
        return differing
