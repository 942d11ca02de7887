"""Partitions of the training rows among clients: by chance, by label, by size or by owner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlora.config import DataConfig
from fedlora.data.labels import check_owners
from fedlora.data.table import Corpus, FederatedData
from fedlora.seeded import Seeded

Rows = NDArray[np.int64]
_REDRAWS = 10  # of Dirichlet shares, with other seeds
_DRAWS = 11  # with one seed


def partition(corpus: Corpus, config: DataConfig, *, num_clients: int, seed: int, final: bool = True) -> FederatedData:
    """Partition the training rows among clients.

    A run that searches for hyper-parameters must not see the rows that their choice is judged by: what clients
    would hold out in the final run is then left out, and they hold out others.

    Args:
        corpus: The corpus.
        config: The partition and its parameters.
        num_clients: Number of clients; 0: one for each owner, with the natural partition.
        seed: Seed of the partition.
        final: Whether clients are measured on the rows that count, or search for hyper-parameters.

    Raises:
        ValueError: There are not enough rows for so many clients, a client would have too few, or rows of one
            owner would be on two clients.
    """
    names: tuple[str, ...] = ()
    if config.partition == "natural":
        clients, names = _natural(corpus, num_clients)
        num_clients = len(clients)
    else:
        check_enough(corpus, config, num_clients)
        clients = _by_rule(corpus, config, num_clients, seed)
    dealt = np.sort(np.concatenate(clients))
    assert np.array_equal(dealt, np.arange(len(corpus.train))), "every row is dealt to one client"
    if corpus.train.owners:
        _check_owners(corpus.train.owners, clients, config)
    holdout = tuple(held_out(rows, client, config.holdout, seed, "holdout") for client, rows in enumerate(clients))
    if not final:
        clients = tuple(np.setdiff1d(rows, held) for rows, held in zip(clients, holdout, strict=True))
        holdout = tuple(held_out(rows, client, config.holdout, seed, "search") for client, rows in enumerate(clients))
    _check_sizes(clients, holdout, names, config)
    return FederatedData(corpus, clients, holdout, names)


def _by_rule(corpus: Corpus, config: DataConfig, num_clients: int, seed: int) -> tuple[Rows, ...]:
    # Partitioners cut what they are given in its order, and files are often sorted by label.
    order = Seeded(seed).permutation("partition", size=len(corpus.train))
    match config.partition:
        case "iid":
            return tuple(np.sort(rows) for rows in np.array_split(order, num_clients))
        case "quantity":
            sizes = _sizes(len(order), num_clients, config, seed)
            return tuple(np.sort(rows) for rows in np.split(order, np.cumsum(sizes)[:-1]))
    if len(corpus.classes) < 2 or not corpus.train.labels:
        raise ValueError(
            f"data.partition = {config.partition!r}: goes by the label of rows, and these rows have none, or several; "
            "choose iid, quantity or natural."
        )
    labels = np.asarray(corpus.train.labels, dtype=np.int64)[order]
    places = (
        shards(labels, num_clients, config.shards_per_client, seed)
        if config.partition == "shards"
        else _dirichlet(labels, config, num_clients, seed)
    )
    return tuple(np.sort(order[place]) for place in places)


def shards(labels: Rows, num_clients: int, shards_per_client: int, seed: int) -> list[Rows]:
    """Return each client's places in ``labels``: shards of the rows sorted by label, dealt at random (McMahan et al.).

    As flwr-datasets' ``ShardPartitioner``, which cuts shards of one size and loses the rows that are left over. Here
    clients differ by one row at most, and so do the shards of a client: first it is drawn whose each shard is, then
    how long it is.

    Raises:
        ValueError: There are fewer rows than shards.
    """
    count = num_clients * shards_per_client
    if count > len(labels):
        raise ValueError(
            f"data.shards-per-client = {shards_per_client}: {num_clients} clients want {count} shards, and there are "
            f"{len(labels)} training rows; lower it, or federation.num-clients."
        )
    owner = Seeded(seed).permutation("shards", size=count) % num_clients
    sizes = np.zeros(count, dtype=np.int64)
    for client, rows in enumerate(_even(len(labels), num_clients)):
        sizes[owner == client] = _even(int(rows), shards_per_client)
    by_label = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    return [np.concatenate([by_label[at] for at in np.flatnonzero(owner == client)]) for client in range(num_clients)]


def _even(total: int, parts: int) -> Rows:
    """Return sizes that differ by one at most."""
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts)


def _dirichlet(labels: Rows, config: DataConfig, num_clients: int, seed: int) -> list[Rows]:
    """Return each client's places in ``labels``: of each class, shares that are drawn from a Dirichlet distribution.

    By the same draws as flwr-datasets' ``DirichletPartitioner``, whose package takes seconds to import. Shares are
    drawn again where a client would have too few rows, since a small alpha leaves one without in most draws;
    flwr-datasets itself gives up after ten repetitions.

    Raises:
        ValueError: A client has too few in every draw.
    """
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    alphas = np.full(num_clients, config.alpha)
    for drawn in (seed, *(int(bits) for bits in Seeded(seed).bits("dirichlet", size=_REDRAWS) >> np.uint64(33))):
        generator = np.random.default_rng(drawn)
        for _ in range(_DRAWS):
            shares = [
                np.split(places, (np.cumsum(generator.dirichlet(alphas)) * len(places)).astype(int)[:-1])
                for places in by_class
            ]
            clients = [np.concatenate(own) for own in zip(*shares, strict=True)]
            if min(map(len, clients)) >= _fewest(config):
                return clients
    raise ValueError(
        f"data.partition = 'dirichlet' finds no way to give each of {num_clients} clients {_fewest(config)} or more of "
        f"{len(labels)} rows with data.alpha = {config.alpha}: raise it, or lower federation.num-clients."
    )


def _natural(corpus: Corpus, num_clients: int) -> tuple[tuple[Rows, ...], tuple[str, ...]]:
    """Assign whole owners: one a client, or with fewer clients each next owner to the client with the fewest rows."""
    owners = np.asarray(corpus.train.owners)
    names, place, counts = np.unique(owners, return_inverse=True, return_counts=True)
    if num_clients > len(names):
        raise ValueError(
            f"federation.num-clients = {num_clients}: data.partition = 'natural' finds {len(names)} owners of rows; "
            "set it to 0 for one client each, or lower it."
        )
    if num_clients in (0, len(names)):
        groups = [[owner] for owner in range(len(names))]
    else:
        groups = [[] for _ in range(num_clients)]
        load = np.zeros(num_clients, dtype=np.int64)
        for owner in np.argsort(-counts, kind="stable"):
            smallest = int(load.argmin())
            groups[smallest].append(int(owner))
            load[smallest] += counts[owner]
    clients = tuple(np.flatnonzero(np.isin(place, group)) for group in groups)
    return clients, tuple(", ".join(str(names[owner]) for owner in group) for group in groups)


def _sizes(rows: int, num_clients: int, config: DataConfig, seed: int) -> Rows:
    """Return client sizes: everyone the minimum, what is left by shares drawn from Dirichlet(alpha)."""
    words = Seeded(seed).bits("quantity", size=4)
    shares = np.random.default_rng(words).dirichlet(np.full(num_clients, config.alpha))
    free = rows - num_clients * _fewest(config)
    bounds = np.rint(np.cumsum(shares) * free).astype(np.int64)
    bounds[-1] = free
    return np.diff(bounds, prepend=0) + _fewest(config)


def _fewest(config: DataConfig) -> int:
    """Return the rows that a client needs for ``data.min-size`` training rows and one to be measured on."""
    return config.min_size + (1 if config.holdout else 0)


def check_enough(corpus: Corpus, config: DataConfig, num_clients: int) -> None:
    """Refuse more clients than there are rows for, and none where the partition does not find them itself.

    Raises:
        ValueError: It is so.
    """
    if config.partition == "natural":
        return
    if num_clients < 1:
        raise ValueError(
            f"federation.num-clients = {num_clients}: data.partition = {config.partition!r} needs a number of clients; "
            "only natural takes it from the data."
        )
    if len(corpus.train) < num_clients * _fewest(config):
        raise ValueError(
            f"federation.num-clients = {num_clients}: {len(corpus.train)} training rows cannot give each client "
            f"{_fewest(config)} or more (data.min-size = {config.min_size}, data.holdout = {config.holdout}); lower it "
            "or add data."
        )


def _check_sizes(clients: Sequence[Rows], holdout: Sequence[Rows], names: Sequence[str], config: DataConfig) -> None:
    sizes = [len(rows) - len(held) for rows, held in zip(clients, holdout, strict=True)]
    unmeasured = next((client for client, held in enumerate(holdout) if config.holdout and not len(held)), None)
    if unmeasured is not None:
        who = f"client {unmeasured}" + (f" ({names[unmeasured]})" if names else "")
        raise ValueError(
            f"data.holdout = {config.holdout}: {who} has {len(clients[unmeasured])} row(s), too few to train on and to "
            "be measured on. Leave such owners out, or lower federation.num-clients, so that owners are put together."
        )
    short = [client for client, size in enumerate(sizes) if size < config.min_size]
    if short:
        first = short[0]
        who = f"client {first}" + (f" ({names[first]})" if names else "")
        raise ValueError(
            f"data.partition = {config.partition!r} gives {len(short)} of {len(clients)} clients fewer training rows "
            f"than data.min-size = {config.min_size}: {who} has {sizes[first]}. Lower data.min-size or "
            "federation.num-clients, or choose another partition."
        )


def _check_owners(owners: Sequence[str], clients: Sequence[Rows], config: DataConfig) -> None:
    """Refuse owners whose rows are on two clients, or two spellings of one (of a corpus that no table was read for)."""
    key = f"data.partition-column = {config.partition_column!r}"
    check_owners(owners, key, lambda row: f"training row {row}")
    holder: dict[str, int] = {}
    for client, rows in enumerate(clients):
        for row in rows:
            first = holder.setdefault(owners[row], client)
            if first != client:
                raise ValueError(
                    f"{key}: rows of {owners[row]!r} are on clients {first} and {client} with data.partition = "
                    f"{config.partition!r}; use data.partition = 'natural', which never parts them, or leave the "
                    "column unset."
                )


def held_out(rows: Rows, client: int, share: float, seed: int, key: str) -> Rows:
    """Return what a client holds out: its share of the rows, at least one, but never all."""
    if not share or len(rows) < 2:
        return np.zeros(0, dtype=np.int64)
    size = min(len(rows) - 1, max(1, round(len(rows) * share)))
    order = Seeded(seed).permutation(key, client, size=len(rows))
    return np.sort(rows[order[:size]])
