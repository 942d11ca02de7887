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
    _check_gradient(config, strategy)
    return strategy


_LEAST_DAMPING = 0.1  # under DP: a tenth multiplies what noise there is in A by ten at most, where B is small


def _check_gradient(config: Config, strategy: Strategy) -> None:
    """Refuse a rate of B's own, or a gradient other than the plain one, where it means nothing or does harm."""
    train, name, sides = config.train, config.strategy.name, {kind[0] for kind in strategy.trained_kinds}
    rule = f"is for tensors whose kind begins with B, and strategy {name!r} trains none on {config.method.name!r}."
    require(train.b_rate_ratio == 1.0 or "B" in sides, "train.b-rate-ratio", train.b_rate_ratio, rule)
    gradient = train.gradient
    require(gradient != "allora" or "B" in sides, "train.gradient", gradient, rule)
    if gradient != "lora-pro":
        return
    terms = strategy.local(1)
    term = "FedProx's term" if terms.proximal else "HetLoRA's penalty"
    rule = (
        f"takes what it is given for a product's gradient, and that of {term} is none: it would multiply it by up to "
    )
    rule += "1 / train.damping; use 'plain', or another strategy or local.term."
    require(not terms.proximal and not terms.penalty, "train.gradient", gradient, rule)
    rule = f"multiplies the noise in A by up to 1 / train.damping where B is small; under DP set {_LEAST_DAMPING} or "
    rule += "more, or a strategy that does not train A, such as 'ffa-lora'."
    noisy = config.privacy.mode == "dp" and "A" in sides
    require(not noisy or train.damping >= _LEAST_DAMPING, "train.damping", train.damping, rule)


def _check_start(config: Config, strategy: Strategy) -> None:
    """Refuse an adapter to start from where it would be lost."""
    start, name = config.method.start, config.strategy.name
    require(config.method.name == "lora", "method.start", start, f"is read by lora, not {config.method.name!r}.")
    fresh = any(Role.UPLOAD in roles for roles in strategy.roles_in_turn().values())
    rule = f"clients of strategy {name!r} start a fresh LoRA in every round, and the adapter would be lost."
    require(not fresh, "method.start", start, rule)
    rule = f"goes with method.init = 'auto' or 'orthonormal': {config.method.init!r} says how the same factors start."
    require(not config.method.computed, "method.start", start, rule)
