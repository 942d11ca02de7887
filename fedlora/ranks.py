"""Ranks by client: ``method.ranks`` gives each client a rank of its own, in a list or drawn from the run's seed.

A client of rank r_k holds the first r_k rows of A and columns of B; r is the largest rank there may be, and the scale
stays alpha / r for all of them. Other methods count something else (``ravan``: heads), of which a client trains some.
"""

from __future__ import annotations

import re

import numpy as np

from fedlora.config import Config, ConfigError
from fedlora.methods import METHODS
from fedlora.seeded import Seeded

_UNIFORM = re.compile(r"uniform:(\d{1,9})-(\d{1,9})")
_LIST = re.compile(r"\d{1,9}(\s*,\s*\d{1,9})*")


def client_ranks(config: Config, num_clients: int) -> tuple[int, ...]:
    """Return the rank of each client; empty where ``method.ranks`` is not set and all have the whole.

    A drawn rank depends on the seed and the client's number alone, so more clients leave those before them as they are.

    Args:
        config: The configuration.
        num_clients: The number of clients; 0: not known yet, and a list may have any length.

    Raises:
        ConfigError: The key cannot be read, or a rank or the number of ranks does not fit.
    """
    text = config.method.ranks.strip()
    if not config.method.ranks:
        return ()
    key, rank = METHODS[config.method.name].whole_rank(config)
    bounds = _UNIFORM.fullmatch(text)
    if bounds:
        low, high = map(int, bounds.groups())
        if not 1 <= low <= high <= rank:
            raise _error(config, f"must go from 1 or more up to {key} = {rank} or less")
        words = [Seeded(config.seed).bits("ranks", client, size=1)[0] for client in range(num_clients)]
        return tuple(low + int((word >> np.uint64(33)) % np.uint64(high - low + 1)) for word in words)
    if not _LIST.fullmatch(text):
        raise _error(config, "must be one rank a client with commas between, or uniform:LOW-HIGH, such as uniform:2-8")
    ranks = tuple(int(part) for part in text.split(","))
    if not all(1 <= one <= rank for one in ranks):
        raise _error(config, f"each rank must be between 1 and {key} = {rank}")
    if num_clients and len(ranks) != num_clients:
        raise _error(config, f"has {len(ranks)} ranks for federation.num-clients = {num_clients}; give one a client")
    return ranks


def _error(config: Config, rule: str) -> ConfigError:
    return ConfigError(f"method.ranks = {config.method.ranks!r}: {rule}.")
