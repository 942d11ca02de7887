"""The Flower ServerApp: a run of deployed sites where ``federation.sites`` names them, else a simulation."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run what the run configuration describes."""
    if not context.run_config.get("federation.sites"):
        from simulations.server_app import simulate

        simulate(grid, context)
        return
    from rich.console import Console

    from deploy.coordinator import run
    from fedlora.server import FederationError
    from simulations.setup import resolve

    console = Console(width=100, highlight=False, soft_wrap=True)
    try:
        run(grid, resolve(context.run_config), console)
    except (ValueError, FederationError) as error:
        console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        raise
