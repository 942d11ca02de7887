"""The learning rate of a run that names none: what was found for its strategy, method, optimizer and kind of task.

The rates are those of :mod:`simulations.found`, measured in 12 rounds of 10 steps on small models
(``docs/learning_rates.md``). Two rules carry them over to other runs. AdamW moves each number by about the rate, so on
a wider model the rate is smaller by the ratio of widths (as in muP, Yang et al., 2022, for hidden layers). A step of
plain SGD under DP is at most rate x ``privacy.max-grad-norm`` long, so what is kept is the length of all steps
together: with half as many steps each is twice as long, up to the longest that were seen to learn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedlora.config import BUNDLED, SMALL_LLAMA, Config, ModelConfig, TrainConfig
from fedlora.hub import layer_width
from fedlora.privacy import Mechanism
from fedlora.tasks import TASKS
from simulations.found import RATES

_STEPS = 120  # of a client in the runs that rates were found in
_LONGEST = 3.0  # step of SGD under DP with which runs of few steps learned
_BUNDLED_WIDTHS = {BUNDLED: 384, SMALL_LLAMA: 128}
_WIDTHS = {"classes": 384, "dp": 384, "language": 128}  # of the models in those runs
_ALIKE = {  # a pair that trains and averages the same tensors as another
    ("lora", "zero-padding"): ("lora", "fedavg"),
    ("lora", "hetlora"): ("lora", "fedavg"),
    ("lora", "fed-plora"): ("lora", "fedavg"),
    ("lora", "dylora"): ("lora", "fedavg"),
    ("lora", "lora-lego"): ("lora", "fedavg"),
    ("lora", "lisa"): ("lora", "fedavg"),
    ("lora", "florist"): ("lora", "flora"),
    ("mos", "fedavg"): ("mos", "mos"),
    ("s2-lora", "fedavg"): ("s2-lora", "s2-lora"),
}
_TRIED = {  # the best of three rates on the built-in text, with one seed, at rank 8: less than what the others rest on
    ("lora-sb", "adamw", "classes"): ("fed-sb", 0.06),
    ("ravan", "adamw", "classes"): ("ravan", 0.06),
    ("nola", "adamw", "classes"): ("fedavg", 0.02),
    ("randlora", "adamw", "classes"): ("fedavg", 0.003),
    ("uni-lora", "adamw", "classes"): ("fedavg", 0.06),
    ("flylora", "adamw", "classes"): ("fedavg", 0.017),
    ("mora", "adamw", "classes"): ("fedavg", 0.0055),
}
_MAIN = {"lora": "fedavg", "mos": "mos", "s2-lora": "s2-lora"}  # the strategy of a method's own, for any other


@dataclass(frozen=True)
class Found:
    """A rate that was found.

    Attributes:
        rate: The rate.
        words: What it was found for.
    """

    rate: float
    words: str


def settle_rate(config: Config) -> Config:
    """Return a configuration, whose privacy is settled, with a learning rate: its own, or the one that was found."""
    if config.train.learning_rate:
        return config
    return replace(config, train=replace(config.train, learning_rate=found_rate(config).rate))


def found_rate(config: Config) -> Found:
    """Return the rate that was found for a configuration whose privacy is settled."""
    train, dp = config.train, config.privacy.mode == "dp"
    kind = "dp" if dp else "classes" if TASKS[config.task].has_head else "language"
    pair = _pair(config.method.name, config.strategy.name, train.optimizer, kind)
    rate, method, strategy = RATES[*pair, train.optimizer, kind], *pair
    where = {"classes": "tasks with a head", "language": "language models", "dp": "runs under DP"}[kind]
    words = f"found for {strategy} on {method} by {train.optimizer} in {where}"
    tried = (config.method.name, train.optimizer, kind)
    if tried in _TRIED:
        name, rate = _TRIED[tried]
        words = f"found for {name} on {tried[0]} by {train.optimizer} in {where}, as the best of three in one run each"
    if train.optimizer == "adamw":
        width = _width(config.model)
        if width and width != _WIDTHS[kind]:
            rate *= _WIDTHS[kind] / width
            words += f" of width {_WIDTHS[kind]}, times {_WIDTHS[kind]}/{width}"
    elif dp:
        steps, clip = config.rounds * Mechanism.of(config).steps, config.privacy.max_grad_norm
        rate = min(rate * _STEPS / steps, max(rate, _LONGEST)) / clip
        words += f" of {_STEPS} steps and clip 1, carried over to {steps} steps and clip {clip:g}"
    if train.gradient != "plain" or train.b_rate_ratio != 1.0:
        words += f"; nothing was measured with {_changed(train)}"
    return Found(float(f"{rate:.2g}"), words)


def rate_line(config: Config) -> str:
    """Return what is to be said of a settled configuration's learning rate."""
    rate, found = config.train.learning_rate, found_rate(config)
    own = rate != found.rate
    return f"learning rate: {rate:g}, " + (f"as given; {found.rate:g} was {found.words}" if own else found.words)


def _changed(train: TrainConfig) -> str:
    """Return what is not plain in a client's steps."""
    ratio = f"train.b-rate-ratio = {train.b_rate_ratio:g}" if train.b_rate_ratio != 1.0 else ""
    gradient = f"train.gradient = {train.gradient!r}" if train.gradient != "plain" else ""
    return " and ".join(filter(None, (ratio, gradient)))


def _pair(method: str, strategy: str, optimizer: str, kind: str) -> tuple[str, str]:
    """Return the method and strategy, as near as may be, for which a rate was found."""
    own = _ALIKE.get((method, strategy), (method, strategy))
    near = [own, (method, _MAIN.get(method, "")), ("lora", strategy), ("lora", "fedavg")]
    return next(pair for pair in near if (*pair, optimizer, kind) in RATES)


def _width(model: ModelConfig) -> int | None:
    """Return the width of a base model's layers; None where its configuration does not say."""
    return _BUNDLED_WIDTHS.get(model.name) or layer_width(model)
