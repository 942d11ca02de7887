"""How a command ends: with a code, and with one line where its user did what cannot work, or interrupted it.

It imports little: all else is imported under :func:`exit_with`, so that Ctrl-C is one line then, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console

from fedlora.runs.lock import COMMAND


def exit_with(command: Callable[[Console], int]) -> None:
    """Exit with a command's code; what its user did wrong is one line and code 2."""
    console = Console(width=100, highlight=False, soft_wrap=True)
    try:
        code = command(console)
    except (ValueError, OSError) as error:  # the latter: a file or folder that the system refuses
        with suppress(OSError):  # perhaps it was the terminal, and it is gone
            console.print(f"fedlora: error: {error}", markup=False, style="bold red")
        code = 2
    except KeyboardInterrupt:
        with suppress(OSError):
            if COMMAND not in os.environ:  # else it is one of several processes of a command, which says so itself
                console.print("fedlora: interrupted; nothing was left running", markup=False)
        code = 130
    sys.exit(code)
