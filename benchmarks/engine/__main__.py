"""The command: ``python -m benchmarks.engine train --shape roberta-large --out FILE``."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings

import torch
import transformers

from benchmarks.engine import curves, memory, profile, regimes, train, uneven
from benchmarks.engine.shapes import SHAPES

COMMANDS = {
    "train": train,
    "regimes": regimes,
    "uneven": uneven,
    "memory": memory,
    "profile": profile,
    "curves": curves,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one of the commands; return its exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.engine", description=__doc__)
    commands = parser.add_subparsers(dest="table", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=str(module.__doc__))
        command.add_argument("--shape", choices=SHAPES, default="roberta-large", help="the model's shape")
        command.add_argument("--rank", type=int, default=8, help="rank of the low-rank methods")
        command.add_argument("--repeats", type=int, default=5, help="rounds of each way")
        command.add_argument("--visits", type=int, default=2, help="clients that a baseline trains in a round")
        command.add_argument("--budget-s", type=float, default=0, help="seconds after which nothing new is started")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument(
            "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="of the base model"
        )
        command.add_argument(
            "--quantization", choices=("none", "nf4", "int8"), default="none", help="of the base model"
        )
        command.add_argument("--out", default="", help="JSON file to write")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return int(options.run(options, torch.device(options.device)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fedlora").setLevel(logging.INFO)
    sys.exit(main())
