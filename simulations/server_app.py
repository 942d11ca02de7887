"""The Flower ServerApp of a simulation: one run, or the cells of a sweep."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from clients.pool import TrainerLostError
from simulations.session import Session
from simulations.setup import resolve
from simulations.sweep import Share, Sweep
from strategies import FederationError

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run configuration describes."""
    console = Console(width=100, highlight=False, soft_wrap=True)
    session: Session | None = None
    try:
        config = resolve(context.run_config)
        session = Session(grid, context)
        if config.run.sweep:
            Sweep.read(config.run.sweep, context.run_config).run(session, console, Share.read(config.run.share))
        else:
            session.run(config, console)
    except (ValueError, FederationError, TrainerLostError) as error:
        console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        raise
    finally:
        if session is not None:
            session.stop()
