"""Flower's SuperNode, in a process that ends when it has given up its connection.

Flower's own command stays: a connection that is reset while TLS is being set up is taken for a wrong certificate and
given up, and the process then waits for its HTTP server for ever, unconnected, so that nobody starts it again.
"""

from __future__ import annotations

import sys

from flwr.supercore.exit import ExitCode, flwr_exit
from flwr.supernode.cli import flower_supernode


def main() -> None:
    """Run the SuperNode with the arguments of ``flower-supernode``; exit 1 where it only returns."""
    sys.argv[0] = "flower-supernode"  # by which Flower knows what it is
    flower_supernode()
    flwr_exit(ExitCode.SUPERNODE_CONNECTION_ERROR, "The connection to the SuperLink was given up.")


if __name__ == "__main__":
    main()
