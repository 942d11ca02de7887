"""What the Flower ServerApp does in a simulation: one run, or the cells of a sweep."""

from __future__ import annotations

import logging
from functools import partial

from flwr.app import Context
from flwr.serverapp import Grid
from rich.console import Console

from clients.errors import TrainerLostError
from fedlora.server import FederationError
from fedlora.storage import StorageError
from simulations.session import Session
from simulations.setup import resolve
from simulations.sweeps.cells import Share
from simulations.sweeps.file import Sweep


def simulate(grid: Grid, context: Context) -> None:
    """Run what the run configuration describes."""
    console = Console(width=100, highlight=False, soft_wrap=True, emoji=False)
    session: Session | None = None
    try:
        flat = context.run_config
        if flat.get("run.sweep"):  # its cells are configurations; what they share need not be one
            from simulations.sweeps.progress import one_by_one, run_share  # and with it pandas, which takes a while

            sweep = Sweep.read(str(flat["run.sweep"]), flat, check=False)  # it was checked when it was written
            share = Share.read(str(flat.get("run.share", "1/1")))
            session = Session.under_flower(grid, context)
            run_share(sweep, one_by_one(session), console, share)
        else:
            config = resolve(flat)
            session = Session.under_flower(grid, context)
            session.run(config, console)
    except (ValueError, FederationError, TrainerLostError, StorageError) as error:
        console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        logging.getLogger("flwr").addFilter(partial(_is_news, said=error))
        raise
    finally:
        if session is not None:
            session.stop()


def _is_news(record: logging.LogRecord, said: BaseException) -> bool:
    """Return whether a line of Flower's log says more than an error that was said: its traceback does not."""
    return record.exc_info is None or record.exc_info[1] is not said
