"""From a configuration to the strategy of a run, with its server optimizer, local terms and schedule around it."""

from __future__ import annotations

from fedlora.config import Config, require
from fedlora.ranks import client_ranks
from fedlora.roles import Role
from fedlora.strategy import Setting, Specs, Strategy
from strategies import STRATEGIES
from strategies.fedprox import FedProx
from strategies.round_schedule import RoundSchedule
from strategies.scaffold import Scaffold
from strategies.server_optimizers import ServerOptimizer


def build_strategy(config: Config, specs: Specs, frozen: frozenset[str] = frozenset()) -> Strategy:
    """Return the strategy that a configuration describes.

    Args:
        config: The resolved configuration.
        specs: The method's tensors.
        frozen: Kinds that stay as the seed gives them, whatever the strategy does with them.

    Raises:
        ValueError: Its parts cannot work together.
    """
    ranks = client_ranks(config, config.federation.num_clients)
    setting = Setting(specs, Role(config.method.head), frozen, ranks, config)
    strategy: Strategy = STRATEGIES[config.strategy.name](setting)
    if config.method.start:
        _check_start(config, strategy)
    if config.server.optimizer != "none":
        strategy = ServerOptimizer(strategy, config.server)
    match config.local.term:
        case "prox":
            strategy = FedProx(strategy, config.local.mu)
        case "scaffold":
            strategy = Scaffold(strategy, config.federation.num_clients, config.local.option)
    train = config.train
    if train.round_schedule != "constant" or train.warmup_rounds:
        strategy = RoundSchedule(strategy, config.rounds, train.round_schedule, train.warmup_rounds)
    return strategy


def _check_start(config: Config, strategy: Strategy) -> None:
    """Refuse an adapter to start from where it would be lost."""
    start, name = config.method.start, config.strategy.name
    require(config.method.name == "lora", "method.start", start, f"is read by lora, not {config.method.name!r}.")
    fresh = any(Role.UPLOAD in roles for roles in strategy.roles_in_turn().values())
    rule = f"clients of strategy {name!r} start a fresh LoRA in every round, and the adapter would be lost."
    require(not fresh, "method.start", start, rule)
    rule = f"goes with method.init = 'auto' or 'orthonormal': {config.method.init!r} says how the same factors start."
    require(not config.method.computed, "method.start", start, rule)
