"""From a flat configuration to everything a run is made of, checked before anything loads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedlora.config import Config, ConfigError, require
from fedlora.data import CORPORA, FederatedData, load_federated
from fedlora.generated import check_generation
from fedlora.methods import METHODS, Layer, build_method, check_products
from fedlora.plugins import fingerprint, methods_of, read_config
from fedlora.ranks import client_ranks
from fedlora.server import Federation
from fedlora.tasks import TASKS, Task
from fedlora.tracking import check_trackers
from simulations.privacy import resolve_privacy
from simulations.rates import settle_rate
from strategies import STRATEGIES
from strategies.build import build_strategy

_HOLDOUT = 0.2  # of its rows that a client holds out, where a run needs it and nobody said how many


def resolve(flat: Mapping[str, Any]) -> Config:
    """Return the configuration that dotted keys say, with every ``auto`` and default name filled in.

    All that can be checked without the data and the model is; :func:`settle` goes on from here.

    Raises:
        ConfigError: A value is of the wrong type, out of range or unknown, or values cannot work together.
    """
    config = _named(read_config(flat))
    check_trackers(config)
    check_generation(config)
    sites = config.federation.site_names
    if sites:  # each is one client
        config = replace(config, federation=replace(config.federation, num_clients=len(sites)))
    try:
        STRATEGIES[config.strategy.name].check(config)
        build_method(config, (), ())  # on no layers: what does not depend on the model
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _check_task(config, TASKS[config.task])
    _check_rounds(config)
    _check_ranks(config)
    _check_strategy(config, TASKS[config.task])
    data = config.data
    if data.holdout == 0 and (_keeps_tensors(config) or config.eval.baselines):
        data = replace(data, holdout=_HOLDOUT)
    # Under DP the number of a client's examples is not sent.
    weights = "equal" if config.privacy.mode == "dp" else config.strategy.weights
    return replace(config, strategy=replace(config.strategy, weights=weights), data=data)


def settle(config: Config, nodes: int, data: FederatedData | None = None) -> tuple[Config, FederatedData]:
    """Return a resolved configuration with what depends on nodes and data filled in, and the data.

    That is the number of clients, the chat template where rows are conversations, the learning rate, and under DP
    declared size, delta and noise multiplier.

    Args:
        config: What :func:`resolve` returned.
        nodes: The number of SuperNodes: of clients, where ``federation.num-clients`` leaves it to them.
        data: The federated data, where they are not what the configuration would load.

    Raises:
        ValueError: The data cannot be read or partitioned, or the configuration does not fit them.
    """
    if data is None:
        data = load_federated(config, asked_clients(config, nodes))
    if any(table.chats for table in data.corpus.splits.values()):  # they go through it, whatever the key says
        config = replace(config, data=replace(config.data, chat_template=True))
    # Checks federation.clients-per-round against the number of owners, too.
    config = replace(config, federation=replace(config.federation, num_clients=len(data.clients)))
    client_ranks(config, len(data.clients))
    return settle_rate(resolve_privacy(config, data)), data


def asked_clients(config: Config, nodes: int) -> int:
    """Return the number of clients that rows are to be partitioned among; 0: one for each owner of rows."""
    return config.federation.num_clients or (0 if config.data.partition == "natural" else nodes)


def _named(config: Config) -> Config:
    """Return the configuration with current names, all of them known, and the run's own name."""
    name = STRATEGIES.current(config.strategy.name)
    methods = methods_of(name)
    method = methods[0] if config.method.name == "auto" else METHODS.current(config.method.name)
    METHODS[method]
    TASKS[config.task]
    CORPORA[config.data.name]
    if method not in methods:
        raise ConfigError(
            f"method.name = {method!r}: strategy {name!r} works with {', '.join(methods)}; "
            "choose one of them, or method.name = 'auto'."
        )
    return replace(
        config,
        strategy=replace(config.strategy, name=name),
        method=replace(config.method, name=method),
        run=replace(config.run, name=config.run.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"),
    )


def _keeps_tensors(config: Config) -> bool:
    """Return whether clients keep trained tensors of their own, so that each is measured on its own rows."""
    return STRATEGIES[config.strategy.name].personal or config.method.head == "personal"


def _check_task(config: Config, task: type[Task]) -> None:
    """Refuse what the task does not read."""
    data, head = config.data, config.method.head
    if task.has_head:
        rule = f"is read with task = 'causal-lm' and the like, which write an answer, not {config.task!r}."
        require(not data.prompt_template, "data.prompt-template", data.prompt_template, rule)
        require(not data.chat_template, "data.chat-template", data.chat_template, rule)
        require(data.learn == "last", "data.learn", data.learn, rule)
    else:
        rule = "a language model has no head of the task's own; leave it at 'shared'."
        require(head == "shared", "method.head", head, rule)
    if not (task.has_head and task.has_classes):
        rule = f"is read by a task with classes, such as 'classification', not {config.task!r}."
        require(data.classes == "", "data.classes", data.classes, rule)
    rule = f"goes by the one class of each row, and rows of task = {config.task!r} have none, or several; choose iid, "
    rule += "quantity or natural."
    by_class = data.name != "sites" and data.partition in ("dirichlet", "shards")
    require(task.one_class or not by_class, "data.partition", data.partition, rule)
    name, most = task.measure.name, task.measure.most
    what = f"is {'an' if name[0] in 'aeiou' else 'a'} {name} here, between 0 and {most:g}."
    require(config.eval.target <= most, "eval.target", config.eval.target, what)


def _check_rounds(config: Config) -> None:
    warmup = config.train.warmup_rounds
    require(
        warmup < config.rounds,
        "train.warmup-rounds",
        warmup,
        f"must be below rounds = {config.rounds}, or the learning rate never reaches its peak.",
    )


def _check_ranks(config: Config) -> None:
    """Refuse ranks by client where strategy or method cannot have them."""
    ranks, name, method = config.method.ranks, config.strategy.name, config.method.name
    if not client_ranks(config, config.federation.num_clients) and not ranks:
        return
    able = [one for one in STRATEGIES if STRATEGIES[one].ragged]
    rule = f"strategy {name!r} takes tensors of one shape from all clients; choose one of {', '.join(able)}."
    require(name in able, "method.ranks", ranks, rule)
    fit = " and ".join(one for one in METHODS if METHODS[one].ragged)
    reads = METHODS[method].ragged or method == STRATEGIES[name].methods[0]
    require(reads, "method.ranks", ranks, f"is read by {fit} only, not by {method!r} under {name!r}.")


def _check_strategy(config: Config, task: type[Task]) -> None:
    """Refuse parts of a strategy that cannot work together, on layers that stand for the model's."""
    names = [f"layer.{number}.linear" for number in range(64)]
    layers = [Layer(name, 4096, 4096, bias=False, fan_in_fan_out=False) for name in names]
    head = [Layer("head", 4096, 4096, bias=False, fan_in_fan_out=False)] if task.has_head else []
    try:
        method = build_method(config, layers, head)
    except ValueError:
        return  # what fits the model may not fit these; the model's own layers are checked before the first round
    check_products(config, method)
    try:
        build_strategy(config, method.specs())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def federation_of(config: Config) -> Federation:
    """Return what the server needs to know of the clients."""
    return Federation(
        num_clients=config.federation.num_clients,
        seed=config.seed,
        clients_per_round=config.federation.clients_per_round,
        weights="examples" if config.strategy.weights == "examples" else "equal",
        failure_threshold=config.federation.failure_threshold,
        dtype=config.engine.tensor_dtype,
        pack=config.engine.pack,
        learning_rate=config.train.learning_rate,
        dp=config.privacy.mode == "dp",
        fingerprint=fingerprint(config.run.plugins)[0],
        deployed=config.federation.sites != "",
        min_replies=config.federation.min_replies,
        grace=config.federation.grace,
        max_change=config.federation.max_change,
        measured_by_sites=config.data.name == "sites" and not config.data.test_path,
    )
