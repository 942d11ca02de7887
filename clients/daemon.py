"""The daemon of a deployed site: owns its rows, limits, ledger and trainers, and answers on a Unix socket.

It is installed at the site and runs as a user of its own. Flower's ClientApp, whose code the server sends, runs as
another user: all that it can do is to connect and ask what :mod:`clients.protocol` has words for.
"""

from __future__ import annotations

import logging
import os
import pwd
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, final

from filelock import FileLock, Timeout

from clients.deployed import DeployedSite
from clients.errors import WITHHELD
from clients.own_ray import own_ray
from clients.protocol import Frame, receive, send
from clients.shards import Machine, plan_shards
from clients.site import Job, LoadedSite
from clients.site_file import SiteFile
from fedlora.codec import WireError
from fedlora.exchange import ClientReport, Instruction
from fedlora.headers import read_instruction_header, reports_header
from fedlora.joining import JoinRequest

if TYPE_CHECKING:
    from clients.pool import TrainerPool

_logger = logging.getLogger(__name__)
_CREDENTIALS = struct.Struct("3i")  # process, user and group of the other end
_SILENT_S = 10.0  # how long a client may leave a frame unfinished
_SEND_S = 120.0  # for the tensors of an update, which may be gigabytes
_MAX_CONNECTIONS = 16


def run(path: Path) -> None:
    """Serve a site until SIGTERM or SIGINT.

    Raises:
        ValueError: The site's file cannot be used, or another daemon serves it.
    """
    file = SiteFile.read(path)
    users = file.access.ids
    file.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.state.chmod(0o700)
    try:
        with (
            FileLock(file.state / "daemon.lock", timeout=0),
            own_ray(file.state / "ray-folder", file.trainers.ray_address, file.trainers.threads) as machines,
        ):
            trainers = Trainers(machines, file.trainers.count, file.trainers.gpus)
            try:
                _serve(file, DeployedSite(file, trainers), users)
            finally:
                trainers.stop()
    except Timeout:
        raise ValueError(f"{file.state} is in use: another daemon serves this site.") from None


@final
class Trainers:
    """Trainers on the site's own Ray, started with the first job.

    Args:
        machines: The machines of its Ray.
        count: How many trainers; 0: as many as in a simulation.
        gpus: GPUs of each.
    """

    def __init__(self, machines: list[Machine], count: int, gpus: int = 1) -> None:
        self._shards = plan_shards(machines, count, gpus=gpus)
        self._pool: TrainerPool | None = None

    def assign(self, job: Job) -> tuple[LoadedSite, int]:
        """Give the trainers a job; see :class:`clients.deployed.Workplace`."""
        from clients.pool import TrainerPool  # not before Ray's token is set
        from clients.ray_site import RaySite

        if self._pool is None:
            self._pool = TrainerPool.start(os.getpid(), self._shards, job)
        else:
            self._pool.assign(job)
        self._pool.everywhere(lambda worker, _: worker.check_folder())
        return RaySite(self._pool), len(self._pool)

    def stop(self) -> None:
        """End the trainers."""
        if self._pool is not None:
            self._pool.stop()


def _serve(file: SiteFile, site: DeployedSite, users: frozenset[int]) -> None:
    """Answer connections until a signal comes."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threading.Thread(target=site.restore, name="restore", daemon=True).start()
    places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
    with _listening(file.socket, users) as listener:
        _logger.info("site %s: listening on %s", file.name, file.socket)
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            if not places.acquire(blocking=False):
                connection.close()
                _logger.error("refused a connection: %d are open", _MAX_CONNECTIONS)
                continue
            answer = _Answer(file, site, users, connection, places.release)
            threading.Thread(target=answer.run, name="connection", daemon=True).start()
    _logger.info("site %s: ended", file.name)


@contextmanager
def _listening(path: Path, users: frozenset[int]) -> Iterator[socket.socket]:
    """Listen on a socket that no more users than needed can open."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    path.unlink(missing_ok=True)  # of a daemon that was killed: the lock says that there is no other
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ValueError(f"socket = {str(path)!r}: cannot be opened ({error}); a short path may help.") from error
        finally:
            os.umask(mask)
        _open_to(path, users - {os.getuid()})
        listener.listen()  # more than are answered: those too many are closed, not kept waiting
        listener.settimeout(0.5)
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _open_to(path: Path, others: frozenset[int]) -> None:
    """Let these users open the socket: by their group, if there is one user and it can be set."""
    if not others:
        return
    if len(others) == 1:
        try:
            os.chown(path, -1, pwd.getpwuid(next(iter(others))).pw_gid)
            path.chmod(0o660)
        except (KeyError, PermissionError):
            _logger.warning("the group of %s cannot be set; who may talk is decided when one connects", path)
        else:
            return
    path.chmod(0o666)  # whoever connects is asked who it is, see _Answer


@final
class _Answer:
    """One connection: who it is, what it asks, the answer.

    Args:
        file: The site's file.
        site: The site.
        users: Who may ask.
        connection: The connection.
        done: Called when it is closed.
    """

    def __init__(
        self,
        file: SiteFile,
        site: DeployedSite,
        users: frozenset[int],
        connection: socket.socket,
        done: Callable[[], None],
    ) -> None:
        self._file, self._site, self._users = file, site, users
        self._connection, self._done = connection, done

    def run(self) -> None:
        """Answer, whatever it asks, and close."""
        try:
            with self._connection:
                self._connection.settimeout(_SILENT_S)
                process, user, _ = _CREDENTIALS.unpack(
                    self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                )
                if user not in self._users:
                    _logger.error("refused user %d (process %d), who is not in [access] users", user, process)
                    return
                self._answer()
        except OSError as error:
            _logger.error("a connection ended early: %s", error)
        except Exception as error:  # one bad question must not end the daemon
            _logger.error("a connection failed", exc_info=error)
        finally:
            self._done()

    def _answer(self) -> None:
        try:
            question = receive(self._connection, self._file.access.max_message_bytes)
            self._connection.settimeout(_SEND_S)
            for frame in self._frames(question):
                send(self._connection, frame)
            send(self._connection, Frame("end"))
        except WireError as error:
            _logger.error("refused a message: %s", error)
            send(self._connection, Frame("error", {"reason": f"the site cannot read the message: {error}"}))
        except OSError:
            raise
        except Exception as error:
            _logger.error("failed while answering", exc_info=error)
            send(self._connection, Frame("error", {"reason": WITHHELD}))

    def _frames(self, question: Frame) -> Iterator[Frame]:
        match question.kind:
            case "join":
                yield Frame("joined", self._site.join(JoinRequest.read(question.reader())).header())
            case "train":
                for update in self._site.train(_instruction(question)):
                    yield Frame(
                        "update", reports_header([update.report]), {"tensors": update.tensors, "extra": update.extra}
                    )
            case "evaluate":
                yield from _reports(self._site.evaluate(_instruction(question)))
            case _:
                raise WireError(f"there is no question of kind {question.kind[:40]!r}")


def _instruction(question: Frame) -> Instruction:
    groups = question.tensors
    return read_instruction_header(question.reader(), groups.get("tensors", {}), groups.get("extra", {}))


def _reports(reports: Iterable[ClientReport]) -> Iterator[Frame]:
    for report in reports:
        yield Frame("report", reports_header([report]))
