"""The Ray cluster that ``RAY_ADDRESS`` names, where a run is to use one: what it has, and what cannot work with it."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from clients.machines import gpu_bytes
from clients.shards import Machine, Shard, plan_shards
from fedlora.config import Config, ConfigError
from fedlora.hub import num_weights
from fedlora.quantisation import weight_bytes

_VARIABLE = "RAY_ADDRESS"  # Ray's own
_CLIENT = "ray://"
_ANSWER_S = 5.0


def named() -> bool:
    """Whether runs use a cluster that is there already, and not a Ray of their own on this machine."""
    return os.environ.get(_VARIABLE, "") not in ("", "local")


def check_options(federation_config: Sequence[str], workers: int = 1) -> None:
    """Refuse options that would change a cluster, which is as it is.

    Args:
        federation_config: Options of ``--federation-config``.
        workers: Processes of a sweep side by side.

    Raises:
        ConfigError: There are some.
    """
    if not named():
        return
    address = os.environ[_VARIABLE]
    if address.startswith(_CLIENT):
        raise ConfigError(
            f"{_VARIABLE} = {address!r}: a run joins the cluster itself, which Ray's client cannot; give the head's "
            "own address, such as 10.0.0.1:6379, on a machine where `ray start` has run."
        )
    fixed = [one for one in federation_config if "init-args-num-" in one]
    if fixed:
        raise ConfigError(
            f"--federation-config {fixed[0]!r}: the cluster at {_VARIABLE} = {address!r} has the CPUs and GPUs that it "
            "was started with; leave init-args-num-cpus and init-args-num-gpus out."
        )
    if workers > 1:
        raise ConfigError(
            f"--workers {workers}: each would put its trainers on the same GPUs of the cluster at {_VARIABLE} = "
            f"{address!r}; use one, whose trainers are on all of them."
        )


def shards_of_a_run(config: Config, machines: Sequence[Machine]) -> list[Shard]:
    """Return the shards of these machines, one for each trainer of a run.

    Raises:
        ConfigError: They cannot hold the base model, or not so many trainers.
    """
    engine = config.engine
    sized = not engine.gpus and config.model.quantization == "none" and any(one.gpu_bytes for one in machines)
    weights = num_weights(config.model) * weight_bytes(engine.dtype) if sized else 0
    return plan_shards(machines, engine.trainers, gpus=engine.gpus, weights=weights)


def machines_of_a_run() -> list[Machine]:
    """Return the machines that a run would find: those of the cluster, or this one.

    Raises:
        ConfigError: The cluster does not answer.
    """
    if not named():
        import torch

        gpus = torch.cuda.device_count()
        return [Machine("", "", os.cpu_count() or 1, gpus, gpu_bytes() if gpus else 0)]
    import ray

    from clients.pool import machines

    address = os.environ[_VARIABLE]
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
        ray.init(log_to_driver=False, logging_level="ERROR")
        return machines()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{_VARIABLE} = {address!r}: no Ray cluster that this machine is part of answers there ({error}); start "
            f"one with `ray start --head`, join it here with `ray start --address={address}`, or unset the variable "
            "to use this machine alone."
        ) from error
    finally:
        ray.shutdown()


def put_command(folder: Path) -> None:
    """Write the command that Flower starts a simulation with into a folder, to be found before Flower's own.

    See ``own_simulation.py``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = folder / "flwr-simulation"
    program = [sys.executable, "-P", str(Path(__file__).with_name("own_simulation.py").resolve())]
    command.write_text(f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n', encoding="utf-8")
    command.chmod(0o700)
