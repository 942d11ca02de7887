"""A deployed site, as Flower's ClientApp sees it: a daemon behind a Unix socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import final

from clients.errors import SiteError
from clients.protocol import Frame, receive, send
from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction, Update
from fedlora.headers import instruction_header, read_reports_header
from fedlora.joining import JoinReport, JoinRequest
from fedlora.reduce import Reduction, fold

_MAX_UPDATE_BYTES = 1 << 34  # what the daemon sends is its own business; this is against a frame gone wrong
_CONNECT_S = 10.0


@final
class SocketSite:
    """A :class:`clients.site.Site` whose work is done by a daemon on this machine.

    Args:
        path: The daemon's socket.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def join(self, request: JoinRequest) -> JoinReport:
        """Ask the site to take part in a run.

        Raises:
            SiteError: The daemon does not answer.
        """
        (answer,) = self._ask(Frame("join", request.header()))
        return JoinReport.read(answer.reader())

    def train(self, instruction: Instruction) -> Iterator[Update]:
        """Have the clients trained; see :meth:`clients.site.Site.train`."""
        waiting = list(instruction.clients)
        try:
            for frame in self._ask(_instruction("train", instruction)):
                (report,) = read_reports_header(frame.reader())
                waiting.remove(report.client)
                yield Update(report, frame.tensors.get("tensors", {}), frame.tensors.get("extra", {}))
        except SiteError as error:
            yield from (Update(ClientReport.failed(client, str(error))) for client in waiting)

    def reduce(self, instruction: Instruction) -> tuple[list[ClientReport], Reduction]:
        """Have the clients trained, and reduce what comes; see :meth:`clients.site.Site.reduce`."""
        return fold(instruction, self.train(instruction))

    def evaluate(self, instruction: Instruction) -> Iterator[ClientReport]:
        """Have the clients' own models evaluated; see :meth:`clients.site.Site.evaluate`."""
        waiting = list(instruction.clients)
        try:
            for frame in self._ask(_instruction("evaluate", instruction)):
                (report,) = read_reports_header(frame.reader())
                waiting.remove(report.client)
                yield report
        except SiteError as error:
            yield from (ClientReport.failed(client, str(error)) for client in waiting)

    def _ask(self, question: Frame) -> Iterator[Frame]:
        """Send a question and yield the answers.

        Raises:
            SiteError: There is no daemon, or it does not answer as one.
        """
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_CONNECT_S)
                connection.connect(str(self._path))
                connection.settimeout(None)  # training takes as long as it takes
                with suppress(BrokenPipeError):  # it did not read all of the question; its answer says why
                    send(connection, question)
                while (frame := receive(connection, _MAX_UPDATE_BYTES)).kind != "end":
                    if frame.kind == "error":
                        raise SiteError(frame.reader().one("reason", str))
                    yield frame
        except WireError as error:
            raise SiteError(f"the site's daemon cannot be understood: {error}") from error
        except OSError as error:
            raise SiteError(
                f"the site's daemon does not answer ({type(error).__name__}); its own log says why"
            ) from error


def _instruction(kind: str, instruction: Instruction) -> Frame:
    groups = {"tensors": instruction.tensors, "extra": instruction.extra}
    return Frame(kind, instruction_header(instruction), groups)
